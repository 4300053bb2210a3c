"""The perceptual loss of latents: value and gradient together, a few rows at a time, on every device its own.

The loss of a row depends on that row alone, and the network behind it is frozen. So the gradient is computed right with
the value and is all that is kept for the backward pass: one chunk's activations are alive at a time, however many rows
are decoded, and each device decodes rows of its own part of the batch without a word to the others.

Clean and predicted latents are decoded in two calls: in one batched call the backward pass would run over both halves,
though the clean one needs none.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.losses.config import LPLConfig
from lpl_jax.losses.lpl import TapTerms, check_latents, perceptual_distance, tap_metrics

# Decoded pixels of a chunk: one image of 512 px, four of 256 px. Larger chunks are not faster, but take more memory.
CHUNK_PIXELS = 512 * 512


def latent_perceptual_loss(
    autoencoder: Autoencoder,
    pred_latents: jax.Array,
    target_latents: jax.Array,
    config: LPLConfig,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of every sample (Sec. 3.2, Eq. 2), without gate and without training weight.

    Gradients flow from the loss to `pred_latents` only, neither to the target nor to the autoencoder.

    Args:
      autoencoder: frozen first stage whose decoder gives the features.
      pred_latents: estimate of the clean latents, scaled, (B, h, w, C).
      target_latents: clean latents, scaled, (B, h, w, C).
      config: static under `jax.jit`.
      chunk: images that are decoded at a time; None is `auto_chunk`.

    Returns:
      loss (B,) float32, and scalar metrics averaged over the batch for each of `config.tap_names`: `{tap}/term`
      (before the depth weight), `{tap}/omega` (depth weight), `{tap}/masked` (share of pixels) and
      `{tap}/log_variance_ratio` (log of predicted over clean variance).

    Raises:
      InputError: latents of different shapes, or not those of this autoencoder.
    """
    loss, taps, _ = decoded_distance(autoencoder, pred_latents, target_latents, None, config, None, chunk)
    return loss, tap_metrics(taps, jnp.ones_like(loss), config)


def auto_chunk(autoencoder: Autoencoder, height: int, width: int) -> int:
    """Rows to decode at a time, for latents of this size: `CHUNK_PIXELS` decoded pixels, at least one row."""
    return max(1, CHUNK_PIXELS // (height * width * autoencoder.config.downsample**2))


def decoded_distance(
    autoencoder: Autoencoder,
    pred: jax.Array,
    target: jax.Array,
    scores: jax.Array | None,
    config: LPLConfig,
    rows: int | None,
    chunk: int | None,
) -> tuple[jax.Array, TapTerms, jax.Array]:
    """The distance of each row that is decoded; only the gradient of the distance by `pred` is defined.

    Under a mesh the batch is split over its batch axes and the autoencoder is whole on every device.

    Args:
      pred, target: scaled latents (B, h, w, C).
      scores: (G, B / G): from each of G equal groups of consecutive rows those with the largest scores are decoded. G
        is a multiple of the number of parts that the mesh splits a batch into. None decodes every row.
      rows: how many of each group, with `scores`.
      chunk: rows that are decoded at a time; None is `auto_chunk`.

    Returns:
      distances (B,) float32 and their parts (without gradient), 0 in rows that are not decoded; which are, (B,) bool.

    Raises:
      InputError: latents of different shapes, or not those of this autoencoder.
    """
    check_latents(pred, target)
    chunk = auto_chunk(autoencoder, *pred.shape[1:3]) if chunk is None else chunk
    autoencoder, target, scores = lax.stop_gradient((autoencoder, target, scores))
    loss, (*parts, omega), decoded = _distance(autoencoder, pred, target, scores, config, rows, chunk)
    return loss, TapTerms(*lax.stop_gradient(parts), omega), decoded


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _distance(autoencoder, pred, target, scores, config, rows, chunk):
    return _on_shards(_value, autoencoder, pred, target, scores, config, rows, chunk)[0]


def _forward(autoencoder, pred, target, scores, config, rows, chunk):
    return _on_shards(_value_and_gradient, autoencoder, pred, target, scores, config, rows, chunk)


def _backward(config, rows, chunk, gradient, cotangents):
    by_row = cotangents[0][:, None, None, None].astype(gradient.dtype)
    return None, by_row * gradient, None, None


_distance.defvjp(_forward, _backward)


def _on_shards(measure, autoencoder, pred, target, scores, config, rows, chunk):
    """((loss (B,), TapTerms, decoded (B,)), gradient (B, h, w, C) or None), each device on its own rows."""

    def on_one(autoencoder, pred, target, scores):
        drawn = jnp.arange(len(pred)) if scores is None else _drawn(scores, rows)
        chosen = (pred, target) if scores is None else (pred[drawn], target[drawn])
        by_row, omega = _in_chunks(lambda *latents: measure(autoencoder, *latents, config), chosen, chunk)
        by_row = by_row, jnp.ones(len(drawn), bool)
        if scores is not None:
            by_row = jax.tree.map(lambda leaf: _put_back(leaf, drawn, len(pred)), by_row)
        return by_row, omega

    (((loss, *parts), gradient), decoded), omega = parallel.shard_map_batch(on_one)(autoencoder, pred, target, scores)
    return (loss, TapTerms(*parts, omega), decoded), gradient


def _drawn(scores, rows):
    """Of the rows behind scores (G, n), the numbers of the `rows` with the largest score in each group, (G * rows,)."""
    groups, size = scores.shape
    return (lax.top_k(scores, rows)[1] + size * jnp.arange(groups)[:, None]).reshape(-1)


def _put_back(values, rows, size):
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[rows].set(values, unique_indices=True)


def _in_chunks(function, arrays, chunk):
    """`function(*arrays) -> (by_row, whole)`, on at most `chunk` rows at a time."""
    count = len(arrays[0])
    chunks = math.ceil(count / chunk)
    if chunks <= 1:
        return function(*arrays)
    chunk = math.ceil(count / chunks)  # the last one as full as the others
    fill = chunks * chunk - count

    def cut(array):
        array = jnp.pad(array, ((0, fill), *((0, 0) for _ in array.shape[1:])))
        return array.reshape(chunks, chunk, *array.shape[1:])

    by_row, whole = lax.map(lambda each: function(*each), tuple(cut(array) for array in arrays))
    by_row = jax.tree.map(lambda leaf: leaf.reshape(chunks * chunk, *leaf.shape[2:])[:count], by_row)
    return by_row, jax.tree.map(lambda leaf: leaf[0], whole)


def _value(autoencoder, pred, target, config):
    """((loss, *parts of each row), None), omega."""
    features = _features(autoencoder, pred, config), _features(autoencoder, target, config)
    loss, (*parts, omega) = perceptual_distance(*lax.optimization_barrier(features), config)
    return ((loss, *parts), None), omega


def _value_and_gradient(autoencoder, pred, target, config):
    """((loss, *parts of each row), its gradient by `pred`), omega."""
    target_features = _features(autoencoder, target, config)
    pred_features, to_latents = jax.vjp(lambda latents: _features(autoencoder, latents, config), pred)
    # Without the barrier the layout that TPUs give to convolutions of few images leaks into the statistics: copies of
    # the maps in 32 bits.
    pred_features, target_features = lax.optimization_barrier((pred_features, target_features))
    loss, to_features, (*parts, omega) = jax.vjp(
        lambda features: perceptual_distance(features, target_features, config), pred_features, has_aux=True
    )
    (gradient,) = to_latents(*to_features(jnp.ones_like(loss)))
    return ((loss, *parts), gradient), omega


def _features(autoencoder, latents, config):
    if config.taps == "rgb":
        return (autoencoder.decode(latents),)
    return autoencoder.features(latents, num_taps=config.taps, post_quant_conv=config.post_quant_conv)
