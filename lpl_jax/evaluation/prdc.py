"""Precision, recall, density and coverage from nearest neighbours of features, block by block on the devices.

Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, Eq. 1 and 2. Density and coverage: Naeem et al. 2020,
arXiv 2002.09797, Sec. 3. With NND_k(x) the distance of x to its k-th nearest neighbour in its own set, itself
excluded:

    precision_j  a real r_i exists with |f_j - r_i| < NND_k(r_i)      density_j   number of such r_i, divided by k
    recall_i     a fake f_j exists with |f_j - r_i| < NND_k(f_j)      coverage_i  min_j |f_j - r_i| < NND_k(r_i)

All comparisons are strict, as in the `prdc` package of Naeem et al., so a point whose k nearest are its duplicates has
an empty ball.

Rounding. Squared distances are |a|^2 + |b|^2 - 2 ab, after the mean of the real features is subtracted; what is within
their rounding error is 0, so duplicates are at distance 0. Distances are compared as float32. In float64, the default
wherever the devices have it, that leaves nothing to chance: equal distances tie, whatever the order of summation. In
float32 a squared distance is off by about 1e-6 of |a|^2 + |b|^2. That is fine where neighbours are not much nearer to
each other than to the mean, but a distance as near as that to a radius is compared by chance, and points nearer than
0.5 % of |a| (2048 dimensions) count as duplicates.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpl_jax.errors import InputError
from lpl_jax.parallel import Device


@dataclasses.dataclass(frozen=True, eq=False)
class PRDC:
    """Per-sample values for N real and M fake samples, whose means are the metrics.

    precision: (M,) bool. density: (M,) float64, can exceed 1. recall, coverage: (N,) bool. k: neighbours for precision
    and recall. k_density: those for density and coverage. dtype: in which distances were computed.
    """

    precision: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    coverage: np.ndarray
    k: int
    k_density: int
    dtype: str

    def means(self) -> dict[str, float]:
        """The four metrics by name."""
        return {name: float(getattr(self, name).mean()) for name in ("precision", "recall", "density", "coverage")}


def prdc(
    *,
    real: np.ndarray | jax.Array,
    fake: np.ndarray | jax.Array,
    k: int = 3,
    k_density: int | None = None,
    block: int = 2048,
    dtype: str | None = None,
    devices: Sequence[Device] | None = None,
) -> PRDC:
    """Precision, recall, density and coverage of fake features (M, D) with respect to real ones (N, D).

    Beside the features themselves each device needs a few arrays of (block, block) and (block, D), never (N, M).

    Args:
      k: neighbours for precision and recall. 3 is the choice of Kynkäänniemi et al.
      k_density: neighbours for density and coverage; None takes k. Naeem et al. use 5.
      block: rows of each set that are compared at a time.
      dtype: "float64" or "float32" for the squared distances; None is float64, but float32 on TPUs, which lack it.
      devices: blocks are dealt out to these, each of which holds all features; None is the default device alone.

    Raises:
      InputError: shapes that do not fit, fewer than k + 1 samples in a set, or values that are not finite.
    """
    k_density = k if k_density is None else k_density
    neighbours = max(k, k_density)
    _check(real, fake, min(k, k_density), neighbours)
    devices = list(devices or [_device(jnp.zeros(()))])
    if dtype is None:
        dtype = "float32" if devices[0].platform == "tpu" else "float64"
    if dtype not in ("float32", "float64") or block < 1:
        raise InputError(
            f"dtype {dtype!r}, block {block} given; possible: float32 or float64, a block of 1 row or more"
        )
    with jax.enable_x64(dtype == "float64"):
        centre = np.asarray(_mean(real), dtype)
        reals = [jax.device_put(real, device) for device in devices]
        fakes = reals if fake is real else [jax.device_put(fake, device) for device in devices]
        real_radii = _radii(reals, centre, neighbours, block)
        fake_radii = real_radii if fake is real else _radii(fakes, centre, neighbours, block)
        radii = real_radii[:, k - 1], real_radii[:, k_density - 1], fake_radii[:, k - 1]
        precision, count, recall, nearest = _compare(reals, fakes, centre, radii, block)
    return PRDC(precision, recall, count / k_density, nearest < radii[1], k, k_density, dtype)


def _device(x: jax.Array) -> Device:
    return next(iter(x.devices()))


def _check(real, fake, smallest_k: int, largest_k: int) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InputError(f"real {real.shape} and fake {fake.shape} features given; (N, D) and (M, D) are needed")
    if smallest_k < 1 or largest_k >= min(len(real), len(fake)):
        raise InputError(
            f"{largest_k if smallest_k >= 1 else smallest_k} neighbours asked for of {len(real)} real and {len(fake)} "
            "fake samples; possible: 1 up to one less than the samples of each"
        )
    for name, features in (("real", real), ("fake", fake)):
        if not jnp.issubdtype(features.dtype, jnp.floating):
            raise InputError(f"{name} features are {features.dtype}; floating-point numbers are needed")
        if not np.isfinite(_mean(features)).all():
            raise InputError(f"{name} features have infinite or undefined values")


def _mean(features) -> np.ndarray:
    """Mean over samples; float32 sums will do for a centre, and a value that is not finite shows in them."""
    return np.asarray(features.mean(0, dtype=np.float64 if isinstance(features, np.ndarray) else jnp.float32))


def _radii(copies: list[jax.Array], centre: np.ndarray, neighbours: int, block: int) -> np.ndarray:
    """Distances (N, neighbours) to the nearest neighbours in the same set, ascending, float32."""
    size, block = len(copies[0]), min(block, len(copies[0]))
    kept = [jnp.full((size, neighbours), jnp.inf, jnp.float32, device=_device(x)) for x in copies]
    pairs = itertools.combinations_with_replacement(range(-(-size // block)), 2)
    for turn, (i, j) in enumerate(pairs):
        n = turn % len(copies)
        kept[n] = _neighbour_step(kept[n], copies[n], centre, np.int32(i), np.int32(j), block=block)
    return np.sort(np.concatenate(jax.device_get(kept), 1), 1)[:, :neighbours]


@functools.partial(jax.jit, static_argnames="block", donate_argnums=0)
def _neighbour_step(kept, x, centre, i, j, *, block):
    """Running nearest distances (N, k), with those between blocks i <= j of x in both directions."""
    distances, rows, columns = _distances(x, x, centre, i, j, block, block)
    distances = jnp.where(rows[:, None] == columns[None, :], jnp.inf, distances)
    kept = _keep_nearest(kept, distances, rows[0])
    return _keep_nearest(kept, jnp.where(i == j, jnp.inf, distances).T, columns[0])  # the diagonal has both already


def _keep_nearest(kept, distances, start):
    rows, k = distances.shape[0], kept.shape[1]
    old = lax.dynamic_slice_in_dim(kept, start, rows)
    nearest = -lax.top_k(-jnp.concatenate([old, distances], 1), k)[0]
    return lax.dynamic_update_slice_in_dim(kept, nearest, start, 0)


def _compare(reals, fakes, centre, radii, block: int) -> tuple[np.ndarray, ...]:
    """Per fake: in a real ball (k)? in how many (k_density)? Per real: in a fake ball? distance to the nearest fake."""
    n, m = len(reals[0]), len(fakes[0])
    blocks = min(block, n), min(block, m)
    found, given = [], []
    for x in reals:
        zeros = functools.partial(jnp.zeros, device=_device(x))
        found.append((zeros(m, bool), zeros(m, jnp.int32), zeros(n, bool), zeros(n, jnp.float32) + jnp.inf))
        given.append(jax.device_put(radii, _device(x)))
    pairs = itertools.product(range(-(-n // blocks[0])), range(-(-m // blocks[1])))
    for turn, (i, j) in enumerate(pairs):
        d = turn % len(reals)
        ij = np.int32(i), np.int32(j)
        found[d] = _compare_step(found[d], given[d], reals[d], fakes[d], centre, *ij, blocks=blocks)
    precision, count, recall, nearest = zip(*jax.device_get(found), strict=True)
    return np.any(precision, 0), np.sum(count, 0), np.any(recall, 0), np.min(nearest, 0)


@functools.partial(jax.jit, static_argnames="blocks", donate_argnums=0)
def _compare_step(found, radii, real, fake, centre, i, j, *, blocks):
    """`found` of `_compare`, with the distances between block i of the real and block j of the fake features."""
    precision, count, recall, nearest = found
    distances, rows, columns = _distances(real, fake, centre, i, j, *blocks)
    real_radii, density_radii = (lax.dynamic_slice_in_dim(x, rows[0], blocks[0])[:, None] for x in radii[:2])
    fake_radii = lax.dynamic_slice_in_dim(radii[2], columns[0], blocks[1])[None, :]

    def update(whole, combine, part, start):
        old = lax.dynamic_slice_in_dim(whole, start, len(part))
        return lax.dynamic_update_slice_in_dim(whole, combine(old, part), start, 0)

    return (
        update(precision, jnp.logical_or, (distances < real_radii).any(0), columns[0]),
        update(count, jnp.add, (distances < density_radii).sum(0, dtype=jnp.int32), columns[0]),
        update(recall, jnp.logical_or, (distances < fake_radii).any(1), rows[0]),
        update(nearest, jnp.minimum, distances.min(1), rows[0]),
    )


def _distances(x, y, centre, i, j, x_block: int, y_block: int):
    """Distances between block i of x and block j of y, float32, and the numbers of their rows.

    The last block starts early enough to be full, so that arrays need no padding; rows that the block before it had
    are infinitely far.
    """
    a, rows, a_new = _block(x, centre, i, x_block)
    b, columns, b_new = _block(y, centre, j, y_block)
    products = jnp.dot(a, b.T, precision=lax.Precision.HIGHEST)
    norms = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :]
    squares = norms - 2 * products
    # The error of a sum of D rounded terms grows like sqrt(D).
    rounding = 2 * (x.shape[1] ** 0.5 + 2) * jnp.finfo(a.dtype).eps
    distances = jnp.sqrt(jnp.where(squares > rounding * norms, squares, 0)).astype(jnp.float32)
    return jnp.where(a_new[:, None] & b_new[None, :], distances, jnp.inf), rows, columns


def _block(x, centre, i, size: int):
    first = i * size
    start = jnp.minimum(first, len(x) - size)
    rows = start + jnp.arange(size, dtype=jnp.int32)
    return lax.dynamic_slice_in_dim(x, start, size).astype(centre.dtype) - centre, rows, rows >= first
