"""What goes into the blocks: patches, positions, and sinusoidal embeddings of numbers."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num

MAX_PERIOD = 10_000


def patchify(latents: Float[Array, "b h w c"], patch_size: int) -> Float[Array, "b patches values"]:
    """(B, h, w, C) -> (B, (h/p)(w/p), p*p*C): patches row by row; inside a patch the order is (row, column, channel).

    A Linear with kernel (p*p*C, d) on these vectors equals a p x p convolution with stride p and kernel
    `kernel.reshape(p, p, C, d)` (HWIO).
    """
    batch, height, width, channels = latents.shape
    p = patch_size
    x = latents.reshape(batch, height // p, p, width // p, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(
    patches: Float[Array, "b patches values"], rows: int, columns: int, patch_size: int
) -> Float[Array, "b h w c"]:
    """(B, rows*columns, p*p*C) -> (B, rows*p, columns*p, C): the inverse of `patchify`."""
    batch, _, length = patches.shape
    p = patch_size
    channels = length // (p * p)
    x = patches.reshape(batch, rows, columns, p, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * p, columns * p, channels)


def position_embedding(rows: int, columns: int, hidden: int, base_grid: int) -> Float32[Array, "patches {hidden}"]:
    """Fixed sine and cosine embedding of the two coordinates of each patch: (rows*columns, hidden) float32.

    The first half of `hidden` holds the column, the second the row. Each axis of any grid spans the coordinates
    [0, base_grid): a finer grid takes finer steps in the range that the network was trained on.
    """
    half = hidden // 2
    column = _axis_embedding(columns, half, base_grid)[None, :]
    row = _axis_embedding(rows, half, base_grid)[:, None]
    # The two small tables are the constants of the compiled program, not their (rows*columns, hidden) product.
    both = [jnp.broadcast_to(table, (rows, columns, half)) for table in (column, row)]
    return jnp.concatenate(both, axis=-1).reshape(rows * columns, hidden)


def _axis_embedding(n: int, dim: int, base_grid: int) -> Float32[np.ndarray, "{n} {dim}"]:
    """(n, dim) float32: sine and cosine of the coordinates arange(n) * base_grid / n."""
    coordinates = np.arange(n) * (base_grid / n)
    frequencies = MAX_PERIOD ** (-np.arange(dim // 2) / (dim // 2))
    angles = np.outer(coordinates, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def sinusoidal_embedding(values: Num[Array, "*batch"], dim: int) -> Float32[Array, "*batch {dim}"]:
    """(...) numbers -> (..., dim) float32: cosines, then sines, at dim/2 periods from 2 pi up to about 2 pi 10000."""
    half = dim // 2
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / half).astype(np.float32)
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
