"""What a run starts with: its first state, the weight of its perceptual loss, the frozen network of a comparison."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from lpl_jax import denoisers, parallel
from lpl_jax.denoisers.weights import load_params
from lpl_jax.errors import InputError
from lpl_jax.experiment.build import Experiment
from lpl_jax.io.hub import is_hub_id
from lpl_jax.io.paths import AnyPath, to_path
from lpl_jax.io.progress import progress_bar
from lpl_jax.losses import latent_lpips_weights
from lpl_jax.runs import checkpoints, open_run
from lpl_jax.runs.workdir import CHECKPOINTS, run_folder
from lpl_jax.training.accumulate import over_parts
from lpl_jax.training.objective import Objective
from lpl_jax.training.state import Frozen, TrainState, abstract_state, create_state
from lpl_jax.training.step import losses


def first_state(experiment: Experiment, optimizer, mesh: Mesh, workdir: AnyPath) -> TrainState:
    """Restored from the newest checkpoint, started from another run's parameters or from weights in files, or fresh."""
    init = functools.partial(denoisers.init, experiment.model)
    key = jax.random.key(experiment.seed)
    decays, comparison = experiment.ema.decays, experiment.comparison
    options = dict(with_variances=comparison is not None and comparison.kind == "reweighting")
    target = abstract_state(init, optimizer, decays, mesh, key, **options)
    check_memory(target)
    if checkpoints.latest_step(workdir / CHECKPOINTS) is not None:
        if experiment.checkpoint.on_damage == "previous":
            checkpoints.set_damaged_aside(workdir / CHECKPOINTS, functools.partial(print, flush=True))
        return checkpoints.restore(workdir / CHECKPOINTS, target)
    if experiment.train.init_from is None:
        return create_state(init, optimizer, decays, mesh, key, **options)
    params = _starting_params(experiment, target.params)
    return create_state(lambda given: given, optimizer, decays, mesh, params, **options)


def check_memory(state: TrainState) -> None:
    """Raises InputError where a state, of ShapeDtypeStructs with shardings, takes more memory than a device has."""
    leaves = jax.tree.leaves(state)
    needed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    if (there := parallel.device_memory()) is not None and needed > there:
        raise InputError(
            f"the parameters, their moments and averages take {needed / 2**30:,.1f} GiB of each device, which has "
            f"{there / 2**30:,.1f} GiB: make the model smaller (model.hidden, model.depth), or split it over more "
            "devices (mesh.fsdp)"
        )


def _starting_params(experiment: Experiment, target):
    """Those that `train.init_from` names."""
    settings = experiment.train
    assert settings.init_from is not None
    weights, step = settings.init_weights, settings.init_step
    return _params_of(experiment, settings.init_from, target, "train.init_from", weights=weights, step=step)


def _params_of(
    experiment: Experiment, source: str, target, field: str, *, weights: str = "params", step: int | None = None
):
    """Parameters of a run, or of what `denoisers.load` takes, laid out as the target; `field` is named in errors."""
    folder = None if is_hub_id(source) else to_path(source, field, remote=("gs",))
    if folder is not None and (folder / CHECKPOINTS).is_dir():
        return open_run(folder).params(weights=weights, step=step, target=target)
    try:
        params = load_params(experiment.model, source)
    except InputError as error:
        reason = "not the folder of a run with checkpoints, nor weights to start from"
        raise InputError(f"{field}={source}: {reason}: {error}") from error
    if weights != "params":
        raise InputError(f"train.init_weights={weights!r}, but {source} is no run and has one set of weights: 'params'")
    if step is not None:
        raise InputError(f"train.init_step={step}, but {source} is no run: it has no checkpoints to choose from")
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, target))


def comparison_network(experiment: Experiment, state: TrainState, mesh: Mesh) -> Any:
    """The frozen network that a comparison loss needs, on the devices; None where it needs none.

    Raises:
      InputError: weights that are missing or do not fit.
    """
    config = experiment.comparison
    if config is None or config.kind == "reweighting":
        return None
    if config.kind == "latent_lpips":
        assert config.network is not None  # `ComparisonConfig.check`
        return parallel.put_replicated(latent_lpips_weights.load(config.network), mesh)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.params
    )
    if config.network is not None:
        return _params_of(experiment, config.network, target, "comparison.network")
    if experiment.train.init_from is None:
        raise InputError(
            "comparison.kind='self_perceptual' needs a trained denoiser: give comparison.network or train.init_from"
        )
    return _starting_params(experiment, target)


def weight_of(source: str) -> float:
    """The weight of LPL that a run was calibrated to. Raises InputError where it is no run, or has no weight yet."""
    folder = run_folder(source, "train.weight_from")
    if checkpoints.latest_step(folder / CHECKPOINTS) is None:
        raise InputError(f"train.weight_from={source}: no run with a checkpoint is there; train it first")
    weight = checkpoints.load_weight(folder / CHECKPOINTS)
    if open_run(folder).experiment.lpl is None or not math.isfinite(weight):
        raise InputError(f"train.weight_from={source}: that run has no weight of LPL at its newest checkpoint")
    return weight


def check_start(experiment: Experiment) -> float | None:
    """The weight that a new run takes from another one, which has to be there now; None: it takes none.

    Raises InputError also where it would calibrate the weight of its term on a network that was never trained: both
    losses of such a network say nothing of those that the weight is for.
    """
    for name, part in (("lpl", experiment.lpl), ("comparison", experiment.comparison)):
        # The re-weighting of Eq. 15 takes LPL's weight and has none of its own.
        if part is None or part.weight is not None or getattr(part, "kind", None) == "reweighting":
            continue
        if name == "lpl" and experiment.train.weight_from is not None:
            return weight_of(experiment.train.weight_from)
        if experiment.train.init_from is None and experiment.loss.lpl_start == 0:
            others = " or train.weight_from" if name == "lpl" else ""
            raise InputError(
                f"{name}.weight would be calibrated on a network that is not trained: start from one that is "
                f"(train.init_from), begin later (loss.lpl_start), or give {name}.weight{others}"
            )
    return None


def term_weight(
    objective: Objective, state: TrainState, frozen: Frozen, stream: Iterator, *, experiment: Experiment, mesh: Mesh
) -> float:
    """The weight of the objective's term: as given, or calibrated on `loss.calibration_batches` batches of the stream.

    With `train.weight_from` it is the one that another run was calibrated to.

    It is asked for when the term begins, as `loss.lpl_start` says, of the network as it then is.

    LPL's makes it `target_share` of the total loss, a comparison's gives it `variance_share` of the diffusion loss's
    variance over samples (App. A.4). Eq. 15 takes the weight that LPL would have. 0 without a term.
    """
    term = objective.term
    if term is None:
        return 0.0
    if term.config.weight is not None:
        return term.config.weight
    if experiment.train.weight_from is not None:
        return weight_of(experiment.train.weight_from)
    measured = dataclasses.replace(objective, term=term.measured)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def measure(params, batch, key, frozen):
        frozen = frozen.replace(autoencoder=parallel.gather_decoder(frozen.autoencoder))

        def one(carry, rows, key):
            return carry, losses(params, rows, key, frozen, objective=measured)[1]

        return over_parts(one, (), batch, key, objective.accumulate)[1]

    # Draws of the calibration are no step's draws: steps fold in numbers from 0 up.
    key = jax.random.fold_in(jax.random.key(experiment.seed), 2**31)
    rounds = progress_bar(
        range(experiment.loss.calibration_batches),
        desc="calibrate the weight",
        leave=False,
        disable=jax.process_index() != 0,
    )
    outputs = [
        measure(state.params, parallel.put_batch(next(stream), mesh), jax.random.fold_in(key, index), frozen)
        for index in rounds
    ]
    return term.calibrate(jax.device_get(outputs))
