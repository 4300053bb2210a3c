"""Configuration of a convolutional KL autoencoder, from and to diffusers' config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lpl_jax.errors import InputError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture and latent convention of an AutoencoderKL.

    Attributes:
      name: what it was loaded from; shown to people, not used in computations.
      latent_channels: channels C of a latent.
      scaling_factor, shift_factor: scaled latent = (raw - shift_factor) * scaling_factor.
      encoder_channels: widths of the encoder's levels, from full resolution down.
      decoder_channels: widths of the decoder's levels, from full resolution down (as diffusers writes it).
      encoder_resnets, decoder_resnets: residual blocks in each level.
      norm_groups: groups of every GroupNorm.
      mid_attention: single-head self-attention in the middle block.
      quant_conv, post_quant_conv: 1x1 convolutions behind the encoder and before the decoder.
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
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"autoencoder dtype {self.dtype!r}: use float32 or bfloat16 (float16 overflows in SD decoders)"
            )
        if len(self.encoder_channels) != len(self.decoder_channels):
            raise InputError(
                f"autoencoder with {len(self.encoder_channels)} encoder levels and {len(self.decoder_channels)} "
                "decoder levels: they must be equally many"
            )
        for width in self.encoder_channels + self.decoder_channels:
            if width % self.norm_groups:
                raise InputError(f"autoencoder width {width} is not divisible by norm_groups={self.norm_groups}")

    @property
    def downsample(self) -> int:
        """Pixels per latent along each side (8 for four levels)."""
        return 2 ** (len(self.encoder_channels) - 1)

    @property
    def num_taps(self) -> int:
        """Feature maps that `features` can return: the middle block and every up block."""
        return 1 + len(self.decoder_channels)

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


def from_diffusers(config: Mapping[str, Any], *, name: str, dtype: str = "float32") -> AutoencoderConfig:
    """The configuration that a diffusers `AutoencoderKL` config.json describes.

    Raises:
      InputError: another class, or an option that this architecture does not have.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise InputError(f"{name}: autoencoder class {kind} is not supported; possible: AutoencoderKL")
    try:
        widths = tuple(config["block_out_channels"])
        layers, latent_channels = config["layers_per_block"], config["latent_channels"]
    except KeyError as error:
        raise InputError(f"{name}: config.json has no field {error.args[0]}; is it an AutoencoderKL's?") from None
    expected = {
        "act_fn": ("silu", "swish"),
        "in_channels": (3,),
        "out_channels": (3,),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    for field, allowed in expected.items():
        if config.get(field, allowed[0]) not in allowed:
            raise InputError(f"{name}: config.json has {field}={config[field]!r}; possible: {allowed[0]!r}")
    for field, allowed in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        blocks = config.get(field, [allowed] * len(widths))
        if list(blocks) != [allowed] * len(widths):
            raise InputError(f"{name}: config.json has {field}={list(blocks)}; possible: {len(widths)} x {allowed}")
    return AutoencoderConfig(
        name=name,
        latent_channels=latent_channels,
        scaling_factor=config.get("scaling_factor") or 0.18215,
        shift_factor=config.get("shift_factor") or 0.0,
        encoder_channels=widths,
        decoder_channels=widths,
        encoder_resnets=layers,
        decoder_resnets=layers + 1,
        norm_groups=config.get("norm_num_groups", 32),
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        post_quant_conv=config.get("use_post_quant_conv", True),
        dtype=dtype,
    )


def to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json of a diffusers `AutoencoderKL` of this architecture: the inverse of `from_diffusers`."""
    if config.encoder_channels != config.decoder_channels or config.decoder_resnets != config.encoder_resnets + 1:
        raise InputError(f"{config.name}: encoder and decoder differ in size; AutoencoderKL has one size for both")
    levels = len(config.encoder_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.encoder_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.encoder_resnets,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
    }
