"""Autoencoders from and to files: folders of diffusers' families, single files, and the pair that TAESD comes as."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lpl_jax.autoencoders import inferred
from lpl_jax.autoencoders.autoencoder import Autoencoder, init
from lpl_jax.autoencoders.config import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.autoencoders.diffusers_config import CLASSES, from_diffusers, to_diffusers
from lpl_jax.autoencoders.files import WEIGHTS, find, taesd_pair
from lpl_jax.autoencoders.old_names import modern_names
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.io.hub import pinned
from lpl_jax.io.jsons import read_json
from lpl_jax.io.paths import to_path
from lpl_jax.io.porting import Rule, export_params, import_params
from lpl_jax.io.tensors import Tensor, write_tensors
from lpl_jax.io.weight_files import open_weights, read_weights

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
# A tensor that every autoencoder of a family has, by its name in files.
KL_ANCHOR, TINY_ANCHOR = "decoder.conv_in.weight", "decoder.layers.0.weight"
TAESD_ANCHORS = {"encoder": "1.conv.0.weight", "decoder": "3.conv.0.weight"}  # the first block, in its two files


def load(
    source: str | Path,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Autoencoder:
    """Load a frozen autoencoder.

    Args:
      source: "bundled" (the small one that comes with this package), a local folder or file, or a hub id such as
        "stabilityai/sdxl-vae" (fetched through huggingface_hub). A folder is in diffusers layout, of the class
        AutoencoderKL, AsymmetricAutoencoderKL or AutoencoderTiny; or it holds NAME_encoder.pth and NAME_decoder.pth as
        TAESD is published. A file holds tensors under diffusers' names or those of the original LDM code, alone or in
        a checkpoint with more in it. Weights may be in any form of `io.weight_files` (.bin, .pt, .pth and .ckpt need
        PyTorch). Without a config.json beside them the architecture is read off the tensors (`inferred`).
      subfolder: the autoencoder's folder inside a pipeline's, such as "vae".
      variant: which weights, where there are several and none in full precision: "fp16", "non_ema", "ema", ...
      dtype: compute type, float32 or bfloat16. Parameters are float32 in both, so that their hash is that of the file,
        and a latent store encoded in one is good for the other.

    Raises:
      InputError: nothing there, a damaged file, another architecture, or tensors that do not fit (they are named).
    """
    path = find(source, subfolder)
    name = pinned(source, path) if subfolder is None else f"{pinned(source, path)}/{subfolder}"
    options = dict(name=name, dtype=jnp.dtype(dtype).name)
    raw = _config_beside(path)
    if raw is not None:
        config, tensors = from_diffusers(raw, **options), read_tensors(path, variant=variant)
    else:
        tensors, everything = _read_all(path, variant)
        config = inferred.config(tensors, everything, **options)
    if config.num_blocks > len(tensors):  # the names and shapes of thousands alone take minutes
        raise InputError(
            f"{path}: {config.num_blocks} blocks in its config.json, but {len(tensors)} tensors of weights"
        )
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0))).params
    params = import_params(tensors, rules(config), shapes, where=str(path))
    return Autoencoder(jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params), config)


def read_tensors(path: Path, *, variant: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of an autoencoder in a folder or file, under the names that diffusers gives them today.

    Raises:
      InputError: as of `load`, but for tensors that do not fit each other.
    """
    return _read_all(path, variant)[0]


def _read_all(path: Path, variant: str | None) -> tuple[dict[str, np.ndarray], Mapping[str, Tensor]]:
    """The tensors of the autoencoder, and all that is in the files."""
    if path.is_dir() and not (path / "config.json").is_file() and (pair := taesd_pair(path)):
        return read_taesd(*pair), {}
    weights = open_weights(path, variant=variant)
    return modern_names(weights.read((KL_ANCHOR, TINY_ANCHOR)), str(path)), weights.tensors


def _config_beside(path: Path) -> dict | None:
    """The config.json in a folder, or beside a file where it is an autoencoder's; None where there is none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return None
    raw = read_json(config)
    return raw if path.is_dir() or raw.get("_class_name") in CLASSES else None


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


def read_taesd(encoder: Path, decoder: Path) -> dict[str, np.ndarray]:
    """The tensors of TAESD's original two files, under the names that diffusers gives them.

    The original's decoder counts the clamp of the latents as its layer 0, so that its numbers are one higher.
    """
    tensors = {}
    for side, path, first in (("encoder", encoder, 0), ("decoder", decoder, 1)):
        for name, tensor in read_weights(path, (TAESD_ANCHORS[side],)).items():
            layer, _, rest = name.partition(".")
            number = int(layer) - first if layer.isdecimal() else layer
            tensors[f"{side}.layers.{number}.{rest}"] = tensor
    return tensors
