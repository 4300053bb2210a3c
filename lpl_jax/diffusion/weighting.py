"""Weights of the diffusion loss over time."""

import jax.numpy as jnp

from lpl_jax.diffusion.paradigms import Paradigm, PerTime, Times
from lpl_jax.errors import InputError

LOSS_WEIGHTS = ("none", "min_snr")


def loss_weight(paradigm: Paradigm, t: Times, kind: str = "none", gamma: float = 5.0) -> PerTime:
    """Weight of the squared error of the prediction at each t, float32 of t's shape.

    "min_snr" (Hang et al. 2023) gives the squared error of z0_hat the weight min(SNR, gamma), SNR = (alpha / sigma)^2.
    An error e of the prediction is an error sigma / det * e of z0_hat (see `paradigms`), so that in every paradigm

        weight = min(SNR, gamma) * (sigma / det)^2 = min(alpha^2, gamma * sigma^2) / det^2

    eps: min(SNR, gamma) / SNR;  v: min(SNR, gamma) / (SNR + 1);  flow: min((1 - t)^2, gamma * t^2). The last form
    has no SNR in it, so it is finite where the SNR is 0 or infinite.

    Raises InputError for an unknown kind or a gamma that is not positive.
    """
    alpha, sigma = paradigm.alpha_sigma(t)
    if kind == "none":
        return jnp.ones_like(alpha)
    if kind != "min_snr":
        raise InputError(f"loss weight must be one of {', '.join(LOSS_WEIGHTS)}, got {kind!r}")
    if not gamma > 0:
        raise InputError(f"gamma of min_snr must be positive, got {gamma!r}")
    p, q = paradigm.combination(alpha=alpha, sigma=sigma)
    return jnp.minimum(alpha**2, gamma * sigma**2) / (alpha * p + sigma * q) ** 2
