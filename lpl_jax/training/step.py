"""One training step: diffusion loss, and the Latent Perceptual Loss on the same prediction (Sec. 3.2 of the paper).

    batch {mean, logvar, label | tokens} --sample--> z0 --add_noise(t, noise)--> z_t --model--> prediction D
    diffusion loss: mean of (D - target)^2            z0_hat from z_t, D, t (float32)
    perceptual loss: decoder features of z0_hat and z0 where sigma(t)/alpha(t) <= tau
    loss = diffusion + weight * perceptual --grad--> optimizer --> params, EMAs

The same D feeds both losses: one evaluation of the network, no second forward pass.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import sample_posterior
from lpl_jax.diffusion import Paradigm, loss_weight
from lpl_jax.diffusion.timesteps import stratified_uniform
from lpl_jax.losses import (
    ComparisonConfig,
    LossVariances,
    LPLConfig,
    active_samples,
    block_features,
    comparison_losses,
    gated_perceptual_loss,
    latent_perceptual_loss,
    perceptual_share,
    reweighted,
    update_variances,
)
from lpl_jax.parallel import constrain_params, gather_decoder
from lpl_jax.text import TextConditioner
from lpl_jax.training.accumulate import BY_SAMPLE, over_parts
from lpl_jax.training.state import TrainState, apply_gradients


@dataclass(frozen=True)
class Objective:
    """What a step minimises. Hashable, so that a jitted step takes it as a static argument.

    Attributes:
      model: the denoiser, a Linen module.
      paradigm: forward process, target and estimate of z0.
      resolution: side of the images in pixels; scales the perceptual loss's threshold.
      null_label: the label that stands for "no condition".
      label_dropout: probability of training without the condition (class or prompt), for classifier-free guidance.
      weighting, gamma: weight of the diffusion loss over t, see `lpl_jax.diffusion.loss_weight`.
      lpl: the perceptual loss; None trains with the diffusion loss alone.
      accumulate: number of equal parts that a batch is taken in, one after another.
      capacity: how many images of a part are decoded at the most; None decodes all and masks.
      groups, chunk: of a part in the draw of these, and images decoded at a time; see `gated_perceptual_loss`.
      stratified_t: timesteps are spread evenly over their distribution within each of the groups.
      lpl_start: the perceptual loss counts from this step on.
      comparison: one of the paper's comparison losses; "reweighting" takes what it needs of `lpl`, others exclude it.
    """

    model: nn.Module
    paradigm: Paradigm
    resolution: int
    null_label: int
    label_dropout: float = 0.1
    weighting: str = "none"
    gamma: float = 5.0
    lpl: LPLConfig | None = None
    capacity: int | None = None
    groups: int | None = None
    chunk: int | None = None
    stratified_t: bool = False
    lpl_start: int = 0
    comparison: ComparisonConfig | None = None
    accumulate: int = 1


def losses(
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    autoencoder: Autoencoder,
    lpl_weight: jax.Array,
    objective: Objective,
    *,
    network: Any = None,
    text: TextConditioner | None = None,
    variances: LossVariances | None = None,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Total loss of one batch and its metrics.

    Args:
      params: of `objective.model`.
      batch: mean and logvar (B, h, w, C), raw moments of the encoder's posterior; label (B,) int32, or tokens and what
        else `text` takes; control (B, 4), original sizes and crops, where the model is conditioned on them.
      key: every draw comes from it: posterior sample, t, noise, dropped conditions, which images are decoded.
      autoencoder: frozen; decodes for the perceptual loss and knows the latents' scale.
      lpl_weight: scalar weight of the perceptual loss, or of the comparison loss.
      network: frozen, of the comparison loss: `LatentLPIPS`, or parameters of the model.
      text: frozen text tower of a model that is conditioned on prompts.
      variances: of the losses so far, for the re-weighting of Eq. 15.
      t: (B,) in the paradigm's unit, and noise: (B, h, w, C); given by tests that need fixed inputs.
    Returns:
      scalar float32, and scalars: loss, diffusion_loss and, with a perceptual loss, its value (`lpl`), its share of the
      total and everything that `gated_perceptual_loss` reports, under `lpl/`; with a comparison loss `comparison`, its
      share, and under "samples" the losses of the single samples; with re-weighting the updated "variances".
    """
    paradigm = objective.paradigm
    latent_key, t_key, noise_key, drop_key, gate_key = jax.random.split(key, 5)
    z0 = autoencoder.scale(sample_posterior(latent_key, mean=batch["mean"], logvar=batch["logvar"]))
    t = _times(t_key, len(z0), objective) if t is None else t
    noise = jax.random.normal(noise_key, z0.shape) if noise is None else noise
    conditions = _conditions(batch, drop_key, objective, text)

    z_t = paradigm.add_noise(z0=z0, noise=noise, t=t)
    prediction = objective.model.apply({"params": params}, z_t, paradigm.time_input(t), *conditions)
    target = paradigm.target(z0=z0, noise=noise, t=t)
    squared = jnp.square(prediction.astype(jnp.float32) - target).mean((1, 2, 3))
    weight = loss_weight(paradigm, t, objective.weighting, gamma=objective.gamma)
    diffusion = jnp.mean(weight * squared)
    if objective.lpl is None and objective.comparison is None:
        return diffusion, {"loss": diffusion, "diffusion_loss": diffusion}
    z0_hat, eps_hat = paradigm.estimate(z_t=z_t, prediction=prediction, t=t)
    step = _Prediction(z0, noise, t, z0_hat, eps_hat, weight * squared, conditions)
    if objective.comparison is None:
        return _with_lpl(diffusion, step, gate_key, autoencoder, lpl_weight, objective)
    if objective.comparison.kind == "reweighting":
        return _reweighted(diffusion, step, autoencoder, lpl_weight, objective, variances)
    return _with_comparison(diffusion, step, gate_key, network, lpl_weight, objective)


def _conditions(batch, key, objective: Objective, text: TextConditioner | None) -> tuple:
    """What the model takes behind the time: context, pooled text or None, size and crop or None."""
    dropped = jax.random.bernoulli(key, objective.label_dropout, batch["mean"].shape[:1])
    if text is None:
        condition = jnp.where(dropped, objective.null_label, batch["label"]), None
    else:
        condition = text(batch, dropped, jax.random.fold_in(key, 1))
    return (*condition, batch.get("control"))


def _times(key, batch: int, objective: Objective):
    paradigm = objective.paradigm
    if not objective.stratified_t:
        return paradigm.sample_t(key, (batch,))
    groups = parallel.context_shards() if objective.groups is None else objective.groups
    return paradigm.time_of(stratified_uniform(key, groups, batch // groups))


class _Prediction(NamedTuple):
    """What the terms beside the diffusion loss are computed from; losses: weighted diffusion loss by sample, (B,)."""

    z0: jax.Array
    noise: jax.Array
    t: jax.Array
    z0_hat: jax.Array
    eps_hat: jax.Array
    losses: jax.Array
    conditions: tuple


def _with_lpl(diffusion, step: _Prediction, key, autoencoder, lpl_weight, objective: Objective):
    paradigm = objective.paradigm
    alpha, sigma = paradigm.alpha_sigma(step.t)
    min_snr = objective.lpl.extra_weight == "min_snr"
    perceptual, details = gated_perceptual_loss(
        autoencoder,
        objective.lpl,
        z0_hat=step.z0_hat,
        z0=step.z0,
        alpha=alpha,
        sigma=sigma,
        key=key,
        resolution=objective.resolution,
        capacity=objective.capacity,
        groups=objective.groups,
        chunk=objective.chunk,
        sample_weight=loss_weight(paradigm, step.t, "min_snr", gamma=objective.gamma) if min_snr else None,
    )
    total = diffusion + lpl_weight * perceptual
    share = perceptual_share(diffusion_loss=diffusion, perceptual_loss=perceptual, weight=lpl_weight)
    metrics = {"loss": total, "diffusion_loss": diffusion, "lpl": perceptual, "lpl_share": share}
    return total, metrics | {f"lpl/{name}": value for name, value in details.items()}


def _with_comparison(diffusion, step: _Prediction, key, network, weight, objective: Objective):
    config, paradigm = objective.comparison, objective.paradigm
    alpha, sigma = paradigm.alpha_sigma(step.t)
    values, active = comparison_losses(
        config,
        network,
        paradigm,
        z0_hat=step.z0_hat,
        eps_hat=step.eps_hat,
        z0=step.z0,
        noise=step.noise,
        alpha=alpha,
        sigma=sigma,
        key=key,
        resolution=objective.resolution,
        features=block_features(objective.model, config.block) if config.block else None,
        conditions=step.conditions,
    )
    comparison = jnp.mean(values)
    total = diffusion + weight * comparison
    share = perceptual_share(diffusion_loss=diffusion, perceptual_loss=comparison, weight=weight)
    metrics = {"loss": total, "diffusion_loss": diffusion, "comparison": comparison, "comparison_share": share}
    return total, metrics | {"samples": (step.losses, values, active)}


def _reweighted(diffusion, step: _Prediction, autoencoder, weight, objective: Objective, variances: LossVariances):
    """Eq. 15: LPL is only measured, of every sample under its threshold."""
    alpha, sigma = objective.paradigm.alpha_sigma(step.t)
    active = active_samples(objective.lpl, alpha=alpha, sigma=sigma, resolution=objective.resolution)
    estimate = jax.lax.stop_gradient(jnp.where(active[:, None, None, None], step.z0_hat, step.z0))
    perceptual, _ = latent_perceptual_loss(
        autoencoder, objective.lpl, z0_hat=estimate, z0=step.z0, chunk=objective.chunk
    )
    variances = update_variances(variances, diffusion_losses=step.losses, perceptual_losses=perceptual, active=active)
    weighted = reweighted(
        diffusion_losses=step.losses,
        active=active,
        weight_lpl=weight,
        var_lpl=variances.perceptual,
        var_l2=variances.diffusion,
    )
    total = jnp.mean(weighted)
    metrics = {"loss": total, "diffusion_loss": diffusion, "lpl": jnp.mean(jnp.where(active, perceptual, 0.0))}
    return total, metrics | {"variances": variances}


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    seed_key: jax.Array,
    autoencoder: Autoencoder,
    network: Any = None,
    text: TextConditioner | None = None,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_start: int = 0,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of parameters, optimizer state and EMAs. Pure; jit it once with the keyword arguments bound.

    Every random draw comes from `fold_in(seed_key, state.step)`: a run that is stopped and resumed draws the same.
    Arguments as in `losses`. The metrics also hold the norms of gradient and parameters. With several parts of a batch
    the gradient is summed in float32, and the variances of Eq. 15 are updated by each part.
    """
    autoencoder = gather_decoder(autoencoder)
    key = jax.random.fold_in(seed_key, state.step)
    gradient = jax.grad(losses, has_aux=True)
    weight = jnp.where(state.step >= objective.lpl_start, state.lpl_weight, 0.0)

    def add_part(carry, rows, key):
        total, variances = carry
        batch, fixed = rows
        given = dict(network=network, text=text, variances=variances, **fixed)
        grads, metrics = gradient(state.params, batch, key, autoencoder, weight, objective, **given)
        metrics.pop(BY_SAMPLE, None)
        variances = metrics.pop("variances", variances)
        return (grads if total is None else jax.tree.map(jnp.add, total, grads), variances), metrics

    # Sums lie where the parameters do, so that no device ever holds a whole gradient.
    zeros = None if objective.accumulate == 1 else constrain_params(jax.tree.map(jnp.zeros_like, state.params))
    rows = batch, dict(t=t, noise=noise)
    (grads, variances), metrics = over_parts(add_part, (zeros, state.variances), rows, key, objective.accumulate)
    grads = jax.tree.map(lambda total: total / objective.accumulate, grads)
    state = state.replace(variances=variances)
    state, norms = apply_gradients(state, grads, optimizer, ema_start=ema_start)
    return state, metrics | norms
