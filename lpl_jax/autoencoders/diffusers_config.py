"""Autoencoder configurations from and to diffusers' config.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from lpl_jax.autoencoders.config import MAX_LEVELS, AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.errors import InputError
from lpl_jax.fields import fits

# diffusers has no class for TAESD with a norm in its middle blocks; our folders name it so.
TINY_MIDBLOCK = "AutoencoderTinyMidblockNorm"


def from_diffusers(config: Mapping[str, Any], *, name: str, dtype: str = "float32"):
    """The configuration (`AutoencoderConfig` or `TinyAutoencoderConfig`) that a diffusers config.json describes.

    Raises:
      InputError: another class, a field that is missing, or an option that this architecture does not have.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if not isinstance(kind, str) or kind not in _READERS:
        raise InputError(
            f"{name}: autoencoder class {str(kind)[:40]} is not supported; possible: {', '.join(_READERS)}"
        )
    try:
        return _READERS[kind](config, name, dtype)
    except KeyError as error:
        raise InputError(f"{name}: config.json has no field {error.args[0]}; is it an {kind}'s?") from None
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None


def _expect(config: Mapping[str, Any], name: str, **fields: tuple) -> None:
    for field, allowed in fields.items():
        if config.get(field, allowed[0]) not in allowed:
            raise InputError(f"{name}: config.json has {field}={_shown(config[field])}; possible: {_shown(allowed[0])}")


def _widths(config: Mapping[str, Any], name: str, field: str) -> tuple:
    if not isinstance(config[field], list | tuple) or len(config[field]) > MAX_LEVELS:
        possible = f"a list of up to {MAX_LEVELS} whole numbers"
        raise InputError(f"{name}: config.json has {field}={_shown(config[field])}; possible: {possible}")
    return tuple(config[field])


def _common(config: Mapping[str, Any], name: str, dtype: str) -> dict[str, Any]:
    _expect(config, name, in_channels=(3,), out_channels=(3,))
    statistics = {field: _statistic(config, name, field) for field in ("latents_mean", "latents_std")}
    return dict(name=name, latent_channels=config["latent_channels"], dtype=dtype, **statistics)


def _statistic(config: Mapping[str, Any], name: str, field: str) -> tuple[float, ...] | None:
    """A number for each channel, however it is nested: (C,), or (1, C, 1, 1)."""
    given = config.get(field)
    if given is None:
        return None
    numbers = tuple(_numbers_in(given))
    if not all(fits(number, float) for number in numbers):
        raise InputError(f"{name}: config.json has {field}={_shown(given)}; possible: a number for each channel")
    return tuple(map(float, numbers))


def _numbers_in(given: Any) -> Iterator[Any]:
    if isinstance(given, list | tuple):
        for each in given:
            yield from _numbers_in(each)
    else:
        yield given


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _count(config: Mapping[str, Any], name: str, field: str) -> int:
    if not fits(config[field], int):
        raise InputError(f"{name}: config.json has {field}={_shown(config[field])}; possible: a whole number")
    return config[field]


def _switch(config: Mapping[str, Any], name: str, field: str) -> bool:
    if not isinstance(given := config.get(field, True), bool):
        raise InputError(f"{name}: config.json has {field}={_shown(given)}; possible: true or false")
    return given


def _kl_common(config: Mapping[str, Any], name: str, dtype: str, encoder: tuple, decoder: tuple) -> dict[str, Any]:
    down, up = ["DownEncoderBlock2D"] * len(encoder), ["UpDecoderBlock2D"] * len(decoder)
    # config.json holds lists, a configuration in memory may hold tuples
    _expect(
        config, name, act_fn=("silu", "swish"), down_block_types=(down, tuple(down)), up_block_types=(up, tuple(up))
    )
    return dict(
        encoder_channels=encoder,
        decoder_channels=decoder,
        scaling_factor=config.get("scaling_factor", 0.18215),
        norm_groups=config.get("norm_num_groups", 32),
        **_common(config, name, dtype),
    )


def _read_kl(config, name, dtype):
    widths, layers = _widths(config, name, "block_out_channels"), _count(config, name, "layers_per_block")
    return AutoencoderConfig(
        **_kl_common(config, name, dtype, widths, widths),
        shift_factor=config.get("shift_factor") or 0.0,
        encoder_resnets=layers,
        decoder_resnets=layers + 1,
        mid_attention=_switch(config, name, "mid_block_add_attention"),
        quant_conv=_switch(config, name, "use_quant_conv"),
        post_quant_conv=_switch(config, name, "use_post_quant_conv"),
    )


def _read_asymmetric(config, name, dtype):
    encoder, decoder = (_widths(config, name, f"{side}_block_out_channels") for side in ("down", "up"))
    return AutoencoderConfig(
        **_kl_common(config, name, dtype, encoder, decoder),
        encoder_resnets=_count(config, name, "layers_per_down_block"),
        decoder_resnets=_count(config, name, "layers_per_up_block") + 1,
        mask_condition=True,
    )


def _read_tiny(config, name, dtype):
    _expect(config, name, act_fn=("relu",), upsample_fn=("nearest",), upsampling_scaling_factor=(2,))
    width = {}
    for side in ("encoder", "decoder"):
        widths = _widths(config, name, f"{side}_block_out_channels")
        if len(set(map(str, widths))) != 1:
            raise InputError(f"{name}: config.json has {side}_block_out_channels={widths}; possible: one and the same")
        width[side] = widths[0]
    return TinyAutoencoderConfig(
        **_common(config, name, dtype),
        scaling_factor=config.get("scaling_factor", 1.0),
        shift_factor=config.get("shift_factor") or 0.0,
        encoder_width=width["encoder"],
        decoder_width=width["decoder"],
        encoder_blocks=_widths(config, name, "num_encoder_blocks"),
        decoder_blocks=_widths(config, name, "num_decoder_blocks"),
        midblock_norm=config.get("_class_name") == TINY_MIDBLOCK,
    )


_READERS = {
    "AutoencoderKL": _read_kl,
    "AsymmetricAutoencoderKL": _read_asymmetric,
    "AutoencoderTiny": _read_tiny,
    TINY_MIDBLOCK: _read_tiny,
}
CLASSES = tuple(_READERS)


def to_diffusers(config: AutoencoderConfig | TinyAutoencoderConfig) -> dict[str, Any]:
    """The config.json of a diffusers autoencoder of this architecture: the inverse of `from_diffusers`."""
    common = {
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
    }
    if config.latents_mean is not None and config.latents_std is not None:
        common |= {"latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std)}
    if isinstance(config, TinyAutoencoderConfig):
        levels = len(config.encoder_blocks)
        return common | {
            "_class_name": TINY_MIDBLOCK if config.midblock_norm else "AutoencoderTiny",
            "act_fn": "relu",
            "decoder_block_out_channels": [config.decoder_width] * levels,
            "encoder_block_out_channels": [config.encoder_width] * levels,
            "num_decoder_blocks": list(config.decoder_blocks),
            "num_encoder_blocks": list(config.encoder_blocks),
            "shift_factor": config.shift_factor,
            "upsample_fn": "nearest",
            "upsampling_scaling_factor": 2,
        }
    levels = len(config.encoder_channels)
    common |= {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "norm_num_groups": config.norm_groups,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    if config.mask_condition:
        return common | {
            "_class_name": "AsymmetricAutoencoderKL",
            "down_block_out_channels": list(config.encoder_channels),
            "layers_per_down_block": config.encoder_resnets,
            "layers_per_up_block": config.decoder_resnets - 1,
            "up_block_out_channels": list(config.decoder_channels),
        }
    if config.encoder_channels != config.decoder_channels or config.decoder_resnets != config.encoder_resnets + 1:
        raise InputError(f"{config.name}: encoder and decoder differ in size; AutoencoderKL has one size for both")
    return common | {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.encoder_channels),
        "layers_per_block": config.encoder_resnets,
        "mid_block_add_attention": config.mid_attention,
        "shift_factor": config.shift_factor or None,
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
    }
