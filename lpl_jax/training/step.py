"""One training step: diffusion loss, and the Latent Perceptual Loss on the same prediction (Sec. 3.2 of the paper).

    batch {mean, logvar, label} --sample--> z0 --add_noise(t, noise)--> z_t --model--> prediction D
    diffusion loss: mean of (D - target)^2            z0_hat from z_t, D, t (float32)
    perceptual loss: decoder features of z0_hat and z0 where sigma(t)/alpha(t) <= tau
    loss = diffusion + weight * perceptual --grad--> optimizer --> params, EMAs

The same D feeds both losses: one evaluation of the network, no second forward pass.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import sample_posterior
from lpl_jax.diffusion import Paradigm, loss_weight
from lpl_jax.losses import LPLConfig, gated_perceptual_loss, perceptual_share
from lpl_jax.training.state import TrainState, apply_gradients


@dataclass(frozen=True)
class Objective:
    """What a step minimises. Hashable, so that a jitted step takes it as a static argument.

    Attributes:
      model: the denoiser, a Linen module.
      paradigm: forward process, target and estimate of z0.
      resolution: side of the images in pixels; scales the perceptual loss's threshold.
      null_label: the label that stands for "no condition".
      label_dropout: probability of training without the condition, for classifier-free guidance.
      weighting, gamma: weight of the diffusion loss over t, see `lpl_jax.diffusion.loss_weight`.
      lpl: the perceptual loss; None trains with the diffusion loss alone.
      capacity: how many images of the batch are decoded at the most; None decodes all and masks.
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


def losses(
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    autoencoder: Autoencoder,
    lpl_weight: jax.Array,
    objective: Objective,
    *,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss of one batch and its metrics.

    Args:
      params: of `objective.model`.
      batch: mean and logvar (B, h, w, C), raw moments of the encoder's posterior; label (B,) int32.
      key: every draw comes from it: posterior sample, t, noise, dropped labels, which images are decoded.
      autoencoder: frozen; decodes for the perceptual loss and knows the latents' scale.
      lpl_weight: scalar weight of the perceptual loss.
      t: (B,) in the paradigm's unit, and noise: (B, h, w, C); given by tests that need fixed inputs.
    Returns:
      scalar float32, and scalars: loss, diffusion_loss and, with a perceptual loss, its value (`lpl`), its share of the
      total and everything that `gated_perceptual_loss` reports, under `lpl/`.
    """
    paradigm = objective.paradigm
    latent_key, t_key, noise_key, drop_key, gate_key = jax.random.split(key, 5)
    z0 = autoencoder.scale(sample_posterior(latent_key, batch["mean"], batch["logvar"]))
    t = paradigm.sample_t(t_key, z0.shape[:1]) if t is None else t
    noise = jax.random.normal(noise_key, z0.shape) if noise is None else noise
    dropped = jax.random.bernoulli(drop_key, objective.label_dropout, z0.shape[:1])
    labels = jnp.where(dropped, objective.null_label, batch["label"])

    z_t = paradigm.add_noise(z0, noise, t)
    prediction = objective.model.apply({"params": params}, z_t, paradigm.time_input(t), labels)
    squared = jnp.square(prediction.astype(jnp.float32) - paradigm.target(z0, noise, t)).mean((1, 2, 3))
    weight = loss_weight(paradigm, t, objective.weighting, gamma=objective.gamma)
    diffusion = jnp.mean(weight * squared)
    if objective.lpl is None:
        return diffusion, {"loss": diffusion, "diffusion_loss": diffusion}

    z0_hat, _ = paradigm.estimate(z_t, prediction, t)
    alpha, sigma = paradigm.alpha_sigma(t)
    perceptual, details = gated_perceptual_loss(
        autoencoder,
        z0_hat,
        z0,
        alpha,
        sigma,
        gate_key,
        objective.lpl,
        resolution=objective.resolution,
        capacity=objective.capacity,
        sample_weight=(
            loss_weight(paradigm, t, "min_snr", gamma=objective.gamma)
            if objective.lpl.extra_weight == "min_snr"
            else None
        ),
    )
    total = diffusion + lpl_weight * perceptual
    share = perceptual_share(diffusion, perceptual, lpl_weight)
    metrics = {"loss": total, "diffusion_loss": diffusion, "lpl": perceptual, "lpl_share": share}
    return total, metrics | {f"lpl/{name}": value for name, value in details.items()}


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    seed_key: jax.Array,
    autoencoder: Autoencoder,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_start: int = 0,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of parameters, optimizer state and EMAs. Pure; jit it once with the keyword arguments bound.

    Every random draw comes from `fold_in(seed_key, state.step)`: a run that is stopped and resumed draws the same.
    Arguments as in `losses`. The metrics also hold the norms of gradient and parameters.
    """
    key = jax.random.fold_in(seed_key, state.step)
    gradient = jax.grad(losses, has_aux=True)
    grads, metrics = gradient(state.params, batch, key, autoencoder, state.lpl_weight, objective, t=t, noise=noise)
    state, norms = apply_gradients(state, grads, optimizer, ema_start=ema_start)
    return state, metrics | norms
