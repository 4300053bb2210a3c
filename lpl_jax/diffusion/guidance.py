"""Classifier-free guidance."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from lpl_jax.errors import InputError

Latents: TypeAlias = Float[Array, "b *latent"]
Times: TypeAlias = Num[Array, "b"]


def guided(
    denoise: Callable[[Latents, Times, Any], Latents],
    scale: float,
    *,
    context: PyTree[Array],
    null_context: PyTree[Array],
) -> Callable[[Latents, Times], Latents]:
    """Turn denoise(z, t, context) into the function (z, t) -> guided prediction that `sample` takes.

    D = D_null + scale * (D_cond - D_null), on all channels of the raw network output, float32. Both come from one
    evaluation on a doubled batch. scale 1 means no guidance: one evaluation on the plain batch, `null_context` unused.

    Args:
      denoise: pure function; z (B, ...), t (B,), context with leading axis B -> prediction of z's shape.
      scale: a Python number >= 0, fixed at trace time.
      context, null_context: pytrees of arrays (labels, or tokens and a pooled vector), of equal structure and shapes.

    Raises InputError for a scale that is negative or not finite, or contexts that do not match.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError(f"guidance scale must be a finite number of at least 0 (1 = no guidance), got {scale!r}")
    if scale == 1:
        return lambda z, t: denoise(z, t, context)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (context, null_context)]
    if shapes[0] != shapes[1]:
        raise InputError(f"context and null context must have the same shapes, got {shapes[0]} and {shapes[1]}")

    def denoise_guided(z, t):
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (z, t, context), (z, t, null_context))
        conditional, null = jnp.split(denoise(*both).astype(jnp.float32), 2)
        return null + scale * (conditional - null)

    return denoise_guided


def rescaled_guidance(scale: float, factor: float) -> float:
    """Guidance scale for images whose side is `factor` times as long: 1 + factor * (scale - 1).

    Berrada et al. 2024 (arXiv 2411.03177), Prop. 2: 1.5 at 256 pixels becomes 2.0 at 512.
    """
    return 1.0 + factor * (scale - 1.0)
