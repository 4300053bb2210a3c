"""Noise schedules, in float64 on the host: they become small constant tables of a jitted program.

Notation: z_t = alpha_t * z0 + sigma_t * noise; for the discrete schedules alpha_bar = alpha**2 = 1 - sigma**2.
"""

import functools
from typing import TypeVar

import jax
import numpy as np

Time = TypeVar("Time", float, np.ndarray, jax.Array)


def scaled_linear_betas(train_steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Betas whose square roots are equally spaced, the schedule of latent diffusion (float64, shape (train_steps,))."""
    return np.linspace(start**0.5, end**0.5, train_steps, dtype=np.float64) ** 2


def zero_terminal_snr(alpha: np.ndarray) -> np.ndarray:
    """Shift and stretch alpha = sqrt(alpha_bar) so that the last value is exactly 0 and the first stays as it is.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Alg. 1. The result is used as it
    is: betas or log-SNR would be infinite or lossy at the last step.
    """
    return (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))


def rescale_alpha_bar(alpha_bar: np.ndarray, factor: float) -> np.ndarray:
    """Schedule for images whose side is `factor` times as long: sigma/alpha grows by exactly `factor` at each index.

    Berrada et al. 2024 (arXiv 2411.03177), Prop. 1. Zero stays zero.
    """
    return alpha_bar / (factor**2 + alpha_bar * (1.0 - factor**2))


def shift_time(t: Time, factor: float) -> Time:
    """The same rescaling for flow matching, where sigma/alpha = t/(1-t) (Esser et al. 2024, "SD3", Sec. 5.3.2).

    Takes numpy or JAX arrays or floats in [0, 1]; 0 and 1 stay as they are.
    """
    return factor * t / (1.0 + (factor - 1.0) * t)


@functools.lru_cache(maxsize=32)
def alpha_sigma_tables(
    train_steps: int, beta_start: float, beta_end: float, zero_snr: bool, rescale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) of every index as read-only float64 arrays.

    Zero terminal SNR comes before the rescaling: in this order sigma/alpha is multiplied by exactly `rescale`.
    """
    alpha = np.sqrt(np.cumprod(1.0 - scaled_linear_betas(train_steps, beta_start, beta_end)))
    if zero_snr:
        alpha = zero_terminal_snr(alpha)
    alpha_bar = rescale_alpha_bar(alpha**2, rescale)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    for table in (alpha, sigma):
        table.setflags(write=False)
    return alpha, sigma
