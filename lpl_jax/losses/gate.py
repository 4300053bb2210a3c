"""Which samples of a batch get the perceptual loss, and how few of them are decoded (arXiv 2411.04873, Eq. 3).

At high noise the estimate of the clean latent is too blurred for its features to mean anything, so only samples with
noise level sigma / alpha up to tau take part. The shapes stay static under jit: either all rows are decoded and the
others weigh nothing (`capacity=None`, the definition), or exactly `capacity` rows are. These are drawn group by group:
the batch is cut into equal groups of consecutive rows, and each decodes as many as the others, drawn uniformly from its
own active rows where there are more. With at least one group for each part of a batch that a device holds, no row moves
to another device.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError
from lpl_jax.losses.chunked import decoded_distance
from lpl_jax.losses.config import LPLConfig
from lpl_jax.losses.lpl import check_latents, tap_metrics


class Threshold(Protocol):
    """What a gate needs of a config."""

    def tau_at(self, resolution: float) -> float:
        """The largest sigma / alpha of a sample that counts, for images of this side in pixels."""
        ...


def active_samples(
    config: Threshold, *, alpha: Float[Array, "b"], sigma: Float[Array, "b"], resolution: float
) -> Bool[Array, "b"]:
    """The gate: sigma <= tau * alpha, with tau scaled to this resolution. It does not divide, so alpha may be zero.

    Args:
      config: gives tau and its unit.
      alpha, sigma: coefficients of the clean latent and of the noise, (B,).
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
    config: LPLConfig,
    *,
    z0_hat: Float[Array, "b h w c"],
    z0: Float[Array, "b h w c"],
    alpha: Float[Array, "b"],
    sigma: Float[Array, "b"],
    key: PRNGKeyArray,
    resolution: float,
    capacity: int | None = None,
    groups: int | None = None,
    chunk: int | None = None,
    sample_weight: Float[Array, "b"] | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Perceptual loss of a batch, on the samples that pass the gate (Eq. 3), without the training weight.

    With a capacity of K for each of the groups, value and gradient equal those of `capacity=None` as long as at most K
    samples of each group are active. Where n > K are, K of them are drawn uniformly and weighted by n / K: the
    expectation over keys is then the same.
    Estimates that are not active are never decoded, so infinities in them (alpha = 0) touch neither value nor gradient.

    Args:
      autoencoder: frozen first stage.
      config: static under `jax.jit`, with `tau` set.
      z0_hat, z0: estimated and clean latents, scaled, (B, h, w, C).
      alpha, sigma: coefficients of the noising at each sample's timestep, (B,).
      key: draws the decoded samples; not used without a capacity.
      resolution: image side in pixels, which tau is scaled to; the geometric mean of the sides where they differ.
      capacity: rows to decode in all groups together, 1 to B; None decodes all B.
      groups: into how many the batch is cut for the draw; a divisor of B and of the capacity, and a multiple of the
        number of parts that the mesh splits a batch into. None is that number.
      chunk: rows that a device decodes at a time; None is `auto_chunk`. It changes no value.
      sample_weight: (B,), factor on each sample's loss; wanted if and only if `config.extra_weight` is not "none".

    Returns:
      Scalar loss, divided by B (`config.batch="all"`) or by the number of active samples ("active", 0 if there are
      none); and scalar metrics: `active_fraction`, `decoded` (rows through the decoder), and those of
      `latent_perceptual_loss` averaged over the active decoded samples (0 if there are none).

    Raises:
      InputError: no tau, a capacity outside 1..B, shapes that do not fit, or a sample weight given or missing against
      the config.
    """
    check_latents(z0_hat=z0_hat, z0=z0)
    batch = z0.shape[0]
    groups = parallel.context_shards() if groups is None else groups
    _check_arguments(batch, config, alpha=alpha, sigma=sigma, sample_weight=sample_weight)
    check_groups(batch, capacity, groups, parallel.context_shards())
    active = lax.stop_gradient(active_samples(config, alpha=alpha, sigma=sigma, resolution=resolution))
    # Inactive rows are replaced before anything is computed from them: multiplying by zero afterwards would keep a NaN.
    z0_hat = jnp.where(active[:, None, None, None], z0_hat, lax.stop_gradient(z0).astype(z0_hat.dtype))
    weights, scores, rows = active.astype(jnp.float32), None, None
    if capacity is not None:
        rows = capacity // groups
        # Active rows first, uniformly chosen among them, then any others.
        scores = (weights + 0.5 * jax.random.uniform(key, (batch,))).reshape(groups, -1)
        counts = jnp.sum(active.reshape(groups, -1), axis=1, dtype=jnp.float32)
        weights *= jnp.repeat(jnp.maximum(counts / rows, 1.0), batch // groups)
    loss, taps, decoded = decoded_distance(
        autoencoder, config, z0_hat=z0_hat, z0=z0, scores=scores, rows=rows, chunk=chunk
    )
    weights = jnp.where(decoded, weights, 0.0)
    factors = weights if sample_weight is None else jnp.where(weights > 0, weights * sample_weight, 0.0)
    count = jnp.sum(active, dtype=jnp.float32)
    total = jnp.sum(lax.stop_gradient(factors) * loss) / (batch if config.batch == "all" else jnp.maximum(count, 1.0))
    metrics = {
        "active_fraction": count / batch,
        "decoded": jnp.asarray(batch if capacity is None else capacity, jnp.float32),
        **tap_metrics(taps, weights, config.tap_names(autoencoder.config.tap_names)),
    }
    return total, metrics


def check_groups(batch: int, capacity: int | None, groups: int, shards: int) -> None:
    """Raises InputError unless a batch on so many shards can be cut into these groups, and they share the capacity.

    Without a capacity (None) all rows are decoded, and the groups do not matter.
    """
    if capacity is None:
        return
    if not (type(capacity) is int and 1 <= capacity <= batch):
        raise InputError(f"capacity={capacity!r} is not 1 to {batch} (the batch size), or None to decode every sample")
    if not (type(groups) is int and groups >= 1) or batch % groups or groups % shards:
        possible = [number for number in range(shards, batch + 1, shards) if batch % number == 0]
        text = ", ".join(map(str, possible)) if possible else "no number"
        raise InputError(
            f"groups={groups!r} do not cut a batch of {batch} on {shards} device parts (data x fsdp) into equal ones: "
            f"{text} would"
        )
    if capacity % groups:
        below, above = capacity // groups * groups, (capacity // groups + 1) * groups
        text = f"{below} or {above}" if below else f"{above}"
        raise InputError(f"capacity={capacity} is not shared equally by {groups} groups of the batch: {text} would be")


def _check_arguments(batch: int, config: LPLConfig, **by_sample: jax.Array | None) -> None:
    for name, values in by_sample.items():
        if values is not None and values.shape != (batch,):
            raise InputError(f"{name} must have shape ({batch},), one value for each sample, given {values.shape}")
    unweighted = by_sample["sample_weight"] is None
    if unweighted != (config.extra_weight == "none"):
        given = "no" if unweighted else "a"
        raise InputError(f"lpl.extra_weight={config.extra_weight!r} with {given} sample_weight: they belong together")
