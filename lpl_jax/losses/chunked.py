"""The perceptual loss of latents: value and gradient together, a few rows at a time, on every device its own.

The loss of a row depends on that row alone, and the network in it is frozen. So the gradient is computed right with
the value and is all that is kept for the backward pass: one chunk's activations are alive at a time, however many rows
are decoded, and each device decodes rows of its own part of the batch without communication.

Clean and predicted latents are decoded in two calls: in one batched call the backward pass would run over both halves,
though the clean one needs none.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.losses.config import LPLConfig
from lpl_jax.losses.lpl import TapTerms, check_latents, perceptual_distance, tap_metrics

# Decoded pixels of a chunk: one image of 512 px, four of 256 px. Larger chunks are not faster, but take more memory.
CHUNK_PIXELS = 512 * 512


def latent_perceptual_loss(
    autoencoder: Autoencoder,
    config: LPLConfig,
    *,
    z0_hat: Float[Array, "b h w c"],
    z0: Float[Array, "b h w c"],
    chunk: int | None = None,
) -> tuple[Float32[Array, "b"], dict[str, Float32[Array, ""]]]:
    """The loss of every sample (Sec. 3.2, Eq. 2), without gate and without training weight.

    Gradients flow from the loss to `z0_hat` only, neither to the clean latents nor to the autoencoder.

    Args:
      autoencoder: frozen first stage whose decoder gives the features.
      config: static under `jax.jit`.
      z0_hat: estimate of the clean latents, scaled, (B, h, w, C).
      z0: clean latents, scaled, (B, h, w, C).
      chunk: images that are decoded at a time; None is `auto_chunk`.

    Returns:
      loss (B,) float32, and scalar metrics averaged over the batch for each tap, by its name: `{tap}/term` (before the
      depth weight), `{tap}/omega` (depth weight), `{tap}/masked` (share of pixels) and `{tap}/log_variance_ratio` (log
      of predicted over clean variance).

    Raises:
      InputError: latents of different shapes, or not those of this autoencoder.
    """
    loss, taps, _ = decoded_distance(autoencoder, config, z0_hat=z0_hat, z0=z0, chunk=chunk)
    return loss, tap_metrics(taps, jnp.ones_like(loss), config.tap_names(autoencoder.config.tap_names))


def auto_chunk(autoencoder: Autoencoder, height: int, width: int) -> int:
    """Rows to decode at a time, for latents of this size: `CHUNK_PIXELS` decoded pixels, at least one row."""
    return max(1, CHUNK_PIXELS // (height * width * autoencoder.config.downsample**2))


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """How rows are decoded and compared, static: see `decoded_distance`."""

    config: LPLConfig
    rows: int | None
    chunk: int


class _Frozen(NamedTuple):
    """What a distance is measured with and has no gradient by."""

    autoencoder: Autoencoder
    z0: jax.Array
    scores: jax.Array | None


def decoded_distance(
    autoencoder: Autoencoder,
    config: LPLConfig,
    *,
    z0_hat: Float[Array, "b h w c"],
    z0: Float[Array, "b h w c"],
    scores: Float[Array, "groups rows"] | None = None,
    rows: int | None = None,
    chunk: int | None = None,
) -> tuple[Float32[Array, "b"], TapTerms, Bool[Array, "b"]]:
    """The distance of each row that is decoded; only the gradient of the distance by `z0_hat` is defined.

    Under a mesh the batch is split over its batch axes and the autoencoder is replicated.

    Args:
      autoencoder: frozen first stage.
      config: which distance.
      z0_hat, z0: estimated and clean latents, scaled, (B, h, w, C).
      scores: (G, B / G): from each of G equal groups of consecutive rows those with the largest scores are decoded. G
        is a multiple of the number of shards of a batch. None decodes every row.
      rows: how many of each group, with `scores`.
      chunk: rows that are decoded at a time; None is `auto_chunk`.

    Returns:
      distances (B,) float32 and their parts (without gradient), 0 in rows that are not decoded; which are, (B,) bool.

    Raises:
      InputError: latents of different shapes, or not those of this autoencoder.
    """
    check_latents(z0_hat=z0_hat, z0=z0)
    chunk = auto_chunk(autoencoder, *z0.shape[1:3]) if chunk is None else chunk
    frozen = lax.stop_gradient(_Frozen(autoencoder, z0, scores))
    loss, taps, decoded = _distance(_Decoding(config, rows, chunk), z0_hat, frozen)
    return loss, lax.stop_gradient(taps), decoded


def _primal(how, z0_hat, frozen) -> tuple[jax.Array, TapTerms, jax.Array]:
    return _on_shards(_value, how, z0_hat, frozen)[0]


def _forward(how, z0_hat, frozen):
    return _on_shards(_value_and_gradient, how, z0_hat, frozen)


def _backward(how, gradient, cotangents):
    by_row = cotangents[0][:, None, None, None].astype(gradient.dtype)
    return by_row * gradient, None


_distance = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_distance.defvjp(_forward, _backward)


def _on_shards(measure, how: _Decoding, z0_hat, frozen: _Frozen):
    """((loss (B,), TapTerms, decoded (B,)), gradient (B, h, w, C) or None), each device on its own rows."""

    def on_one(autoencoder, z0_hat, z0, scores):
        drawn = jnp.arange(len(z0)) if scores is None else _drawn(scores, how.rows)
        chosen = (z0_hat, z0) if scores is None else (z0_hat[drawn], z0[drawn])
        by_row, omega = _in_chunks(lambda *latents: measure(autoencoder, *latents, how.config), chosen, how.chunk)
        by_row = by_row, jnp.ones(len(drawn), bool)
        if scores is not None:
            by_row = jax.tree.map(lambda leaf: _put_back(leaf, drawn, len(z0)), by_row)
        return by_row, omega

    on_shards = parallel.shard_map_batch(on_one)
    (((loss, *parts), gradient), decoded), omega = on_shards(frozen.autoencoder, z0_hat, frozen.z0, frozen.scores)
    return (loss, TapTerms(*parts, omega=omega), decoded), gradient


def _drawn(scores, rows):
    """Of the rows with scores (G, n), the indices of the `rows` with the largest score in each group, (G * rows,)."""
    groups, size = scores.shape
    return (lax.top_k(scores, rows)[1] + size * jnp.arange(groups)[:, None]).reshape(-1)


def _put_back(values, rows, size):
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[rows].set(values, unique_indices=True)


def _in_chunks(function, arrays, chunk):
    """`function(*arrays) -> (by_row, shared)`, on at most `chunk` rows at a time."""
    count = len(arrays[0])
    chunks = math.ceil(count / chunk)
    if chunks <= 1:
        return function(*arrays)
    chunk = math.ceil(count / chunks)  # the last one as full as the others
    fill = chunks * chunk - count

    def cut(array):
        array = jnp.pad(array, ((0, fill), *((0, 0) for _ in array.shape[1:])))
        return array.reshape(chunks, chunk, *array.shape[1:])

    by_row, shared = lax.map(lambda each: function(*each), tuple(cut(array) for array in arrays))
    by_row = jax.tree.map(lambda leaf: leaf.reshape(chunks * chunk, *leaf.shape[2:])[:count], by_row)
    return by_row, jax.tree.map(lambda leaf: leaf[0], shared)


def _value(autoencoder, z0_hat, z0, config):
    """((loss, *parts of each row), None), omega."""
    features = _features(autoencoder, z0_hat, config), _features(autoencoder, z0, config)
    predicted, clean = lax.optimization_barrier(features)
    loss, (*parts, omega) = perceptual_distance(config, predicted=predicted, clean=clean)
    return ((loss, *parts), None), omega


def _value_and_gradient(autoencoder, z0_hat, z0, config):
    """((loss, *parts of each row), its gradient by `z0_hat`), omega."""
    clean = _features(autoencoder, z0, config)
    predicted, to_latents = jax.vjp(lambda latents: _features(autoencoder, latents, config), z0_hat)
    # Without the barrier the layout that TPUs give to convolutions of few images leaks into the statistics: copies of
    # the maps in 32 bits.
    predicted, clean = lax.optimization_barrier((predicted, clean))
    loss, to_features, (*parts, omega) = jax.vjp(
        lambda predicted: perceptual_distance(config, predicted=predicted, clean=clean), predicted, has_aux=True
    )
    (gradient,) = to_latents(*to_features(jnp.ones_like(loss)))
    return ((loss, *parts), gradient), omega


def _features(autoencoder, latents, config):
    if config.taps == "rgb":
        return (autoencoder.decode(latents),)
    count = len(config.tap_names(autoencoder.config.tap_names))
    return autoencoder.features(latents, num_taps=count, post_quant_conv=config.post_quant_conv)
