"""What a step takes and returns: all that changes while training, and the frozen networks, each as one pytree."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError
from lpl_jax.losses import LossVariances, init_variances
from lpl_jax.parallel import leaf_path, param_sharding
from lpl_jax.text import TextConditioner
from lpl_jax.training.ema import init_emas, update_emas


class TrainState(flax.struct.PyTreeNode):
    """step: int32 scalar, number of updates. params: float32. emas: averages of the parameters by name ("0.9999").

    opt_state: of the optimizer. lpl_weight: float32 scalar, the weight of the term beside the diffusion loss; NaN until
    `with_weight` sets it, before the first step that has the term. variances: of the losses, where the re-weighting of
    Eq. 15 needs them.
    """

    step: jax.Array
    params: Any
    emas: dict[str, Any]
    opt_state: Any
    lpl_weight: jax.Array
    variances: LossVariances | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether the weight has been set (on the host: waits for the state)."""
        return not math.isnan(float(self.lpl_weight))

    def with_weight(self, weight: float) -> "TrainState":
        """The state with this weight of the term, laid out as before."""
        put = jax.jit(lambda value: value, out_shardings=self.lpl_weight.sharding)
        return self.replace(lpl_weight=put(np.float32(weight)))


class Frozen(flax.struct.PyTreeNode):
    """The networks that a step uses and never changes. A pytree: an argument of jitted functions, never a constant.

    autoencoder: decodes, and knows the latents' scale. network: of a comparison loss, `LatentLPIPS` or parameters of
    the model. text: the tower of a model that is conditioned on prompts.
    """

    autoencoder: Autoencoder
    network: Any = None
    text: TextConditioner | None = None


def _builder(init_params_fn, optimizer, ema_decays, lpl_weight, with_variances):
    def build(key) -> TrainState:
        params = init_params_fn(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            emas=init_emas(params, ema_decays),
            opt_state=optimizer.init(params),
            lpl_weight=jnp.asarray(lpl_weight, jnp.float32),
            variances=init_variances() if with_variances else None,
        )

    return build


def _with_sharding(shapes, shardings):
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def abstract_state(
    init_params_fn: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    ema_decays: Sequence[float],
    mesh: Mesh,
    key,
    *,
    with_variances: bool = False,
) -> TrainState:
    """What `create_state` would return, as ShapeDtypeStructs with their shardings: what to restore a checkpoint into.

    Raises InputError where a parameter is not float32.
    """
    shapes = jax.eval_shape(_builder(init_params_fn, optimizer, ema_decays, 0.0, with_variances), key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params):
        if leaf.dtype != jnp.float32:
            raise InputError(f"parameter {leaf_path(path)} is {leaf.dtype}; parameters are kept in float32")
    return _with_sharding(shapes, param_sharding(shapes, mesh))


def create_state(
    init_params_fn: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    ema_decays: Sequence[float],
    mesh: Mesh,
    key,
    *,
    lpl_weight: float = math.nan,
    with_variances: bool = False,
) -> TrainState:
    """Initial state, created in place: no device ever holds more than its own part of it.

    init_params_fn: pure function of `key` that returns the parameters. To begin from parameters that exist already
    (another run's), give them as `key` and the identity as the function; the state may then share their memory, so
    they are gone once it is donated.
    ema_decays: one average each; all start as the parameters.
    lpl_weight: NaN leaves it to be calibrated.
    with_variances: whether the state keeps the variances of the losses.
    The values do not depend on the mesh.
    """
    target = abstract_state(init_params_fn, optimizer, ema_decays, mesh, key, with_variances=with_variances)
    build = _builder(init_params_fn, optimizer, ema_decays, lpl_weight, with_variances)
    return jax.jit(build, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(key)


def apply_gradients(
    state: TrainState,
    gradients,
    optimizer: optax.GradientTransformation,
    *,
    loss: jax.Array | float = 0.0,
    variances: LossVariances | None = None,
    ema_start: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """State after one update, and the norms of the gradient (before clipping) and of the parameters as metrics.

    A loss or a gradient that is not finite changes nothing but the step: the state is chosen leaf by leaf in the pass
    that updates it, which costs no memory and no reading of its own. The metric `nonfinite` is then 1, else 0.

    loss: scalar. variances: updated with this step, of Eq. 15. ema_start: the averages equal the parameters up to this
    step, and average after it.
    """
    grad_norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    new = state.replace(
        params=params,
        emas=update_emas(state.emas, params, step, ema_start),
        opt_state=opt_state,
        variances=variances,
    )
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state).replace(step=step)
    norms = {"grad_norm": grad_norm, "param_norm": optax.global_norm(new.params)}
    return new, norms | {"nonfinite": 1.0 - finite.astype(jnp.float32)}
