"""Outliers in decoder features ("Boosting Latent Diffusion with Perceptual Objectives", Fig. 13, Alg. 1).

A few channels of the decoder's features carry small regions of extreme values. This module measures them channel by
channel and applies the masks that the Latent Perceptual Loss uses.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, outlier_mask
from lpl_jax.losses.outliers import inner_range

DEFAULT_TAP = 3  # counted from 0; the paper's l = 4, up_2; the last one of a decoder with fewer


class TapStatistics(NamedTuple):
    """What the outliers of one tap are like, for every image and channel, float32 (B, C)."""

    largest: jax.Array  # max |f|
    median: jax.Array  # median |f|
    masked: jax.Array  # share of the pixels that the mask leaves out
    variance_masked: jax.Array  # share of the channel's variance over space that these pixels hold


def parse_taps(autoencoder: Autoencoder, taps: Sequence[str]) -> tuple[int, ...]:
    """Tap numbers, counted from 0, from names, numbers or "all"; none given: `DEFAULT_TAP`.

    Raises InputError for one that the decoder does not have.
    """
    names = autoencoder.config.tap_names
    if not taps:
        return (min(DEFAULT_TAP, len(names) - 1),)
    if list(taps) == ["all"]:
        return tuple(range(len(names)))
    numbers = {**{name: tap for tap, name in enumerate(names)}, **{str(tap): tap for tap in range(len(names))}}
    for tap in taps:
        if tap not in numbers:
            raise InputError(
                f"tap {tap!r}: {autoencoder.config.name} has {', '.join(names)} (or 0 to {len(names) - 1})"
            )
    return tuple(dict.fromkeys(numbers[tap] for tap in taps))


@functools.partial(jax.jit, static_argnames="taps")
def features(autoencoder: Autoencoder, latents: jax.Array, taps: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Maps (B, H_l, W_l, C_l), float32, of these taps for scaled latents (B, h, w, C)."""
    maps = autoencoder.features(latents, num_taps=max(taps) + 1)
    return tuple(maps[tap].astype(jnp.float32) for tap in taps)


@functools.partial(jax.jit, static_argnames=("tap", "config"))
def measure(maps: jax.Array, tap: int, config: LPLConfig) -> tuple[jax.Array, TapStatistics]:
    """The mask of one tap and statistics of its outliers.

    Masks are computed in every tap that is asked for, also in those where the loss does not use them.

    Args:
      maps: features (B, H, W, C).
      tap: its number, which decides the widths of the filters with fixed kernel scaling.
      config: quantile and filters of the mask.

    Returns:
      boolean (B, H, W, C), True = keep, and the statistics.
    """
    closing, opening = config.kernels(tap, min(maps.shape[1:3]))
    keep = outlier_mask(maps, closing=closing, opening=opening, quantile=config.quantile)
    size, space = jnp.abs(maps), (1, 2)
    spread = jnp.square(maps - jnp.mean(maps, axis=space, keepdims=True))
    total = jnp.sum(spread, axis=space)
    outside = jnp.sum(jnp.where(keep, 0.0, spread), axis=space)
    return keep, TapStatistics(
        largest=jnp.max(size, axis=space),
        median=jnp.median(size, axis=space),
        masked=jnp.mean(~keep, axis=space, dtype=jnp.float32),
        variance_masked=jnp.where(total > 0, outside / jnp.where(total > 0, total, 1.0), 0.0),
    )


@functools.partial(jax.jit, static_argnames="quantile")
def thresholds(maps: jax.Array, quantile: float) -> jax.Array:
    """Values (B, C, 2) of maps (B, H, W, C) at or beyond which a pixel is an outlier, before the filters (Alg. 1)."""
    low, high = inner_range(maps, quantile)
    margin = 2 * jnp.std(maps, axis=(1, 2), keepdims=True, ddof=1)
    return jnp.stack([low - margin, high + margin], axis=-1)[:, 0, 0]


def max_median_ratio(statistics: TapStatistics) -> np.ndarray:
    """Mean over images of max |f| over mean of median |f|, (C,).

    Means come first, so that a rectified map that is zero in most places of one image does not decide. A channel that
    is zero in most places of every image has no ratio: inf, or NaN where it is zero everywhere.
    """
    largest, median = (np.mean(np.asarray(part, np.float64), axis=0) for part in statistics[:2])
    with np.errstate(divide="ignore", invalid="ignore"):
        return largest / median


def extreme_channels(ratio: np.ndarray, count: int) -> tuple[int, ...]:
    """The `count` channels with the largest finite ratio (C,), largest first."""
    finite = np.flatnonzero(np.isfinite(ratio))
    return tuple(int(channel) for channel in finite[np.argsort(-ratio[finite], kind="stable")][:count])
