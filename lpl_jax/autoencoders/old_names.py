"""Names that tensors of autoencoders had in other code: the original LDM's, and diffusers' before version 0.17."""

import re

import numpy as np

from lpl_jax.errors import InputError

# Attention names of diffusers before version 0.17, still found in published files.
_OLD_DIFFUSERS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Parts of a checkpoint of the LDM code's own training that are not the autoencoder.
_TRAINING = ("loss.", "model_ema.")
# Of the original code (github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py), in this order.
# Levels of its decoder are counted from the image, those of diffusers from the latent.
_LDM = (
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)


def modern_names(tensors: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The same tensors under the names, and in the shapes, that diffusers gives them today.

    Raises:
      InputError: a tensor that is there under two of its names.
    """
    levels = {int(match[1]) for name in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(_TRAINING):
            continue
        modern = _modern(name, max(levels, default=0))
        if modern in renamed:
            raise InputError(f"{where} has {modern} twice, under its old name and its new one")
        if ".attentions.0.to_" in modern and tensor.ndim == 4:  # a 1x1 convolution, which a linear layer is
            tensor = tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
        renamed[modern] = tensor
    return renamed


def _modern(name: str, last_level: int) -> str:
    for old, new in _OLD_DIFFUSERS.items():
        name = name.replace(old, new)
    if match := re.match(r"decoder\.up\.(\d+)\.", name):
        name = f"decoder.up.{last_level - int(match[1])}.{name[match.end() :]}"
    for old, new in _LDM:
        name = re.sub(old, new, name)
    return name
