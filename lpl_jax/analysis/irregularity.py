"""How unevenly a decoder reacts to noise ("Boosting Latent Diffusion with Perceptual Objectives", Fig. 12).

Noise is added to one small patch of a latent at a time, or the patch is masked. The error of the decoded image is
measured over the whole image and outside the patch's own pixels: equal changes of a latent are not equal changes of an
image.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError

NOISES = ("half_variance", "fixed_norm")
MASKED = "masked"  # the patch is set to zero, the mean of scaled latents, in place of noise
CHANGES = (*NOISES, MASKED)
VARIANCE_SHARE = 0.5  # of the latent's own variance
PATCH = 2  # latent pixels; 16 x 16 image pixels for an autoencoder with 8 pixels per latent


def patch_positions(height: int, width: int, patch: int, stride: int) -> np.ndarray:
    """Upper left corners of all patches, (rows, columns, 2) in latent pixels (row, column), within (height, width).

    Raises:
      InputError: a patch that does not fit, or a patch or stride below 1.
    """
    if stride < 1:
        raise InputError(f"stride={stride}: must be at least 1 latent pixel")
    if not 1 <= patch <= min(height, width):
        raise InputError(f"patch={patch}: must be 1 to {min(height, width)}, the latent has {height}x{width} pixels")
    rows, columns = (np.arange(0, side - patch + 1, stride) for side in (height, width))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def patch_noise(key: jax.Array, latent: jax.Array, count: int, patch: int, kind: str) -> jax.Array:
    """Independent Gaussian noise for `count` patches of a latent (h, w, C): (count, patch, patch, C).

    Kinds:
      half_variance: each element has half the variance of the latent, var(z) over all its elements.
      fixed_norm: the same, each patch then scaled to the norm that this has on average, sqrt(patch^2 C var(z) / 2), so
        that differences between positions are the decoder's and not the draw's.
    """
    if kind not in NOISES:
        raise InputError(f"noise={kind!r} is not one of {', '.join(NOISES)}")
    deviation = jnp.sqrt(VARIANCE_SHARE * jnp.var(latent))
    noise = jax.random.normal(key, (count, patch, patch, latent.shape[-1]))
    if kind == "fixed_norm":
        mean_square = jnp.mean(jnp.square(noise), axis=(1, 2, 3), keepdims=True)
        noise = noise / jnp.sqrt(mean_square)
    return deviation * noise


@jax.jit
def patch_errors(autoencoder: Autoencoder, latent: jax.Array, corners: jax.Array, noise: jax.Array) -> jax.Array:
    """Errors of a decoded image when noise is added to one patch of its latent.

    Args:
      latent: scaled, (h, w, C).
      corners: upper left corners of K patches, (K, 2) in latent pixels.
      noise: (K, p, p, C).

    Returns:
      (K, 2) float32: squared error summed over pixels and channels of the image in [-1, 1], in total and outside the
      pixels that the patch covers. Images are clipped to [-1, 1] first.
    """

    def disturb(corner, patch):
        return latent + lax.dynamic_update_slice(jnp.zeros_like(latent), patch, (*corner, 0))

    def image(latents):
        return jnp.clip(autoencoder.decode(latents), -1, 1)

    scale, patch = autoencoder.config.downsample, noise.shape[1]
    error = jnp.sum(jnp.square(image(jax.vmap(disturb)(corners, noise)) - image(latent[None])), axis=-1)
    covered = _covered(error.shape[1:], corners * scale, patch * scale)
    outside = jnp.sum(jnp.where(covered, 0.0, error), axis=(1, 2))
    return jnp.stack([outside + jnp.sum(jnp.where(covered, error, 0.0), axis=(1, 2)), outside], axis=1)


def irregularity_maps(
    autoencoder: Autoencoder,
    latent: jax.Array,
    key: jax.Array,
    *,
    patch: int = PATCH,
    stride: int | None = None,
    noise: str = "half_variance",
    draws: int = 4,
    batch_size: int = 32,
    on_draw: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Maps of the image error over the position of a disturbed patch (Fig. 12).

    Args:
      latent: scaled, (h, w, C).
      key: of the noise.
      patch: side of the patch in latent pixels.
      stride: between positions; None = patch, so that patches tile the latent.
      noise: kind, see `patch_noise`; or "masked", which sets the patch to zero and draws nothing.
      draws: noise draws that are averaged; of masked patches one is all there is.
      batch_size: patches decoded at once.
      on_draw: called after each draw, for a progress bar.

    Returns:
      (rows, columns, 2): mean over draws of `patch_errors` (total, outside) at each of `patch_positions`.

    Raises:
      InputError: as `patch_positions` and `patch_noise`; draws or batch_size below 1.
    """
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
    height, width, _ = latent.shape
    corners = patch_positions(height, width, patch, patch if stride is None else stride)
    grid, corners = corners.shape[:2], corners.reshape(-1, 2)
    count, sums = len(corners), np.zeros((len(corners), 2))
    draws = 1 if noise == MASKED else draws
    for draw in range(draws):
        if noise == MASKED:
            values = -_patches(latent, corners, patch)
        else:
            values = _noise(jax.random.fold_in(key, draw), latent, count=count, patch=patch, kind=noise)
        for start in range(0, count, batch_size):
            rows = np.arange(start, start + batch_size) % count  # always a full batch: one program
            errors = patch_errors(autoencoder, latent, corners[rows], values[rows])
            sums[start : start + batch_size] += np.asarray(errors)[: count - start]
        on_draw()
    return (sums / draws).reshape(*grid, 2)


_noise = jax.jit(patch_noise, static_argnames=("count", "patch", "kind"))


@functools.partial(jax.jit, static_argnames="patch")
def _patches(latent, corners, patch: int):
    """The patches (K, p, p, C) of a latent (h, w, C) with these corners (K, 2)."""
    size = (patch, patch, latent.shape[-1])
    return jax.vmap(lambda corner: lax.dynamic_slice(latent, (*corner, 0), size))(jnp.asarray(corners))


def _covered(shape, corners, side):
    """(K, H, W): whether a pixel lies in the square with this corner (K, 2) and side."""
    inside = []
    for axis, size in enumerate(shape):
        start, pixels = corners[:, axis, None], jnp.arange(size)
        inside.append((pixels >= start) & (pixels < start + side))
    return inside[0][:, :, None] & inside[1][:, None, :]
