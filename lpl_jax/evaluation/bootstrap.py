"""Bootstrap intervals (Efron 1979): how far a metric moves when the images are drawn anew from those at hand."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.evaluation.frechet import (
    Gaussian,
    Statistics,
    distance_to_root,
    frechet_distance,
    psd_root,
    statistics,
)

# Rows that are turned into float64 at a time.
CHUNK = 4096


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    values: np.ndarray, *, seed: int, resamples: int = 200, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of per-sample values (N,), which may be bool.

    Raises InputError for fewer than 2 values or resamples, values that are not finite, or a level outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(f"values of shape {values.shape} cannot be resampled; possible: (N,), all finite")
    if not 0 < level < 1:
        raise InputError(f"level={level} given; possible: between 0 and 1")
    means = [values[rows].mean() for rows in _resampled_rows(len(values), seed, resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_std(statistic: Callable[[np.ndarray], float], n: int, *, seed: int, resamples: int) -> float:
    """Standard deviation, over resamples, of statistic(rows), rows (n,) being drawn with replacement from 0 to n - 1.

    Raises InputError for fewer than 2 samples or resamples.
    """
    return float(np.std([statistic(rows) for rows in _resampled_rows(n, seed, resamples)], ddof=1))


def _resampled_rows(n: int, seed: int, resamples: int):
    if n < 2 or resamples < 2:
        raise InputError(f"{n} samples and {resamples} resamples given; the bootstrap needs at least 2 of each")
    rng = np.random.default_rng(seed)
    return (rng.integers(n, size=n) for _ in range(resamples))


def frechet_interval(
    features: np.ndarray, reference: Statistics | Gaussian, *, seed: int, resamples: int = 20
) -> Interval:
    """Fréchet distance of features (N, D) to the reference, with an interval of 1.96 standard deviations on each side.

    The deviation is that of resampled generated features; the reference stays as it is. A resample has fewer distinct
    samples, which raises the distance itself, so only the spread of the resamples is used and their level is not. The
    low end is at least 0. Costs, beside the distance, one product of the features with themselves and the eigenvalues
    of one (D, D) matrix per resample.

    Raises InputError for what `statistics`, `frechet_distance` and `bootstrap_std` refuse.
    """
    features = np.asarray(features)
    full = statistics(features)
    value = frechet_distance(full, reference)
    root = psd_root(reference.covariance)

    def distance(rows: np.ndarray) -> float:
        weights = np.bincount(rows, minlength=len(features))
        resample = _weighted_statistics(features, weights, full.mean)
        return distance_to_root(reference.mean, reference.covariance, root, resample)

    spread = 1.96 * bootstrap_std(distance, len(features), seed=seed, resamples=resamples)
    return Interval(value, max(0.0, value - spread), value + spread)


def _weighted_statistics(features: np.ndarray, weights: np.ndarray, centre: np.ndarray) -> Statistics:
    """Statistics of features (N, D) where row i counts weights[i] times; `centre` is near their mean."""
    drawn = np.flatnonzero(weights)  # 63 % of the rows
    total, scatter = np.zeros_like(centre), np.zeros(2 * centre.shape)
    for start in range(0, len(drawn), CHUNK):
        rows = drawn[start : start + CHUNK]
        centred = features[rows].astype(np.float64) - centre
        total += weights[rows] @ centred
        centred *= np.sqrt(weights[rows])[:, None]
        scatter += centred.T @ centred
    count = int(weights.sum())
    shift = total / count
    return Statistics(count, centre + shift, scatter - count * np.outer(shift, shift))
