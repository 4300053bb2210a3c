"""Distributions of the training time of flow matching, t in [0, 1] with t = 1 pure noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np

FLOW_TIME_SAMPLING = ("mode", "uniform", "logit_normal")
MODE_SCALE_MIN, MODE_SCALE_MAX = -1.0, 2.0 / (math.pi - 2.0)  # mode_time is monotone between these


def mode_time(u, scale: float = 1.29):
    """Mode sampling with heavy tails (Esser et al. 2024, "SD3", Sec. 3.1): maps u ~ U(0, 1) to t, decreasing in u.

    Symmetric: mode_time(1 - u) = 1 - mode_time(u). Positive scales favour the middle, negative ones the ends.
    """
    xp = jnp if isinstance(u, jax.Array) else np
    t = 1.0 - u - scale * (xp.cos(0.5 * math.pi * u) ** 2 - 1.0 + u)
    return xp.clip(t, 0.0, 1.0)  # rounding may leave [0, 1] by an ulp


def sample_flow_time(key, shape, kind: str, *, mode_scale: float, logit_mean: float, logit_std: float) -> jax.Array:
    """Draw float32 times of the given shape; `kind` is one of FLOW_TIME_SAMPLING."""
    if kind == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * jax.random.normal(key, shape, jnp.float32))
    u = jax.random.uniform(key, shape, jnp.float32)
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
