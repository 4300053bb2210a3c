"""Steps whose loss or gradient is not finite: they change nothing (`apply_gradients`); here is said where it began.

The step is repeated with the parameters as they are, which no step that was not finite has touched, and looked at in
the order of the computation: records, parameters, the denoiser's blocks, terms and taps of the loss, the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax import parallel
from lpl_jax.data import batches
from lpl_jax.errors import InputError, some
from lpl_jax.parallel import leaf_path
from lpl_jax.training.accumulate import over_parts
from lpl_jax.training.data import open_stream
from lpl_jax.training.objective import LossOutput, Objective
from lpl_jax.training.session import Session
from lpl_jax.training.state import Frozen, TrainState
from lpl_jax.training.step import losses


class NonfiniteWatch:
    """Says what is behind the steps that are not finite, and ends a run after `train.max_nonfinite` of them in a row.

    note: shows a line. row: what the attribute was when the run was saved that goes on here.
    """

    def __init__(
        self, session: Session, frozen: Frozen, seed_key: jax.Array, note: Callable[[str], None], row: Sequence[int]
    ):
        self._session, self._frozen, self._seed_key, self._note = session, frozen, seed_key, note
        self.row = list(row)  # the last steps in a row that were not finite

    def __call__(self, steps: Sequence[int], state: TrainState) -> None:
        """steps: that were not finite, ascending, since the last call; state: of now.

        Raises InputError where so many in a row were not finite.
        """
        if not steps:
            return
        text = f"step {steps[0]} is not finite and changed nothing: "
        text += diagnose(self._session, state, self._frozen, self._seed_key, steps[0])
        for step in steps:
            self.row = [*self.row, step] if self.row and step == self.row[-1] + 1 else [step]
            if len(self.row) >= self._session.experiment.train.max_nonfinite:
                raise InputError(f"{text}; {len(self.row)} steps in a row (train.max_nonfinite), up to step {step}")
        more = f" (and {len(steps) - 1} more up to step {steps[-1]})" if len(steps) > 1 else ""
        self._note(f"{self._session.label}: {text}{more}")


def check_finite(trees: Mapping[str, Any]) -> None:
    """Raises InputError that names the first leaf with a value that is not finite; trees are given by what they are."""
    for what, tree in trees.items():
        if bad := _bad_leaves(tree):
            raise InputError(f"{what} {_first(bad)} has values that are not finite: nothing can be trained with it")


def diagnose(session: Session, state: TrainState, frozen: Frozen, seed_key: jax.Array, step: int) -> str:
    """What is not finite first in a step, and in which records of its batch; compiles it anew."""
    objective = session.objective.at(step - 1)
    stream = open_stream(session.experiment, session.store, session.mesh, step - 1)
    batch = parallel.put_batch(next(stream), session.mesh)
    keys = _keys(session, step)
    if bad := _bad_rows(batch):
        fields, rows = bad
        named = some([keys[row] for row in rows])
        return f"{', '.join(fields)} of records {named} in latent store {session.store.path}"
    if bad := _bad_leaves(state.params):
        return f"parameter {bad[0]}"
    arguments = state, batch, jax.random.fold_in(seed_key, step - 1), frozen
    grads, finite, samples = jax.device_get(_look(*arguments, objective=objective))
    rows = _rows_in_order(len(samples), objective.accumulate)[~samples]
    where = f" of records {some([keys[row] for row in rows])}" if len(rows) else f"; records {some(keys)}"
    if len(rows):
        return f"the prediction{where}, first after {_first_block(objective, arguments)}"
    if bad := [name for name in _terms(finite) if not finite[name]]:
        return f"{bad[0]}{where}"
    if bad := [leaf_path(path) for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if not leaf]:
        return f"the gradient of {_first(bad)}{where}"
    return f"repeated with the parameters of now, it is finite{where}"


@functools.partial(jax.jit, static_argnames="objective")
def _look(state, batch, key, frozen, *, objective: Objective):
    """Whether each leaf of the gradient, each mean, and the diffusion loss of each sample is finite."""
    frozen = frozen.replace(autoencoder=parallel.gather_decoder(frozen.autoencoder))
    loss = functools.partial(losses, objective=objective, weight=state.lpl_weight, variances=state.variances)

    def one(total, rows, key):
        grads, output = jax.grad(loss, has_aux=True)(state.params, rows, key, frozen)
        return jax.tree.map(jnp.add, total, grads), LossOutput(output.means, output.counts, output.samples)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, output = over_parts(one, zeros, batch, key, objective.accumulate)
    samples = output.samples
    assert samples is not None
    return _all_finite(grads), _all_finite(output.means), jnp.isfinite(samples.diffusion)


@dataclasses.dataclass(frozen=True)
class _UpTo:
    """Stands in for a denoiser: its prediction is NaN where its tokens after so many blocks are not finite, else 0."""

    model: Any
    blocks: int

    def apply(self, variables, z_t, *conditions):
        tokens: Any = self.model.apply(variables, z_t, *conditions, stop_after=self.blocks)
        return jnp.where(jnp.isfinite(tokens).all((1, 2)), 0.0, jnp.nan)[:, None, None, None] + jnp.zeros_like(z_t)


def _first_block(objective: Objective, arguments: tuple) -> str:
    """Where in the denoiser it begins, found by halves."""
    model: Any = objective.model
    depth = model.config.depth
    low, high = 0, depth + 1  # finite after `low` blocks, as far as is known; not after `high`
    while high - low > 1:
        middle = (low + high) // 2
        part: Any = _UpTo(model, middle)
        _, _, samples = _look(*arguments, objective=dataclasses.replace(objective, model=part, term=None))
        low, high = (middle, high) if bool(samples.all()) else (low, middle)
    return "the head" if high > depth else f"block {high} of {depth}"


def _terms(finite: Mapping[str, Any]) -> list[str]:
    """Names of metrics in the order in which they are computed, those that are sums of others last."""
    taps = [name for name in finite if name.endswith("/term")]
    sums = ("lpl", "comparison", "loss")
    return ["diffusion_loss", *taps, *(name for name in sums if name in finite)]


def _keys(session: Session, step: int) -> list[str]:
    """Keys of the records of a step's whole batch, in its order."""
    settings = session.experiment
    stream = batches(
        session.store, batch_size=settings.train.batch_size, seed=settings.seed, start_step=step - 1, with_index=True
    )
    return [session.store[int(index)].key for index in next(stream)["index"]]


def _rows_in_order(count: int, parts: int) -> np.ndarray:
    """Rows of a batch in the order in which its parts are computed (`over_parts`)."""
    return np.arange(count).reshape(-1, parts).T.ravel()


def _bad_rows(batch: Mapping[str, jax.Array]) -> tuple[list[str], list[int]] | None:
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(_row_finite, tree))(batch))
    fields = [name for name, rows in finite.items() if not rows.all()]
    return (fields, sorted({int(row) for name in fields for row in np.flatnonzero(~finite[name])})) if fields else None


def _row_finite(rows: jax.Array) -> jax.Array:
    return jnp.isfinite(rows).reshape(len(rows), -1).all(1)


def _bad_leaves(tree) -> list[str]:
    """Paths of the leaves that have a value which is not finite."""
    finite = jax.device_get(_all_finite(tree))
    return [leaf_path(path) for path, leaf in jax.tree_util.tree_leaves_with_path(finite) if not leaf]


@jax.jit
def _all_finite(tree):
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


def _first(names: Sequence[str]) -> str:
    """The first of what is not finite, as all else follows from it, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
