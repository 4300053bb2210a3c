"""Stratified draws, and distributions of the training time of flow matching, t in [0, 1] with t = 1 pure noise."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

FLOW_TIME_SAMPLING = ("mode", "uniform", "logit_normal")
MODE_SCALE_MIN, MODE_SCALE_MAX = -1.0, 2.0 / (math.pi - 2.0)  # mode_time is monotone between these


def stratified_uniform(key: PRNGKeyArray, groups: int, size: int) -> Float32[Array, "draws"]:
    """(groups * size,) float32, uniform in [0, 1); each group has one in every interval [i / size, (i + 1) / size).

    Groups are consecutive and independent of each other; within one the intervals come in random order. A mean over a
    group then varies no more than with independent draws, and much less where the values depend on the number smoothly
    or by a step.
    """
    order, offset = jax.random.split(key)
    intervals = jnp.argsort(jax.random.uniform(order, (groups, size)), axis=1)
    u = (intervals + jax.random.uniform(offset, (groups, size))) / size
    return jnp.minimum(u, 1.0 - 2.0**-24).reshape(-1)  # the division may round up to 1


def mode_time(u: Any, scale: float = 1.29) -> Any:
    """Mode sampling with heavy tails (Esser et al. 2024, "SD3", Sec. 3.1): maps u ~ U(0, 1) to t, decreasing in u.

    Takes numpy or JAX arrays or floats. Symmetric: mode_time(1 - u) = 1 - mode_time(u). Positive scales favour the
    middle, negative ones the ends.
    """
    xp = jnp if isinstance(u, jax.Array) else np
    t = 1.0 - u - scale * (xp.cos(0.5 * math.pi * u) ** 2 - 1.0 + u)
    return xp.clip(t, 0.0, 1.0)  # rounding may leave [0, 1] by an ulp


def sample_flow_time(
    key: PRNGKeyArray, shape: tuple[int, ...], kind: str, *, mode_scale: float, logit_mean: float, logit_std: float
) -> Float32[Array, "..."]:
    """Draw float32 times of the given shape; `kind` is one of FLOW_TIME_SAMPLING."""
    if kind == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * jax.random.normal(key, shape, jnp.float32))
    u = jax.random.uniform(key, shape, jnp.float32)
    return flow_time(u, kind, mode_scale=mode_scale, logit_mean=logit_mean, logit_std=logit_std)


def flow_time(
    u: Float[Array, "*batch"], kind: str, *, mode_scale: float, logit_mean: float, logit_std: float
) -> Float[Array, "*batch"]:
    """The times of uniform numbers u in [0, 1): distributed as those of `sample_flow_time`, and monotone in u."""
    if kind == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * jax.scipy.special.ndtri(u))
    return mode_time(u, mode_scale) if kind == "mode" else u


def flow_time_cdf(t: float, kind: str, *, mode_scale: float, logit_mean: float, logit_std: float) -> float:
    """Probability that `sample_flow_time` draws a value of at most t (host float64)."""
    if t <= 0.0 or t >= 1.0:
        return float(t >= 1.0)
    if kind == "uniform":
        return t
    if kind == "logit_normal":
        return 0.5 * (1.0 + math.erf((math.log(t / (1.0 - t)) - logit_mean) / (logit_std * math.sqrt(2.0))))
    low, high = 0.0, 1.0  # bisect for the u with mode_time(u) = t; the draws below t are those above u
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mode_time(middle, mode_scale) > t else (low, middle)
    return 1.0 - low
