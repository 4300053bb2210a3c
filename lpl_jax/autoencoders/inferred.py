"""The configuration that the tensors of an autoencoder imply, where no config.json is beside them.

Shapes do not tell two things. The groups of the norms are taken to be the 32 of every published KL autoencoder. The
scale of the latents is taken to be what diffusers assumes: that of the model whose checkpoint the file is, and Stable
Diffusion 1's where nothing tells; a line on stderr says so.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from lpl_jax.autoencoders.config import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.errors import InputError
from lpl_jax.io.tensors import Tensor

_NORM_GROUPS = 32
# Part of a name that only a checkpoint of this model has -> (the model, what its latents are scaled by).
_SCALES: dict[str, tuple[str, dict[str, float]]] = {
    "conditioner.embedders.": ("Stable Diffusion XL", {"scaling_factor": 0.13025}),
    "joint_blocks.0.": ("Stable Diffusion 3", {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "double_blocks.0.": ("FLUX.1", {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
}
_PLAYGROUND = 0.5  # with statistics of every channel, "edm_mean" and "edm_std", in the file


def config(
    tensors: Mapping[str, np.ndarray], everything: Mapping[str, Tensor], *, name: str, dtype: str = "float32"
) -> AutoencoderConfig | TinyAutoencoderConfig:
    """The architecture of an autoencoder of any family.

    Args:
      tensors: under diffusers' names. everything: all that its files hold, which tells what model it is of.
      name, dtype: as of the configuration.

    Raises:
      InputError: tensors of something else, or what they do not tell.
    """
    if "decoder.conv_in.weight" in tensors:
        return _kl(tensors, everything, name, dtype)
    if "decoder.layers.0.weight" in tensors:
        return tiny(tensors, name=name, dtype=dtype)
    raise InputError(
        f"{name} holds no autoencoder of a known layout, and there is no config.json: no tensor is named "
        "decoder.conv_in.weight (KL, of diffusers or LDM) or decoder.layers.0.weight (TAESD)"
    )


def _kl(tensors, everything, name: str, dtype: str) -> AutoencoderConfig:
    encoder, encoder_resnets = _levels(tensors, "encoder.down_blocks")
    decoder, decoder_resnets = _levels(tensors, "decoder.up_blocks")
    if odd := [width for width in encoder + decoder if width % _NORM_GROUPS]:
        raise InputError(
            f"{name}: {_NORM_GROUPS} groups, as every published KL autoencoder has, do not divide its width {odd[0]}, "
            "and tensors do not tell another number: put diffusers' config.json beside the file"
        )
    known: dict[str, Any] = dict(
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        encoder_channels=encoder,
        decoder_channels=decoder[::-1],
        encoder_resnets=encoder_resnets,
        decoder_resnets=decoder_resnets,
        norm_groups=_NORM_GROUPS,
        mid_attention=any(".mid_block.attentions." in key for key in tensors),
        quant_conv="quant_conv.weight" in tensors,
        post_quant_conv="post_quant_conv.weight" in tensors,
        mask_condition=any(".condition_encoder." in key for key in tensors),
    )
    return AutoencoderConfig(name=name, dtype=dtype, **known, **_scale(known, everything, name))


def _levels(tensors: Mapping[str, np.ndarray], prefix: str) -> tuple[tuple[int, ...], int]:
    """Widths of the blocks, in order, and residual blocks in each; of nothing, what `AutoencoderConfig` refuses."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    found = {(int(match[1]), int(match[2])): key for key in tensors if (match := pattern.fullmatch(key))}
    widths = tuple(tensors[found[block]].shape[0] for block in sorted(found) if block[1] == 0)
    return widths, 1 + max((resnet for _, resnet in found), default=-1)


def _scale(known: Mapping[str, Any], everything: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The scale of the latents, by what else is in the files."""
    if {"edm_mean", "edm_std"} <= everything.keys():
        mean, std = (tuple(everything[entry].read().ravel().tolist()) for entry in ("edm_mean", "edm_std"))
        statistics = {"latents_mean": mean, "latents_std": std}
        return _said(name, "Playground 2.5", {"scaling_factor": _PLAYGROUND, **statistics})
    for sign, (model, values) in _SCALES.items():
        if any(sign in key for key in everything):
            return _said(name, model, values)
    if known["latent_channels"] == 16 and not known["quant_conv"]:
        raise InputError(
            f"{name}: Stable Diffusion 3's and FLUX.1's autoencoders have these shapes and other scales of the "
            "latents: put diffusers' config.json beside the file"
        )
    return _said(name, "Stable Diffusion 1, as diffusers assumes where nothing tells", {"scaling_factor": 0.18215})


def _said(name: str, model: str, values: dict[str, Any]) -> dict[str, Any]:
    text = ", ".join(f"{field}={value}" for field, value in values.items())
    print(f"{name}: no config.json; latents are scaled as those of {model}: {text}", file=sys.stderr, flush=True)
    return values


def tiny(tensors: Mapping[str, np.ndarray], *, name: str, dtype: str = "float32") -> TinyAutoencoderConfig:
    """The architecture that TAESD's tensors imply: the original files have no configuration beside them.

    Latents are taken as they are (scaling factor 1), as diffusers does for this family.
    """
    blocks = {}
    for side in ("encoder", "decoder"):
        found = re.findall(rf"^{side}\.layers\.(\d+)\.(conv\.0\.)?weight$", "\n".join(tensors), re.MULTILINE)
        layers = sorted((int(number), bool(inside)) for number, inside in found)
        sequence = "".join("b" if inside else "|" for _, inside in layers)  # such as |b|bbb|bbb|bbb|
        blocks[side] = tuple(len(level) for level in sequence.split("|")[1:-1])
    ends = [tensors[key] for side in blocks if (key := f"{side}.layers.0.weight") in tensors]
    if [end.ndim for end in ends] != [4, 4] or not all(blocks.values()):
        raise InputError(f"{name}: the tensors are not TAESD's: no convolution at the head of encoder and decoder")
    return TinyAutoencoderConfig(
        name=name,
        latent_channels=ends[1].shape[1],
        encoder_width=ends[0].shape[0],
        decoder_width=ends[1].shape[0],
        encoder_blocks=blocks["encoder"],
        decoder_blocks=blocks["decoder"],
        midblock_norm=any(".pool." in key for key in tensors),
        dtype=dtype,
    )
