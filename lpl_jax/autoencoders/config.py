"""Configurations of convolutional autoencoders."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lpl_jax.errors import InputError

# Far above what is published, and far below what takes minutes to refuse.
MAX_COUNT, MAX_LEVELS, MAX_BLOCKS = 2**16, 12, 100


class LatentConvention(Protocol):
    """How raw latents become scaled ones: the fields of an autoencoder's configuration that say it."""

    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None


def latent_scale(convention: "LatentConvention | Any") -> tuple[Any, Any]:
    """(offset, factor): scaled latent = (raw - offset) * factor, numbers or, by channel, float32 (C,).

    With statistics of the channels, the offset is their mean and the factor scaling_factor / std, as in diffusers'
    pipelines; without, they are shift_factor and scaling_factor.
    """
    mean, std = convention.latents_mean, convention.latents_std
    if mean is None or std is None:
        return convention.shift_factor, convention.scaling_factor
    return np.asarray(mean, np.float32), np.float32(convention.scaling_factor) / np.asarray(std, np.float32)


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"autoencoder dtype {dtype!r}: use float32 or bfloat16 (float16 overflows in SD decoders)")


def _check_counts(config: "AutoencoderConfig | TinyAutoencoderConfig", *fields: str) -> None:
    """Each field holds a whole number from 1 up, or a tuple of them, as a damaged config.json may not."""
    for field in fields:
        given = getattr(config, field)
        numbers = given if isinstance(given, tuple) else (given,)
        if not numbers or len(numbers) > MAX_LEVELS or not all(type(n) is int and 0 < n <= MAX_COUNT for n in numbers):
            raise InputError(
                f"{config.name}: {field}={str(given)[:80]}; possible: whole numbers of 1 to {MAX_COUNT}, up to "
                f"{MAX_LEVELS} of them"
            )
        if field.endswith(("resnets", "blocks")) and max(numbers) > MAX_BLOCKS:
            raise InputError(f"{config.name}: {field}={given!r}; possible: up to {MAX_BLOCKS} blocks")


def _check_convention(config: "AutoencoderConfig | TinyAutoencoderConfig") -> None:
    for field, given in (("scaling_factor", config.scaling_factor), ("shift_factor", config.shift_factor)):
        finite = type(given) in (int, float) and abs(given) < 1e30  # not NaN, and a float32
        if not finite or (field == "scaling_factor" and not given > 0):
            raise InputError(f"{config.name}: {field}={str(given)[:80]}; possible: a number (scaling_factor above 0)")
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise InputError(f"{config.name}: latents_mean={mean} and latents_std={std}: both are needed, or none")
    if config.shift_factor:
        raise InputError(f"{config.name}: shift_factor={config.shift_factor} and latents_mean={mean}: give one of them")
    for field, given in (("latents_mean", mean), ("latents_std", std)):
        numbers = [type(number) in (int, float) and np.isfinite(number) for number in given]
        if not all(numbers) or len(given) != config.latent_channels or (field == "latents_std" and min(given) <= 0):
            raise InputError(
                f"{config.name}: {field}={given!r}; possible: {config.latent_channels} numbers, one for each channel "
                "of the latents (latents_std above 0)"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture and latent convention of an AutoencoderKL or AsymmetricAutoencoderKL.

    Attributes:
      name: what it was loaded from; shown to people, not used in computations.
      latent_channels: channels C of a latent.
      scaling_factor, shift_factor: scaled latent = (raw - shift_factor) * scaling_factor.
      latents_mean, latents_std: statistics of every channel, None in most; then scaled latent = (raw - latents_mean) *
        scaling_factor / latents_std.
      encoder_channels: widths of the encoder's levels, from full resolution down.
      decoder_channels: widths of the decoder's levels, from full resolution down (as diffusers writes it).
      encoder_resnets, decoder_resnets: residual blocks in each level.
      norm_groups: groups of every GroupNorm.
      mid_attention: single-head self-attention in the middle block.
      quant_conv, post_quant_conv: 1x1 convolutions after the encoder and before the decoder.
      mask_condition: the decoder can take the known part of an image to be inpainted (the asymmetric autoencoders of
        Zhu et al., "Designing a Better Asymmetric VQGAN for StableDiffusion").
      dtype: compute type of convolutions and attention, "float32" or "bfloat16"; norms and softmax are float32.
    """

    name: str = "autoencoder"
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    encoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_resnets: int = 2
    decoder_resnets: int = 3
    norm_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    mask_condition: bool = False
    dtype: str = "float32"
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_dtype(self.dtype)
        _check_convention(self)
        _check_counts(self, "latent_channels", "encoder_channels", "decoder_channels", "norm_groups")
        _check_counts(self, "encoder_resnets", "decoder_resnets")
        if len(self.encoder_channels) != len(self.decoder_channels):
            raise InputError(
                f"autoencoder with {len(self.encoder_channels)} encoder levels and {len(self.decoder_channels)} "
                "decoder levels: they must be equally many"
            )
        for width in self.encoder_channels + self.decoder_channels:
            if width % self.norm_groups:
                raise InputError(f"autoencoder width {width} is not divisible by norm_groups={self.norm_groups}")
        if self.mask_condition:
            self._check_mask_condition()

    def _check_mask_condition(self) -> None:
        if not (self.mid_attention and self.quant_conv and self.post_quant_conv) or self.shift_factor:
            raise InputError(
                f"{self.name}: mask_condition goes with mid_attention, quant_conv, post_quant_conv and shift_factor=0"
            )
        first, last = self.decoder_channels[0], self.decoder_channels[-1]
        doubling = tuple(min(first * 2**level, last) for level in range(4))
        if self.decoder_channels != doubling or first == last:
            raise InputError(
                f"{self.name}: decoder_channels={self.decoder_channels} with mask_condition; possible: four widths, "
                "each twice the one before up to a limit, such as (192, 384, 768, 768)"
            )

    @property
    def downsample(self) -> int:
        """Pixels per latent along each side (8 for four levels)."""
        return 2 ** (len(self.encoder_channels) - 1)

    def attention_bytes(self, side: int) -> int:
        """Memory of the middle block's attention, whose map has all pairs of latents, for one image of this side."""
        return 4 * (side // self.downsample) ** 4 if self.mid_attention else 0

    @property
    def num_blocks(self) -> int:
        """Residual blocks of all levels."""
        return len(self.encoder_channels) * (self.encoder_resnets + self.decoder_resnets)

    @property
    def num_taps(self) -> int:
        """Feature maps that `features` can return: the middle block and every up block."""
        return len(self.tap_names)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of these maps, in order: mid, up_0, up_1, ..."""
        return ("mid", *(f"up_{block}" for block in range(len(self.decoder_channels))))

    @classmethod
    def tiny(cls, **changes) -> "AutoencoderConfig":
        """The real architecture at a size for tests: four levels, f8, four latent channels."""
        base = cls(
            name="tiny",
            encoder_channels=(8, 8, 16, 16),
            decoder_channels=(8, 8, 16, 16),
            encoder_resnets=1,
            decoder_resnets=2,
            norm_groups=4,
            scaling_factor=0.5,
        )
        return replace(base, **changes)


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Architecture and latent convention of a TAESD-type autoencoder (diffusers' AutoencoderTiny).

    Attributes:
      name, latent_channels, scaling_factor, shift_factor, latents_mean, latents_std, dtype: as in `AutoencoderConfig`.
      encoder_width, decoder_width: channels of all hidden layers.
      encoder_blocks: residual blocks in each of the encoder's levels, from full resolution down.
      decoder_blocks: residual blocks in each of the decoder's levels, from the latent up.
      midblock_norm: the blocks at the latent's resolution have a branch with a GroupNorm (TAESD for FLUX.2).
    """

    name: str = "tiny autoencoder"
    latent_channels: int = 4
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    encoder_width: int = 64
    decoder_width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    midblock_norm: bool = False
    dtype: str = "float32"
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_dtype(self.dtype)
        _check_convention(self)
        _check_counts(self, "latent_channels", "encoder_width", "decoder_width", "encoder_blocks", "decoder_blocks")
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise InputError(
                f"{self.name}: {len(self.encoder_blocks)} encoder levels and {len(self.decoder_blocks)} decoder "
                "levels: they must be equally many"
            )

    @property
    def downsample(self) -> int:
        """Pixels per latent along each side (8 for four levels)."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def attention_bytes(self, side: int) -> int:
        """0: it has no attention."""
        return 0

    @property
    def num_blocks(self) -> int:
        """Residual blocks of all levels."""
        return sum(self.encoder_blocks) + sum(self.decoder_blocks)

    @property
    def num_taps(self) -> int:
        """Feature maps that `features` can return: one for each resolution."""
        return len(self.tap_names)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of these maps, in order: level_0, level_1, ..."""
        return tuple(f"level_{level}" for level in range(len(self.decoder_blocks)))
