"""Power spectra of image sets: how much contrast they have at each spatial frequency (paper, Fig. 4 and 5).

An image's power is P = |fft2(Y)|^2 / (H W) of its luminance Y = .299 R + .587 G + .114 B in [0, 1], with no window and
with the mean left in, so that the mean of P over the frequencies is the mean of Y^2 over the pixels. P is averaged over
the images of a set, then over rings of equal frequency, and only then its logarithm (base 10) is taken. Frequencies are
in cycles per image, along the side of a square image. The paper shows such spectra without saying how they are taken:
the luminance, the absence of a window and the order of mean and logarithm are choices made here.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.errors import InputError

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
# Power below this counts as this. The rounding of images to 8 bits alone makes about 6e-7, so that only flat images,
# whose power is 0 away from the mean, get there.
FLOOR = 1e-12
BANDS = ("low", "middle", "high")
BAND_LIMITS = (75, 150)  # cycles per image of 512 pixels; in proportion at other sizes (paper, Fig. 5)
SMALLEST_WITH_BANDS = 7  # pixels at which no band is empty


@jax.jit
def power(images: jax.Array) -> jax.Array:
    """Power spectra, frequency 0 at [H // 2, W // 2].

    Args:
      images: uint8 (B, H, H, 3).

    Returns:
      (B, H, H) float32.

    Raises:
      InputError: another type or shape, or images that are not square.
    """
    check_images(images)
    side = images.shape[1]
    luminance = jnp.tensordot(images.astype(jnp.float32) / 255, LUMINANCE, 1, precision="highest")
    # The mean goes around the FFT, whose rounding would turn part of it into power at other frequencies of flat images.
    mean = luminance.mean(axis=(1, 2))
    spectrum = jnp.fft.fftshift(jnp.fft.fft2(luminance - mean[:, None, None]), axes=(1, 2))
    result = (spectrum.real**2 + spectrum.imag**2) / side**2
    return result.at[:, side // 2, side // 2].set(mean**2 * side**2)


def check_images(images) -> None:
    """Raises InputError unless `images` are uint8 (B, H, H, 3)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise InputError(f"spectra of an array {images.shape}, {images.dtype}: needed: (B, H, W, 3), uint8")
    if images.shape[1] != images.shape[2]:
        height, width = images.shape[1:3]
        raise InputError(f"spectra of images of {width}x{height} pixels: needed: square images (crop them first)")


def radial_profile(power: jax.Array) -> jax.Array:
    """Mean power on each ring of frequency f = round(|k|), f = 0 .. H // 2.

    Frequencies beyond H / 2, which exist in the corners of the spectrum only, are left out.

    Args:
      power: (..., H, H), frequency 0 in the middle as `power` returns it.

    Returns:
      (..., H // 2 + 1), of the same type.
    """
    side = power.shape[-1]
    if power.ndim < 2 or power.shape[-2] != side:
        raise InputError(f"radial profile of an array {power.shape}: needed: (..., H, H)")
    indices, counts = _rings(side)
    flat = power.reshape(*power.shape[:-2], side * side)
    # A gather and a sum, not a scatter: the order of the additions is fixed, on GPUs too.
    return jnp.take(flat, indices, axis=-1, mode="fill", fill_value=0).sum(axis=-1) / counts


@functools.cache
def _rings(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of each ring in the flat spectrum, (rings, longest), padded with an index out of range; counts."""
    offsets = np.arange(side) - side // 2
    radius = np.rint(np.hypot(offsets[:, None], offsets[None])).astype(int).ravel()  # |k|^2 is whole: no ties
    rings = [np.flatnonzero(radius == f) for f in range(side // 2 + 1)]
    indices = np.full((len(rings), max(map(len, rings))), side * side, np.int32)
    for row, ring in zip(indices, rings, strict=True):
        row[: len(ring)] = ring
    return indices, np.array([len(ring) for ring in rings], np.float32)


@jax.jit
def _power_and_profiles(images):
    spectra = power(images)
    return spectra, radial_profile(spectra)


@dataclass(frozen=True, eq=False)
class SpectrumSum:
    """The spectra of a set of images, in a form that can be added up.

    Attributes:
      total: sum of the images' power, (H, H) float64.
      profiles: each image's radial profile, (N, H // 2 + 1) float32, for the bootstrap.
    """

    total: np.ndarray
    profiles: np.ndarray

    @classmethod
    def of_images(cls, images: np.ndarray) -> "SpectrumSum":
        """Of one batch, uint8 (B, H, H, 3)."""
        spectra, profiles = jax.device_get(_power_and_profiles(images))
        return cls(spectra.sum(axis=0, dtype=np.float64), profiles)

    @classmethod
    def of_batches(cls, batches: Iterable[np.ndarray]) -> "SpectrumSum":
        """Of batches that are taken one after the other."""
        return cls.merge(map(cls.of_images, batches))

    @classmethod
    def merge(cls, parts: Iterable["SpectrumSum"]) -> "SpectrumSum":
        """The sum over disjoint parts of a set, in their order; taken one after the other.

        Raises:
          InputError: no parts, or images of different sizes.
        """
        total, profiles = None, []
        for part in parts:
            if total is not None and part.total.shape != total.shape:
                raise InputError(f"spectra of images of {len(total)} and of {part.resolution} pixels cannot be added")
            total = part.total if total is None else total + part.total
            profiles.append(part.profiles)
        if total is None:
            raise InputError("spectra of no images: needed: at least one")
        return cls(total, np.concatenate(profiles))

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.profiles)

    @property
    def resolution(self) -> int:
        """Side of the images, pixels."""
        return len(self.total)

    @property
    def power(self) -> np.ndarray:
        """Mean power, (H, H) float64."""
        return self.total / self.count

    @property
    def profile(self) -> np.ndarray:
        """Radial profile of the mean power, (H // 2 + 1,) float64."""
        return self.profiles.mean(axis=0, dtype=np.float64)


def log_power(power: np.ndarray) -> np.ndarray:
    """log10 of the power; 0, and all below `FLOOR`, gives log10(FLOOR). Raises InputError where it is not finite."""
    power = np.asarray(power, np.float64)
    if not np.isfinite(power).all():
        raise InputError("spectra with values that are not finite")
    return np.log10(np.maximum(power, FLOOR))


def log_ratio_map(a: SpectrumSum, b: SpectrumSum) -> np.ndarray:
    """log10 P_a - log10 P_b at every frequency, (H, H) float64 (paper, Fig. 4); frequency 0 in the middle."""
    _check_sizes(a, b)
    return log_power(a.power) - log_power(b.power)


def error_curve(a: SpectrumSum, b: SpectrumSum) -> np.ndarray:
    """|log10 P_a(f) - log10 P_b(f)| for f = 0 .. H // 2, (H // 2 + 1,) float64 (paper, Fig. 5)."""
    _check_sizes(a, b)
    return profile_error(a.profile, b.profile)


def band_errors(a: SpectrumSum, b: SpectrumSum) -> dict[str, float]:
    """Means of the error curve over the low, middle and high band, see `band_means`."""
    return {name: float(error) for name, error in band_means(error_curve(a, b), a.resolution).items()}


def profile_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The error curve of mean profiles (..., F): what a bootstrap calls with means of resampled `profiles`."""
    return np.abs(log_power(a) - log_power(b))


def band_limits(resolution: int) -> tuple[float, float]:
    """Where the low band ends and the high band begins, in cycles per image of `resolution` pixels."""
    low, high = (limit * resolution / 512 for limit in BAND_LIMITS)
    return low, high


def band_means(curve: np.ndarray, resolution: int) -> Mapping[str, np.ndarray]:
    """Means over bands: low 0 < f < 75, middle 75 <= f <= 150, high f > 150, times resolution / 512; without f = 0.

    Args:
      curve: (..., resolution // 2 + 1).

    Returns:
      {"low": (...), "middle": (...), "high": (...)}.

    Raises:
      InputError: images so small that a band is empty, or a curve of another length.
    """
    curve = np.asarray(curve)
    if resolution < SMALLEST_WITH_BANDS:
        raise InputError(f"frequency bands at {resolution} pixels: needed: at least {SMALLEST_WITH_BANDS}")
    if curve.shape[-1] != resolution // 2 + 1:
        raise InputError(f"a curve of {curve.shape[-1]} frequencies: {resolution} pixels have {resolution // 2 + 1}")
    low, high = band_limits(resolution)
    f = np.arange(curve.shape[-1])
    masks = (f > 0) & (f < low), (f >= low) & (f <= high), f > high
    return {name: curve[..., mask].mean(axis=-1) for name, mask in zip(BANDS, masks, strict=True)}


def _check_sizes(a: SpectrumSum, b: SpectrumSum) -> None:
    if a.resolution != b.resolution:
        raise InputError(f"spectra of images of {a.resolution} and of {b.resolution} pixels cannot be compared")
