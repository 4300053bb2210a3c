"""Fréchet distance between Gaussians fitted to features, their streaming statistics, and the files that hold them.

All of it in float64 on the host. Statistics of parts merge up to rounding, so features never have to be in one place:
each process sums its own rows, `merge` joins the results in any order.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from lpl_jax.errors import InputError, some
from lpl_jax.io.npy import npz_names, read_npz, write_npz
from lpl_jax.io.paths import AnyPath, PathLike, to_path

# Names in a file: pytorch-fid writes the first two, the files of guided-diffusion (ADM) have all four.
KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
COUNT = "num_images"
# Wider covariances are taken for damage: this one has 2 GiB.
MAX_WIDTH = 16384
MAX_BYTES = 3 * 8 * MAX_WIDTH**2


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D), float64, and the number of samples that they come from (None: unknown)."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.count


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over samples from which mean and covariance follow, float64.

    count: number of samples, at least 1. mean: (D,). scatter: (D, D), the sum of outer products of centred samples.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased (divided by count - 1), as numpy.cov gives. Raises InputError for a single sample."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 samples, {self.count} given")
        return self.scatter / (self.count - 1)


def statistics(features: np.ndarray, *, chunk: int = 4096) -> Statistics:
    """Statistics of features (N, D) of any floating dtype; `chunk` rows at a time are turned into float64.

    Raises InputError for another shape, no rows, or values that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"features have shape {features.shape}; possible: (samples, dimensions), at least one of each")
    parts = (_chunk_statistics(features[start : start + chunk]) for start in range(0, len(features), chunk))
    return functools.reduce(merge, parts)


def _chunk_statistics(features: np.ndarray) -> Statistics:
    rows = features.astype(np.float64)
    mean = rows.mean(0)
    if not np.isfinite(mean).all():
        raise InputError("features have infinite or undefined values")
    rows -= mean
    return Statistics(len(rows), mean, rows.T @ rows)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the samples of both (Chan, Golub and LeVeque 1979, "Updating formulae", pairwise update)."""
    _check_widths(a, b)
    count = a.count + b.count
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return Statistics(count, a.mean + delta * (b.count / count), scatter)


def frechet_distance(a: Statistics | Gaussian, b: Statistics | Gaussian) -> float:
    """|m_a - m_b|^2 + Tr(S_a) + Tr(S_b) - 2 Tr((S_a S_b)^(1/2)), never negative.

    Heusel et al. 2017, arXiv 1706.08500, Eq. 6; called FID for features of Inception. With S_a = R R^T the eigenvalues
    of S_a S_b are those of the symmetric R^T S_b R, so no general matrix square root is needed, and singular
    covariances (fewer samples than dimensions, constant features) are no special case. The error is some 1e-13 of the
    traces, and up to about 1e-7 of them where directions with hardly any variance have to be told from none.

    Raises InputError for different dimensions, or statistics of a single sample.
    """
    _check_widths(a, b)
    if a.count and b.count and b.count < a.count:
        a, b = b, a  # fewer samples, lower rank: its root is narrower, and hits no null space of the other
    return distance_to_root(a.mean, a.covariance, psd_root(a.covariance), b)


def distance_to_root(mean: np.ndarray, covariance: np.ndarray, root: np.ndarray, other: Statistics | Gaussian) -> float:
    """`frechet_distance` where the root of one covariance is at hand: the most expensive part, so it is shared."""
    other_covariance = other.covariance
    product = root.T @ other_covariance @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    overlap = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    delta = mean - other.mean
    return max(0.0, float(delta @ delta + np.trace(covariance) + np.trace(other_covariance) - 2 * overlap))


def psd_root(covariance: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R^T = covariance (D, D); eigenvalues within the rounding of the largest count as 0."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    kept = eigenvalues > max(0.0, eigenvalues[-1]) * len(eigenvalues) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def _check_widths(a: Statistics | Gaussian, b: Statistics | Gaussian) -> None:
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"statistics have {len(a.mean)} and {len(b.mean)} dimensions; they must be of the same features"
        )


def write_statistics(path: PathLike, pool: Statistics | Gaussian, spatial: Statistics | Gaussian | None = None) -> None:
    """An .npz file that pytorch-fid reads and, with `spatial`, guided-diffusion's evaluator too.

    It has mu, sigma[, mu_s, sigma_s] in float64 and, where known, num_images.
    """
    arrays = {}
    for kind, given in (("pool", pool), ("spatial", spatial)):
        if given is not None:
            arrays |= dict(zip(KEYS[kind], (given.mean, given.covariance), strict=True))
    if pool.count is not None:
        arrays[COUNT] = np.int64(pool.count)
    write_npz(path, arrays)


def read_statistics(path: PathLike, kind: str = "pool") -> Gaussian:
    """Mean and covariance from an .npz file of pytorch-fid, of guided-diffusion (ADM) or of `write_statistics`.

    Args:
      kind: "pool" for mu and sigma (FID), "spatial" for mu_s and sigma_s (sFID).

    Raises:
      InputError: a file that is missing, damaged, lacks these arrays, or holds values that no samples can have.
    """
    path = to_path(path, "statistics", remote=True)
    if kind not in KEYS:
        raise InputError(f"statistics of kind {kind!r} asked for, possible: {', '.join(KEYS)}")
    names = npz_names(path)
    if absent := [key for key in KEYS[kind] if key not in names]:
        raise InputError(f"{path} lacks {' and '.join(absent)} ({kind} statistics); it has {some(names)}")
    arrays = read_npz(path, (*KEYS[kind], COUNT), most=MAX_BYTES)
    mean, covariance = (_numbers(path, key, arrays[key], ndim) for ndim, key in enumerate(KEYS[kind], start=1))
    count = _numbers(path, COUNT, arrays[COUNT], 0) if COUNT in arrays else None
    if count is not None and not (2 <= count < 2**53 and count == count.round()):
        raise InputError(f"{path}: {COUNT} is {count}; possible: a whole number of 2 or more")
    checked = _checked_covariance(path, KEYS[kind], mean, covariance)
    return Gaussian(mean, checked, None if count is None else int(count))


def _numbers(path: AnyPath, key: str, array: np.ndarray, ndim: int) -> np.ndarray:
    """An array of a file as float64."""
    if array.ndim != ndim or any(not 1 <= size <= MAX_WIDTH for size in array.shape) or array.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: {key} is {array.dtype} {array.shape}; possible: numbers with {ndim} dimension(s) of 1 to "
            f"{MAX_WIDTH}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {key} has infinite or undefined values")
    return array.astype(np.float64)


def _checked_covariance(path: AnyPath, keys: tuple[str, str], mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    if covariance.shape != 2 * mean.shape:
        raise InputError(
            f"{path}: {keys[0]} has shape {mean.shape} and {keys[1]} {covariance.shape}; (D,) and (D, D) fit"
        )
    if (np.diag(covariance) < 0).any():
        raise InputError(f"{path}: {keys[1]} has negative variances")
    deviations = np.sqrt(np.diag(covariance))
    slack = 1e-4 * deviations.max() ** 2  # a file in float32 is rounded
    if (np.abs(covariance) > (1 + 1e-4) * np.outer(deviations, deviations) + slack).any():
        raise InputError(f"{path}: {keys[1]} has correlations above 1, so it is no covariance")
    # A file in float32 is symmetric to its rounding only.
    if np.abs(covariance - covariance.T).max() > 1e-5 * np.abs(covariance).max():
        raise InputError(f"{path}: {keys[1]} is not symmetric, so it is no covariance")
    return (covariance + covariance.T) / 2
