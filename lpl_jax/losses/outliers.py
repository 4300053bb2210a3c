"""Outlier masks of decoder features ("Boosting Latent Diffusion with Perceptual Objectives", arXiv 2411.04873, Alg. 1).

Decoder features carry small blobs of extreme values that would dominate a squared error. A value is an outlier when
it lies further than two standard deviations outside the [2 %, 98 %] range of its own map, one map being one channel
of one image. The boolean map of inliers is then cleaned by two max filters: the first (`closing`) lets inliers grow
and so drops isolated specks, the second (`opening`) lets the remaining outliers grow and so covers the rim of each
blob.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from lpl_jax.errors import InputError
from lpl_jax.losses.quantiles import kth_smallest


def outlier_mask(
    features: Float[Array, "b h w c"],
    *,
    closing: int,
    opening: int,
    quantile: float = 0.02,
    quantile_method: str = "auto",
) -> Bool[Array, "b h w c"]:
    """Marks the pixels to keep, separately for every sample and channel.

    Pixels outside the map never count: a filter at the border sees only the pixels that exist. A constant map has no
    spread and is masked entirely, since its values lie on the threshold; callers must allow for empty maps. A map with
    NaN or infinite values is kept entirely, so that they show in the loss. No gradient flows through the mask.

    Args:
      features: maps (B, H, W, C) of any float type; the threshold is computed in float32.
      closing: width of the filter that grows the inliers, odd; 1 leaves them as they are.
      opening: width of the filter that grows the outliers, odd; 1 leaves them as they are.
      quantile: fraction of the values on either side that is left out of the inner range, in [0, 0.5).
      quantile_method: how the range is found (`quantiles.METHODS`); the mask is the same.

    Returns:
      Boolean (B, H, W, C), True = keep.

    Raises:
      InputError: features without four axes, an even or non-positive width, a quantile outside [0, 0.5), or
        another method.
    """
    if features.ndim != 4:
        raise InputError(f"outlier_mask: features must have shape (B, H, W, C), given {features.shape}")
    if not 0.0 <= quantile < 0.5:
        raise InputError(f"outlier_mask: quantile={quantile} is outside [0, 0.5)")
    check_kernel("closing", closing)
    check_kernel("opening", opening)

    features = lax.stop_gradient(features)
    low, high = inner_range(features, quantile, quantile_method)
    values = features.astype(jnp.float32)
    # Measuring from `low` leaves the deviation as it is, but makes that of a constant map exactly zero.
    margin = 2.0 * _sample_std(values - low)
    inlier = ~((values <= low - margin) | (values >= high + margin))  # put so that NaN thresholds mask nothing
    return erode(dilate(inlier, closing), opening)


def inner_range(
    features: Float[Array, "b h w c"], quantile: float, method: str = "auto"
) -> tuple[Float32[Array, "b 1 1 c"], Float32[Array, "b 1 1 c"]]:
    """The k1-th and k2-th smallest value of every map, counted from 1, with k1 = int(N q) and k2 = int(N (1 - q)).

    These are order statistics, hence exact in every float type; maps with fewer than 1/q values use their smallest.

    Args:
      features: maps (B, H, W, C), N = H W.
      quantile: q.
      method: one of `quantiles.METHODS`.

    Returns:
      Two float32 arrays of shape (B, 1, 1, C).
    """
    batch, height, width, channels = features.shape
    count = height * width
    ranks = max(int(count * quantile), 1), max(int(count * (1 - quantile)), 1)
    found = kth_smallest(features.reshape(batch, count, channels), ranks, method)
    low, high = (value.astype(jnp.float32)[:, None, None, :] for value in found)
    return low, high


def dilate(mask: Bool[Array, "b h w c"], width: int) -> Bool[Array, "b h w c"]:
    """True wherever the width x width window around a pixel of (B, H, W, C) holds a True."""
    return _filter(mask, width, False, lax.bitwise_or)


def erode(mask: Bool[Array, "b h w c"], width: int) -> Bool[Array, "b h w c"]:
    """True wherever the width x width window around a pixel of (B, H, W, C) holds no False."""
    return _filter(mask, width, True, lax.bitwise_and)


def kernel_sizes(closing: int, opening: int, down_factor: float) -> tuple[int, int]:
    """Filter widths for maps that are `down_factor` times smaller than those `closing` and `opening` were chosen for.

    Widths are divided, rounded up and then made odd: an even opening grows and an even closing shrinks by one, so that
    (closing 3, opening 5) becomes (1, 3) at half the size.

    Args:
      closing, opening: widths at down_factor 1.
      down_factor: positive; below 1 for larger maps.

    Returns:
      (closing, opening), both odd.
    """
    closing, opening = math.ceil(closing / down_factor), math.ceil(opening / down_factor)
    return closing - (closing % 2 == 0), opening + (opening % 2 == 0)


def check_kernel(name: str, width: int) -> None:
    """Raises InputError unless `width` is an odd positive integer (an even window has no centre pixel)."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise InputError(f"{name}={width!r} is not an odd positive integer (1, 3, 5, ...)")


def _sample_std(values: Float32[Array, "b h w c"]) -> Float32[Array, "b 1 1 c"]:
    """Standard deviation over space with N - 1 in the denominator, (B, 1, 1, C)."""
    degrees = max(values.shape[1] * values.shape[2] - 1, 1)
    deviation = values - jnp.mean(values, axis=(1, 2), keepdims=True)
    return jnp.sqrt(jnp.sum(jnp.square(deviation), axis=(1, 2), keepdims=True) / degrees)


def _filter(mask, width, identity, combine):
    # One pass along each axis equals one square window, with 2 k instead of k^2 taps. Padding holds the identity.
    if width == 1:
        return mask
    for window in ((1, width, 1, 1), (1, 1, width, 1)):
        mask = lax.reduce_window(mask, jnp.asarray(identity), combine, window, (1, 1, 1, 1), "SAME")
    return mask
