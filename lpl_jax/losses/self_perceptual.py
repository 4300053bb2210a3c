"""The Self-Perceptual loss: a frozen copy of the denoiser compares two noised latents in its own features.

Lin & Yang, "Diffusion Model with Perceptual Loss" (2024), Alg. 1; in the paper (Table 5) on tokens of the image stream
behind block 8, 16 or 28 of 28 of an MMDiT that was trained with the diffusion loss alone.

    z0, noise --add_noise(t')--> r          both estimates --add_noise(t')--> r_hat
    loss = mean of (F(r_hat, t') - F(r, t'))^2
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lpl_jax.diffusion import Paradigm
from lpl_jax.diffusion.paradigms import FlowParadigm
from lpl_jax.errors import InputError

# (params, latents (B, h, w, C), time (B,) as the network is fed it, *conditions) -> tokens (B, ...).
Features = Callable[..., jax.Array]


def block_features(model: nn.Module, block: int) -> Features:
    """The tokens of the image stream of an `MMDiT` behind this block, counted from 1; `depth` is what the head gets."""

    def features(params, latents, time, *conditions):
        return model.apply({"params": params}, latents, time, *conditions, stop_after=block)

    return features


def sample_second_t(paradigm: Paradigm, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw t', independent of the training time: uniform over all indices, or over [0, 1) for flow.

    The loss is defined on discrete times, where training draws uniformly too. Flow draws its training times otherwise
    (heavy tails around the middle); t' is nevertheless uniform there, and moved by `schedule_rescale` as they are.
    """
    if isinstance(paradigm, FlowParadigm):
        paradigm = dataclasses.replace(paradigm, time_sampling="uniform")
    return paradigm.sample_t(key, shape)


def self_perceptual_loss(
    features: Features,
    params: Any,
    paradigm: Paradigm,
    t: jax.Array,
    predicted: tuple[jax.Array, jax.Array],
    actual: tuple[jax.Array, jax.Array],
    conditions: tuple = (),
) -> jax.Array:
    """The loss of every sample, without gate and without training weight.

    Gradients flow to the two estimates, through the activations of the network but not to its weights.

    Where the training time has alpha = 0, z_t is pure noise and z0_hat the network's guess without any input; both
    estimates are finite there in v and flow, and eps, in which z0_hat would divide by alpha, has no such time. Where t'
    has alpha = 0, z0_hat does not enter r_hat and gets no gradient.

    Args:
      features: of the frozen network, see `block_features`.
      params: its weights, those of a network trained with the diffusion loss alone.
      paradigm: gives alpha and sigma at t', and what the network is fed for t'.
      t: t' (B,), from `sample_second_t`; not the time that z_t was drawn at.
      predicted: (z0_hat, eps_hat), each (B, h, w, C), as `paradigm.estimate` returns them.
      actual: (z0, noise), each (B, h, w, C).
      conditions: what the features take after the time: labels, or text tokens and pooled text; as in training.

    Returns:
      (B,) float32.

    Raises:
      InputError: estimates that do not fit the latents.
    """
    if predicted[0].shape != actual[0].shape:
        raise InputError(f"estimates of shape {predicted[0].shape} given, the latents have {actual[0].shape}")
    params, actual, conditions = lax.stop_gradient((params, actual, conditions))
    time = paradigm.time_input(t)

    def tokens(z0, noise):
        return features(params, paradigm.add_noise(z0, noise, t), time, *conditions).astype(jnp.float32)

    # Two calls: in one batched call the backward pass would run over both halves.
    squared = jnp.square(tokens(*predicted) - lax.stop_gradient(tokens(*actual)))
    return jnp.mean(squared, axis=tuple(range(1, squared.ndim)))
