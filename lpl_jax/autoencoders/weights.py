"""Autoencoders from and to files: diffusers folders of every family, and the pair of .pth files that TAESD comes as."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lpl_jax.autoencoders.autoencoder import Autoencoder, init
from lpl_jax.autoencoders.config import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.autoencoders.diffusers_config import from_diffusers, to_diffusers
from lpl_jax.autoencoders.files import FORMATS, WEIGHTS, find_folder, taesd_pair
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.io.paths import to_path
from lpl_jax.io.porting import Rule, export_params, import_params
from lpl_jax.io.tensors import read_file, read_folder, read_json, write_tensors

KL_RULES = (
    Rule("quant_conv", "encoder/quant_conv"),
    Rule("post_quant_conv", "decoder/post_quant_conv"),
    Rule("{side}.conv_norm_out", "{side}/norm_out"),
    Rule("{side}.mid_block.resnets.{i}.{part}", "{side}/mid/resnet_{i}/{part}"),
    Rule("{side}.mid_block.attentions.0.to_out.0", "{side}/mid/attention/to_out"),
    Rule("{side}.mid_block.attentions.0.{part}", "{side}/mid/attention/{part}"),
    Rule("encoder.down_blocks.{i}.resnets.{j}.{part}", "encoder/down_{i}/resnet_{j}/{part}"),
    Rule("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder/down_{i}/downsample"),
    Rule("decoder.up_blocks.{i}.resnets.{j}.{part}", "decoder/up_{i}/resnet_{j}/{part}"),
    Rule("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder/up_{i}/upsample"),
    Rule("decoder.condition_encoder.layers.{i}", "decoder/condition_encoder/layers_{i}"),
    Rule("{side}.{part}", "{side}/{part}"),  # conv_in, conv_out
)
TINY_RULES = (
    Rule("{side}.layers.{i}.conv.{j}", "{side}/layers_{i}/conv_{j}"),
    Rule("{side}.layers.{i}.pool.{j}", "{side}/layers_{i}/pool_{j}"),
    Rule("{side}.layers.{i}", "{side}/layers_{i}"),
)
# Attention names of diffusers before version 0.17, still found in published files.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load(source: str | Path, *, subfolder: str | None = None, dtype: DTypeLike = jnp.float32) -> Autoencoder:
    """Load a frozen autoencoder.

    Args:
      source: "bundled" (the small one that comes with this package), a local folder, or a hub id such as
        "stabilityai/sdxl-vae" (fetched through huggingface_hub). A folder is in diffusers layout, of the class
        AutoencoderKL, AsymmetricAutoencoderKL or AutoencoderTiny, in one file or several, safetensors or .bin (the
        latter needs PyTorch); or it holds NAME_encoder.pth and NAME_decoder.pth as TAESD is published.
      subfolder: the autoencoder's folder inside a pipeline's, such as "vae".
      dtype: compute type, float32 or bfloat16. Parameters are float32 in both, so that their hash is that of the file,
        and a latent store encoded in one is good for the other.

    Raises:
      InputError: nothing there, a damaged file, another architecture, or tensors that do not fit (all are named).
    """
    folder = find_folder(source, subfolder)
    name = str(source) if subfolder is None else f"{source}/{subfolder}"
    if (folder / "config.json").is_file() or not (pair := taesd_pair(folder)):
        config = from_diffusers(read_json(folder / "config.json"), name=name, dtype=jnp.dtype(dtype).name)
        tensors = modern_names(read_folder(folder, FORMATS, torch_files=True), folder)
    else:
        tensors = read_taesd(*pair)
        config = taesd_config(tensors, name=name, dtype=jnp.dtype(dtype).name)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0))).params
    params = import_params(tensors, rules(config), shapes, where=str(folder))
    return Autoencoder(jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params), config)


def save(autoencoder: Autoencoder, folder: str | Path) -> None:
    """Write a folder that `from_pretrained` of the family's class in diffusers reads.

    A tiny autoencoder with `midblock_norm` has no class in diffusers; its folder is AutoencoderTiny's with the branch's
    tensors beside the others (`SIDE.layers.N.pool.0`, `.1` and `.3`) and "AutoencoderTinyMidblockNorm" as the class.

    Raises:
      InputError: the folder already has weights, which are not overwritten.
    """
    folder = to_path(folder)
    if (folder / WEIGHTS).exists():
        raise InputError(f"{folder / WEIGHTS} exists: choose another folder")
    config = to_diffusers(autoencoder.config)
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), autoencoder.params)
    tensors = export_params(params, rules(autoencoder.config))
    write_json(folder / "config.json", config, indent=2, sort_keys=True)
    write_tensors(folder / WEIGHTS, tensors)


def rules(config: AutoencoderConfig | TinyAutoencoderConfig) -> tuple[Rule, ...]:
    """The family's table of names."""
    return TINY_RULES if isinstance(config, TinyAutoencoderConfig) else KL_RULES


def modern_names(tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The same tensors under the names that diffusers uses today."""
    renamed = {}
    for name, tensor in tensors.items():
        modern = name
        for old, new in OLD_ATTENTION.items():
            modern = modern.replace(old, new)
        if modern in renamed:
            raise InputError(f"{folder} has {modern} twice, under its old name and its new one")
        renamed[modern] = tensor
    return renamed


def read_taesd(encoder: Path, decoder: Path) -> dict[str, np.ndarray]:
    """The tensors of TAESD's original two files, under the names that diffusers gives them.

    The original's decoder counts the clamp of the latents as its layer 0, so that its numbers are one higher.
    """
    tensors = {}
    for side, path, first in (("encoder", encoder, 0), ("decoder", decoder, 1)):
        for name, tensor in read_file(path, torch_files=True).items():
            layer, _, rest = name.partition(".")
            number = int(layer) - first if layer.isdecimal() else layer
            tensors[f"{side}.layers.{number}.{rest}"] = tensor
    return tensors


def taesd_config(tensors: dict[str, np.ndarray], *, name: str, dtype: str = "float32") -> TinyAutoencoderConfig:
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
        raise InputError(f"{name}: the .pth files are not TAESD's: no convolution at the head of encoder and decoder")
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
