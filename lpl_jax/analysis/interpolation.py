"""Resampled latents and what they decode to ("Boosting Latent Diffusion with Perceptual Objectives", Fig. 11).

An image or its latent is made smaller by a factor and brought back to its size. The error in the latent is then
compared with the error in the decoded image: the paper's point is that the first says little about the second.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, perceptual_distance

MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")
SPACES = ("pixel", "latent")
BICUBIC = -0.75  # the free coefficient of Keys' kernel, as in PyTorch


class Method(NamedTuple):
    """What is resampled, and how; written `latent-bicubic`."""

    space: str
    mode: str

    def __str__(self) -> str:
        return f"{self.space}-{self.mode}"

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Raises InputError for a name that is not SPACE-MODE."""
        space, _, mode = name.partition("-")
        if space not in SPACES or mode not in MODES:
            possible = ", ".join(f"{space}-{mode}" for space in SPACES for mode in MODES)
            raise InputError(f"method {name!r} is not one of {possible}")
        return cls(space, mode)


DEFAULT_METHODS = tuple(map(Method.parse, ("pixel-bilinear", "latent-nearest", "latent-bilinear", "latent-bicubic")))
DEFAULT_FACTORS = (1.1, 1.3, 1.5, 2.0, 2.5, 3.0)


class Reference(NamedTuple):
    """What resampled latents are compared with."""

    latents: jax.Array  # scaled, (B, h, w, C)
    images: jax.Array  # their decodes, clipped to [-1, 1], (B, H, W, 3)
    features: tuple[jax.Array, ...]  # their decoder features


class Errors(NamedTuple):
    """Errors of every sample, float32 (B,), and the decoded images."""

    latent_mse: jax.Array  # mean over elements of the squared difference of scaled latents
    psnr: jax.Array  # of the decoded images, dB, peak 2; inf for equal images
    distance: jax.Array  # perceptual distance
    detail: jax.Array  # energy of the image's gradient over that of the original's decode; 1 = as sharp
    images: jax.Array  # (B, H, W, 3), clipped to [-1, 1]


def resample_matrix(size: int, new_size: int, mode: str) -> np.ndarray:
    """The linear map that resamples an axis, (new_size, size) float64; its rows sum to 1.

    Equal to `torch.nn.functional.interpolate(size=..., mode=..., align_corners=False)`: no antialiasing, pixels beyond
    the ends repeat the last one. Bilinear, bicubic and nearest-exact put the centres of both grids on each other;
    "nearest" keeps the lower left neighbour instead of the nearest, which shifts what it resamples.

    Raises:
      InputError: another mode, or a size below 1.
    """
    if mode not in MODES:
        raise InputError(f"resampling mode {mode!r} is not one of {', '.join(MODES)}")
    if min(size, new_size) < 1:
        raise InputError(f"resampling {size} to {new_size} pixels: sizes must be at least 1")
    if mode.startswith("nearest"):
        # In float32 as there, because a position that should be whole may be rounded to either side.
        shift = np.float32(0.5 if mode == "nearest-exact" else 0)
        first = np.floor((np.arange(new_size, dtype=np.float32) + shift) * (np.float32(size) / np.float32(new_size)))
        offsets, weights = (0,), np.ones((1, new_size))
    else:
        positions = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
        if mode == "bilinear":
            positions = np.maximum(positions, 0)
        first = np.floor(positions)
        offsets, kernel = ((0, 1), _hat) if mode == "bilinear" else ((-1, 0, 1, 2), _keys)
        weights = [kernel(positions - first - offset) for offset in offsets]
    matrix = np.zeros((new_size, size))
    for offset, weight in zip(offsets, weights, strict=True):
        columns = np.clip(first.astype(int) + offset, 0, size - 1)
        np.add.at(matrix, (np.arange(new_size), columns), weight)
    return matrix


def reduced_size(size: int, factor: float) -> int:
    """Pixels along an axis of `size` pixels that is made smaller by `factor`: rounded, at least 1."""
    return max(round(size / factor), 1)


def round_trip(size: int, factor: float, mode: str) -> np.ndarray:
    """Down by 1/factor and up again as one map, (size, size) float32; exactly the identity for factor 1."""
    if not factor >= 1:
        raise InputError(f"factor {factor}: must be 1 or more (the size is divided by it)")
    reduced = reduced_size(size, factor)
    return (resample_matrix(reduced, size, mode) @ resample_matrix(size, reduced, mode)).astype(np.float32)


@jax.jit
def resample(arrays: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Applies a map along each side: arrays (B, H, W, C), rows (H', H), columns (W', W) -> (B, H', W', C)."""
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, arrays, precision=lax.Precision.HIGHEST)


@jax.jit
def encode(autoencoder: Autoencoder, images: jax.Array) -> jax.Array:
    """Images (B, H, W, 3) in [-1, 1] -> scaled latents (B, h, w, C), the mean of the posterior."""
    return autoencoder.scale(autoencoder.encode(images).mean)


def resampled_latents(
    autoencoder: Autoencoder, images: jax.Array | np.ndarray, latents: jax.Array, method: Method, factor: float
) -> jax.Array:
    """Scaled latents (B, h, w, C) after the round trip of Fig. 11: of themselves, or of the images they encode.

    Args:
      images: (B, H, W, 3) in [-1, 1]. latents: `encode` of them.
    """
    source = images if method.space == "pixel" else latents
    changed = resample(source, *(round_trip(side, factor, method.mode) for side in source.shape[1:3]))
    return encode(autoencoder, changed) if method.space == "pixel" else changed


def distance_config() -> LPLConfig:
    """The perceptual distance: that of the public example, whose statistics and masks are of the clean features alone.

    With all taps that a decoder has, and with its post_quant_conv: these are features of true decodes.
    """
    return LPLConfig.reference(post_quant_conv=True)


@functools.partial(jax.jit, static_argnames="config")
def reference(autoencoder: Autoencoder, latents: jax.Array, config: LPLConfig) -> Reference:
    """Decodes scaled latents (B, h, w, C) once for all comparisons."""
    images = jnp.clip(autoencoder.decode(latents), -1, 1)
    return Reference(latents, images, autoencoder.features(latents, num_taps=_count(autoencoder, config)))


@functools.partial(jax.jit, static_argnames="config")
def compare(autoencoder: Autoencoder, changed: jax.Array, clean: Reference, config: LPLConfig) -> Errors:
    """Errors of changed scaled latents (B, h, w, C) against the original ones."""
    images = jnp.clip(autoencoder.decode(changed), -1, 1)
    features = autoencoder.features(changed, num_taps=_count(autoencoder, config))
    image_mse = jnp.mean(jnp.square(images - clean.images), axis=(1, 2, 3))
    return Errors(
        latent_mse=jnp.mean(jnp.square(changed - clean.latents), axis=(1, 2, 3)),
        psnr=10 * jnp.log10(4 / image_mse),
        distance=perceptual_distance(config, predicted=features, clean=clean.features)[0],
        detail=gradient_energy(images) / gradient_energy(clean.images),
        images=images,
    )


def gradient_energy(images: jax.Array) -> jax.Array:
    """Mean squared difference of neighbouring pixels of (B, H, W, C), down plus across: (B,).

    Blur lowers it and a shift leaves it as it is, unlike errors that compare pixel by pixel.
    """
    down, across = (jnp.mean(jnp.square(jnp.diff(images, axis=axis)), axis=(1, 2, 3)) for axis in (1, 2))
    return down + across


def disagreements(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """Pairs that two error measures order differently, and all pairs that neither calls equal.

    Args:
      first, second: one number for each of the same N things, larger = worse in both.
    """
    above = np.triu_indices(len(first), 1)
    pairs = [(values[above[0]], values[above[1]]) for values in map(np.asarray, (first, second))]
    # Compared, not subtracted: infinities have no difference.
    signs = [np.greater(a, b).astype(int) - np.less(a, b) for a, b in pairs]
    product = signs[0] * signs[1]
    return int(np.sum(product < 0)), int(np.sum(product != 0))


def _count(autoencoder, config):
    return len(config.tap_names(autoencoder.config.tap_names))


def _hat(distance):
    return np.maximum(1 - np.abs(distance), 0)


def _keys(distance, a=BICUBIC):
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
