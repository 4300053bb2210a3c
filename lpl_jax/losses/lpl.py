"""The Latent Perceptual Loss: a normalised, masked distance between decoder features of two latents (arXiv 2411.04873).

The pure part, on feature maps; `chunked` decodes two latents to get them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from lpl_jax.errors import InputError
from lpl_jax.losses.config import LPLConfig, upscaling_by_number
from lpl_jax.losses.outliers import outlier_mask

_SPACE = (1, 2)
_VARIANCE_FLOOR = 1e-12  # keeps the logarithm of a dead map's variance finite; used for reporting only


class TapTerms(NamedTuple):
    """What the L taps contributed, without gradient. All but `omega` are per sample."""

    term: Float32[Array, "b taps"]  # distance before the depth weight
    masked: Float32[Array, "b taps"]  # share of pixels left out as outliers
    log_variance_ratio: Float32[Array, "b taps"]  # log of predicted over clean variance of kept pixels, channels' mean
    omega: Float32[Array, "taps"]  # depth weight


def perceptual_distance(
    config: LPLConfig,
    *,
    predicted: Sequence[Float[Array, "b _h _w _c"]],
    clean: Sequence[Float[Array, "b _h _w _c"]],
) -> tuple[Float32[Array, "b"], TapTerms]:
    """Distance of two sets of feature maps, in float32 whatever the type of the features.

    A map whose pixels are all masked counts as zero, so that a dead channel neither divides by zero nor weighs in.

    Args:
      config: which distance.
      predicted, clean: the same L feature maps (B, H_l, W_l, C_l) of both, from the coarsest.

    Returns:
      Per-sample loss (B,) and the parts it is made of.

    Raises:
      InputError: maps that do not pair up with each other and with `config.taps`.
    """
    shapes = [tuple(feature.shape for feature in features) for features in (predicted, clean)]
    count = {"all": max(1, len(shapes[0])), "rgb": 1}.get(str(config.taps), config.taps)
    if shapes[0] != shapes[1] or len(shapes[0]) != count:
        raise InputError(f"features must be {count} pairs of equal maps, given {shapes[0]} and {shapes[1]}")
    config.check_masked(len(predicted))
    terms, masked, ratios = [], [], []
    for tap, (pred, target) in enumerate(zip(predicted, lax.stop_gradient(tuple(clean)), strict=True)):
        keep = _keep(pred, target, tap, config)
        pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
        terms.append(_tap_term(pred, target, keep, config))
        masked.append(_masked_share(keep, pred))
        ratios.append(_log_variance_ratio(pred, target, keep))
    term, masked, ratios = (jnp.stack(parts, axis=1) for parts in (terms, masked, ratios))
    omega = jnp.asarray(_depth_weights([feature.shape[1] for feature in predicted], config), jnp.float32)
    loss = jnp.sum(omega * term, axis=1)
    if config.layers == "mean":
        loss = loss / len(terms)
    return loss, TapTerms(*lax.stop_gradient((term, masked, ratios)), omega)


def tap_metrics(taps: TapTerms, weights: Float[Array, "b"], names: Sequence[str]) -> dict[str, Float32[Array, ""]]:
    """Averages over samples with these weights (B,), as scalars named `{tap}/{part}`; zero without any weight.

    names: of the taps (`LPLConfig.tap_names`).
    """
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    total = jnp.sum(weights)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)[:, None]
    metrics = {}
    for name in ("term", "masked", "log_variance_ratio"):
        averages = jnp.sum(jnp.where(weights > 0, weights * getattr(taps, name), 0.0), axis=0)
        metrics.update({f"{tap}/{name}": averages[i] for i, tap in enumerate(names)})
    metrics.update({f"{tap}/omega": taps.omega[i] for i, tap in enumerate(names)})
    return metrics


def check_latents(*, z0_hat: jax.Array, z0: jax.Array) -> None:
    """Raises InputError unless both have one shape (B, h, w, C)."""
    if z0_hat.shape != z0.shape or z0.ndim != 4:
        raise InputError(f"latents must both have shape (B, h, w, C), given {z0_hat.shape} and {z0.shape}")


def _keep(pred, target, tap, config):
    """Pixels to compare in this tap, (B, H, W, C), or None for all of them."""
    if not config.masked(tap):
        return None
    source = pred if config.mask_on == "predicted" else target
    closing, opening = config.kernels(tap, min(source.shape[1:3]))
    return outlier_mask(
        source,
        closing=closing,
        opening=opening,
        quantile=config.quantile,
        quantile_method=config.quantile_method,
    )


def _tap_term(pred, target, keep, config):
    """Distance of one pair of maps before the depth weight, (B,)."""
    difference = pred - target if config.taps == "rgb" else _normalised_difference(pred, target, keep, config)
    error = jnp.abs(difference) if config.metric == "l1" else jnp.square(difference)
    per_channel = _mean(error, keep) if config.spatial == "mean" else _sum(error, keep)
    return jnp.mean(per_channel, axis=(1, 2, 3))


def _normalised_difference(pred, target, keep, config):
    if config.stats == "none":
        return pred - target
    if config.mask_zero_input and keep is not None:
        if config.mask_on == "predicted":
            pred = jnp.where(keep, pred, 0.0)
        else:
            target = jnp.where(keep, target, 0.0)
    if config.stats == "separate":
        pred_mean, pred_scale = _statistics(pred, keep, config)
        target_mean, target_scale = _statistics(target, keep, config)
        return (pred - pred_mean) / pred_scale - (target - target_mean) / target_scale
    # Statistics shared by both: their mean cancels in the difference.
    _, scale = _statistics(pred if config.stats == "predicted" else target, keep, config)
    return (pred - target) / scale


def _statistics(features, keep, config):
    """Mean and scale that normalise these maps; both broadcast against (B, H, W, C)."""
    if config.norm == "channel_vector":
        mean, scale = jnp.zeros(()), _length(features) + config.norm_eps
    else:
        mean = _mean(features, keep)
        scale = jnp.sqrt(_mean(jnp.square(features - mean), keep) + config.norm_eps)
    return (mean, scale) if config.stats_grad else lax.stop_gradient((mean, scale))


def _length(features):
    """Euclidean length of the channel vector, (B, H, W, 1), with gradient zero at the zero vector."""
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _sum(values, keep):
    values = values if keep is None else jnp.where(keep, values, 0.0)
    return jnp.sum(values, axis=_SPACE, keepdims=True)


def _mean(values, keep):
    """Mean over the kept pixels, (B, 1, 1, C); zero where there are none."""
    if keep is None:
        return jnp.mean(values, axis=_SPACE, keepdims=True)
    count = jnp.sum(keep, axis=_SPACE, keepdims=True, dtype=jnp.float32)
    return _sum(values, keep) / jnp.maximum(count, 1.0)


def _masked_share(keep, features):
    if keep is None:
        return jnp.zeros(features.shape[0], jnp.float32)
    return 1.0 - jnp.mean(keep, axis=(1, 2, 3), dtype=jnp.float32)


def _log_variance_ratio(pred, target, keep):
    def mean_variance(features):
        features = lax.stop_gradient(features)
        variance = _mean(jnp.square(features - _mean(features, keep)), keep)
        return jnp.mean(variance, axis=(1, 2, 3)) + _VARIANCE_FLOOR

    return jnp.log(mean_variance(pred) / mean_variance(target))


def _depth_weights(sizes, config):
    """omega_l from the upscaling r_l / r_1 of each map over the first, or from its number."""
    if config.taps == "rgb":
        return [1.0]
    if config.omega == "number":
        return [1 / upscaling_by_number(tap) for tap in range(len(sizes))]
    weight = {"inverse": lambda r: 1 / r, "uniform": lambda r: 1.0, "literal": lambda r: 2.0**-r}[config.omega]
    return [weight(size / sizes[0]) for size in sizes]
