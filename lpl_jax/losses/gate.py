"""Which samples of a batch get the perceptual loss, and how few of them are decoded (arXiv 2411.04873, Eq. 3).

At high noise the estimate of the clean latent is too blurred for its features to mean anything, so only samples with
noise level sigma / alpha up to tau take part. The shapes stay static under jit: either all rows are decoded and the
others weigh nothing (`capacity=None`, the definition), or exactly `capacity` rows are, drawn uniformly from the
active ones where there are more.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError
from lpl_jax.losses.config import LPLConfig
from lpl_jax.losses.lpl import check_latents, latent_distance, tap_metrics
from lpl_jax.parallel import constrain_batch


def active_samples(alpha: jax.Array, sigma: jax.Array, config: LPLConfig, *, resolution: float) -> jax.Array:
    """The gate: sigma <= tau * alpha, with tau scaled to this resolution. It does not divide, so alpha may be zero.

    Args:
      alpha, sigma: coefficients of the clean latent and of the noise, (B,).
      config: gives tau and its unit.
      resolution: image side in pixels.

    Returns:
      Boolean (B,).
    """
    threshold = config.tau_at(resolution)
    if math.isinf(threshold):
        return jnp.ones(sigma.shape, bool)
    return sigma.astype(jnp.float32) <= threshold * alpha.astype(jnp.float32)


def gated_perceptual_loss(
    autoencoder: Autoencoder,
    z0_hat: jax.Array,
    z0: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
    key: jax.Array,
    config: LPLConfig,
    *,
    resolution: float,
    capacity: int | None = None,
    sample_weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Perceptual loss of a batch, on the samples that pass the gate (Eq. 3), without the training weight.

    With a capacity K, value and gradient equal those of `capacity=None` as long as at most K samples are active.
    Where n > K are, K of them are drawn uniformly and weighted by n / K: the expectation over keys is then the same.
    Estimates that are not active are never decoded, so infinities in them (alpha = 0) touch neither value nor gradient.

    Args:
      autoencoder: frozen first stage.
      z0_hat, z0: estimated and clean latents, scaled, (B, h, w, C).
      alpha, sigma: coefficients of the noising at each sample's timestep, (B,).
      key: draws the decoded samples; not used without a capacity.
      config: static under `jax.jit`, with `tau` set.
      resolution: image side in pixels, which tau is scaled to; the geometric mean of the sides where they differ.
      capacity: rows to decode, 1 to B; None decodes all B.
      sample_weight: (B,), factor on each sample's loss; wanted if and only if `config.extra_weight` is not "none".

    Returns:
      Scalar loss, divided by B (`config.batch="all"`) or by the number of active samples ("active", 0 if there are
      none); and scalar metrics: `active_fraction`, `decoded` (rows through the decoder), and those of
      `latent_perceptual_loss` averaged over the active decoded samples (0 if there are none).

    Raises:
      InputError: no tau, a capacity outside 1..B, shapes that do not fit, or a sample weight given or missing against
      the config.
    """
    check_latents(z0_hat, z0)
    batch = z0.shape[0]
    _check_arguments(batch, alpha, sigma, config, capacity, sample_weight)
    active = lax.stop_gradient(active_samples(alpha, sigma, config, resolution=resolution))
    # Inactive rows are replaced before anything is computed from them: multiplying by zero afterwards would keep a NaN.
    z0_hat = jnp.where(active[:, None, None, None], z0_hat, lax.stop_gradient(z0).astype(z0_hat.dtype))
    count = jnp.sum(active, dtype=jnp.float32)
    weights = active.astype(jnp.float32)
    if capacity is not None:
        rows = _draw_rows(active, capacity, key)
        weights = weights[rows] * jnp.maximum(count / capacity, 1.0)
        # The gather leaves the partitioner free to decode all rows on every device, which it would.
        z0_hat, z0 = constrain_batch((z0_hat[rows], z0[rows]))
        sample_weight = None if sample_weight is None else sample_weight[rows]
    factors = weights if sample_weight is None else jnp.where(weights > 0, weights * sample_weight, 0.0)
    loss, taps = latent_distance(autoencoder, z0_hat, z0, config)
    total = jnp.sum(lax.stop_gradient(factors) * loss) / (batch if config.batch == "all" else jnp.maximum(count, 1.0))
    metrics = {
        "active_fraction": count / batch,
        "decoded": jnp.asarray(weights.shape[0], jnp.float32),
        **tap_metrics(taps, weights, config),
    }
    return total, metrics


def _draw_rows(active, capacity, key):
    """Indices of `capacity` rows: active ones first, uniformly chosen among them, then any others."""
    tie_break = 0.5 * jax.random.uniform(key, active.shape)
    return lax.top_k(active.astype(jnp.float32) + tie_break, capacity)[1]


def _check_arguments(batch, alpha, sigma, config, capacity, sample_weight):
    for name, values in (("alpha", alpha), ("sigma", sigma), ("sample_weight", sample_weight)):
        if values is not None and values.shape != (batch,):
            raise InputError(f"{name} must have shape ({batch},), one value for each sample, given {values.shape}")
    if capacity is not None and not (type(capacity) is int and 1 <= capacity <= batch):
        raise InputError(f"capacity={capacity!r} is not 1 to {batch} (the batch size), or None to decode every sample")
    if (sample_weight is None) != (config.extra_weight == "none"):
        given = "no" if sample_weight is None else "a"
        raise InputError(f"lpl.extra_weight={config.extra_weight!r} with {given} sample_weight: they belong together")
