"""The resize that belongs to the FID network."""

import jax
import jax.numpy as jnp
import numpy as np


def tf1_bilinear(images: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear resize as TensorFlow 1's `resize_bilinear`, `align_corners=False` and `half_pixel_centers=False`.

    Output pixel i is read at the source position i * (old size / new size), without the half pixel that puts the
    centres of both grids on each other, and without antialiasing; beyond the last source pixel that pixel is repeated.
    The graph of the FID network contains this very step. Newer resizes (Pillow, PyTorch, `jax.image`, pytorch-fid's own
    preprocessing) align the centres: their features, and so their FID, differ.

    Args:
      images: (B, H, W, C) float, in any range.

    Returns:
      (B, height, width, C) of the same type.
    """
    images = _along(images, 2, width)
    return _along(images, 1, height)


def _along(images: jax.Array, axis: int, size: int) -> jax.Array:
    old = images.shape[axis]
    positions = np.arange(size, dtype=np.float32) * np.float32(old / size)  # float32, as there
    below = positions.astype(np.int32)
    above = np.minimum(below + 1, old - 1)
    weights = (positions - below).reshape([-1 if i == axis else 1 for i in range(images.ndim)])
    first = jnp.take(images, below, axis)
    return first + (jnp.take(images, above, axis) - first) * jnp.asarray(weights, images.dtype)
