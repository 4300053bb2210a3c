"""What a run starts with: its first state, the weight of its perceptual loss, the frozen network of a comparison."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lpl_jax import denoisers, parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.denoisers.weights import load_params
from lpl_jax.errors import InputError
from lpl_jax.experiment.build import Experiment
from lpl_jax.io.hub import is_hub_id
from lpl_jax.io.paths import AnyPath
from lpl_jax.losses import calibrate_weight, calibrate_weight_by_variance, latent_lpips_weights
from lpl_jax.runs import checkpoints
from lpl_jax.runs.workdir import CHECKPOINTS, run_folder
from lpl_jax.text import TextConditioner
from lpl_jax.training.accumulate import BY_SAMPLE, over_parts
from lpl_jax.training.state import TrainState, abstract_state, create_state
from lpl_jax.training.step import Objective, losses


def first_state(experiment: Experiment, optimizer, mesh: Mesh, workdir: AnyPath) -> TrainState:
    """Restored from the newest checkpoint, started from another run's parameters or from weights in files, or fresh."""
    init = functools.partial(denoisers.init, experiment.model)
    key = jax.random.key(experiment.seed)
    decays, comparison = experiment.ema.decays, experiment.comparison
    options = dict(with_variances=comparison is not None and comparison.kind == "reweighting")
    target = abstract_state(init, optimizer, decays, mesh, key, **options)
    if checkpoints.latest_step(workdir / CHECKPOINTS) is not None:
        return checkpoints.restore(workdir / CHECKPOINTS, target)
    if experiment.train.init_from is None:
        return create_state(init, optimizer, decays, mesh, key, **options)
    params = _starting_params(experiment, target.params)
    return create_state(lambda given: given, optimizer, decays, mesh, params, **options)


def _starting_params(experiment: Experiment, target):
    """Those that `train.init_from` names."""
    settings = experiment.train
    return _params_of(experiment, settings.init_from, settings.init_weights, target, "train.init_from")


def _params_of(experiment: Experiment, source: str, weights: str, target, field: str):
    """Parameters of a run, or of what `denoisers.load` takes, laid out as the target; `field` is named in errors."""
    folder = None if is_hub_id(source) else run_folder(source, field) / CHECKPOINTS
    if folder is not None and folder.is_dir():
        return checkpoints.load_params(folder, weights, target=target)
    try:
        params = load_params(experiment.model, source)
    except InputError as error:
        reason = "not the folder of a run with checkpoints, nor weights to start from"
        raise InputError(f"{field}={source}: {reason}: {error}") from error
    if weights != "params":
        raise InputError(f"train.init_weights={weights!r}, but {source} is no run and has one set of weights: 'params'")
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
        return parallel.put_replicated(latent_lpips_weights.load(config.network), mesh)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.params
    )
    if config.network is not None:
        return _params_of(experiment, config.network, "params", target, "comparison.network")
    if experiment.train.init_from is None:
        raise InputError(
            "comparison.kind='self_perceptual' needs a trained denoiser: give comparison.network or train.init_from"
        )
    return _starting_params(experiment, target)


def perceptual_weight(
    experiment: Experiment,
    objective: Objective,
    state: TrainState,
    autoencoder: Autoencoder,
    network: Any,
    text: TextConditioner | None,
    stream: Iterator,
    mesh: Mesh,
):
    """The given weight of LPL or of the comparison loss, or a calibrated one (App. A.4), for `TrainState.lpl_weight`.

    LPL's makes it `target_share` of the total loss, a comparison's gives it `variance_share` of the diffusion loss's
    variance over samples. Eq. 15 takes the weight that LPL would have.
    """
    comparison, lpl = objective.comparison, objective.lpl
    if lpl is None and comparison is None:
        return state.lpl_weight
    config = comparison if lpl is None else lpl
    if config.weight is not None:
        return state.lpl_weight + config.weight
    if lpl is not None:
        objective = dataclasses.replace(objective, comparison=None)

    @jax.jit
    def measure(params, batch, key, autoencoder, weight, network, text):
        whole = parallel.whole_decoder(autoencoder)

        def one(carry, rows, key):
            return carry, losses(params, rows, key, whole, weight, objective, network=network, text=text)[1]

        return over_parts(one, (), batch, key, objective.accumulate)

    # Draws of the calibration are no step's draws: steps fold in numbers from 0 up.
    key = jax.random.fold_in(jax.random.key(experiment.seed), 2**31)
    diffusion, perceptual = [], []
    silent = jax.process_index() != 0
    rounds = range(experiment.loss.calibration_batches)
    for index in tqdm(rounds, desc="calibrate the weight", leave=False, disable=silent):
        batch = parallel.put_batch(next(stream), mesh)
        key_of_batch = jax.random.fold_in(key, index)
        _, metrics = measure(state.params, batch, key_of_batch, autoencoder, state.lpl_weight, network, text)
        if lpl is not None:
            diffusion.append(metrics["diffusion_loss"])
            perceptual.append(metrics["lpl"])
        else:
            samples = jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))(metrics[BY_SAMPLE])
            losses_of_samples, values, active = jax.device_get(samples)
            diffusion.extend(losses_of_samples)
            perceptual.extend(values[active])
    diffusion, perceptual = np.array(jax.device_get(diffusion)), np.array(jax.device_get(perceptual))
    if lpl is not None:
        return state.lpl_weight + calibrate_weight(diffusion, perceptual, lpl.target_share)
    return state.lpl_weight + calibrate_weight_by_variance(diffusion, perceptual, comparison.variance_share)
