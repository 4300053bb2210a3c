"""The Self-Perceptual loss: a frozen copy of the denoiser compares two noised latents in its own features.

Lin & Yang, "Diffusion Model with Perceptual Loss" (2024), Alg. 1; in the paper (Table 5) on tokens of the image stream
after block 8, 16 or 28 of 28 of an MMDiT that was trained with the diffusion loss alone.

    z0, noise --add_noise(t')--> r          both estimates --add_noise(t')--> r_hat
    loss = mean of (F(r_hat, t') - F(r, t'))^2
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Num, PRNGKeyArray

from lpl_jax.diffusion import Paradigm
from lpl_jax.diffusion.paradigms import FlowParadigm, check_same_shape

# (params, latents (B, h, w, C), time (B,) as the network is fed it, *conditions) -> tokens (B, ...).
Features: TypeAlias = Callable[..., Float[Array, "b ..."]]


def block_features(model: nn.Module, block: int) -> Features:
    """The tokens of the image stream of an `MMDiT` after this block, counted from 1; `depth` is what the head gets."""

    def features(params, latents, time, *conditions) -> Any:
        return model.apply({"params": params}, latents, time, *conditions, stop_after=block)

    return features


def sample_second_t(paradigm: Paradigm, key: PRNGKeyArray, shape: tuple[int, ...]) -> Num[Array, "..."]:
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
    *,
    z0_hat: Float[Array, "b h w c"],
    eps_hat: Float[Array, "b h w c"],
    z0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Num[Array, "b"],
    conditions: tuple = (),
) -> Float32[Array, "b"]:
    """The loss of every sample, without gate and without training weight.

    Gradients flow to the two estimates, through the activations of the network but not to its weights.

    Where the training time has alpha = 0, z_t is pure noise and z0_hat the network's guess without any input; both
    estimates are finite there in v and flow, and eps, in which z0_hat would divide by alpha, has no such time. Where t'
    has alpha = 0, z0_hat does not enter r_hat and gets no gradient.

    Args:
      features: of the frozen network, see `block_features`.
      params: its weights, those of a network trained with the diffusion loss alone.
      paradigm: gives alpha and sigma at t', and what the network is fed for t'.
      z0_hat, eps_hat: both estimates, each (B, h, w, C), as `paradigm.estimate` returns them.
      z0, noise: what they estimate, each (B, h, w, C).
      t: t' (B,), from `sample_second_t`; not the time that z_t was drawn at.
      conditions: what the features take after the time: labels, or text tokens and pooled text; as in training.

    Returns:
      (B,) float32.

    Raises:
      InputError: estimates that do not fit the latents.
    """
    check_same_shape(z0_hat=z0_hat, eps_hat=eps_hat, z0=z0, noise=noise)
    params, z0, noise, conditions = lax.stop_gradient((params, z0, noise, conditions))
    time = paradigm.time_input(t)

    def tokens(z0, noise):
        z_t = paradigm.add_noise(z0=z0, noise=noise, t=t)
        return features(params, z_t, time, *conditions).astype(jnp.float32)

    # Two calls: in one batched call the backward pass would run over both halves.
    squared = jnp.square(tokens(z0_hat, eps_hat) - lax.stop_gradient(tokens(z0, noise)))
    return jnp.mean(squared, axis=tuple(range(1, squared.ndim)))
