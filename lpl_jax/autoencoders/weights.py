"""Autoencoders in diffusers' folder layout: config.json beside diffusion_pytorch_model.safetensors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lpl_jax.autoencoders.autoencoder import Autoencoder, init
from lpl_jax.autoencoders.config import from_diffusers, to_diffusers
from lpl_jax.errors import InputError
from lpl_jax.porting import Rule, export_params, import_params

BUNDLED = Path(__file__).parent / "bundled"
WEIGHTS = "diffusion_pytorch_model.safetensors"

RULES = (
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
    Rule("{side}.{part}", "{side}/{part}"),  # conv_in, conv_out
)
# Attention names of diffusers before version 0.17, still found in published files.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load(source: str | Path, *, subfolder: str | None = None, dtype=jnp.float32) -> Autoencoder:
    """Load a frozen autoencoder.

    Args:
      source: "bundled" (the small one that comes with this package), a local folder in diffusers layout, or a hub id
        such as "stabilityai/sdxl-vae" (fetched through huggingface_hub).
      subfolder: the autoencoder's folder inside a pipeline's, such as "vae".
      dtype: compute type, float32 or bfloat16; in bfloat16 the convolution kernels are stored so, too.
    Raises:
      InputError: nothing there, a damaged file, another architecture, or tensors that do not fit (all are named).
    """
    folder = find_folder(source, subfolder)
    name = str(source) if subfolder is None else f"{source}/{subfolder}"
    config = from_diffusers(read_json(folder / "config.json"), name=name, dtype=jnp.dtype(dtype).name)
    tensors = {modern_name(key): value for key, value in read_tensors(folder).items()}
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0))).params
    params = import_params(tensors, RULES, shapes, where=str(folder))

    def cast(array):
        return jnp.asarray(array, dtype if array.ndim > 1 else jnp.float32)

    return Autoencoder(jax.tree.map(cast, params), config)


def save(autoencoder: Autoencoder, folder: str | Path) -> None:
    """Write a folder that diffusers' `AutoencoderKL.from_pretrained` reads. Refuses to write over an existing file."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        raise InputError(f"{folder / WEIGHTS} exists: choose another folder")
    config = to_diffusers(autoencoder.config)
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), autoencoder.params)
    tensors = export_params(params, RULES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def modern_name(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name


def find_folder(source: str | Path, subfolder: str | None) -> Path:
    """The local folder of `source`, fetched from the hub where `source` is a hub id."""
    if str(source) == "bundled":
        return BUNDLED
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = folder / subfolder if subfolder else folder
        if (found / "config.json").is_file():
            return found
        hint = "; try subfolder='vae'" if (found / "vae" / "config.json").is_file() else ""
        raise InputError(f"{found} has no config.json: not a diffusers autoencoder folder{hint}")
    if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise InputError(
            f"no autoencoder at {str(source)!r}: give 'bundled', an existing folder in diffusers layout, "
            "or a hub id owner/name"
        )
    return _download(str(source), subfolder)


def _download(hub_id: str, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(hub_id, allow_patterns=[prefix + "config.json", prefix + "*.safetensors"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{hub_id!r} is neither a folder nor to be had from the hub: {reason}") from error
    return find_folder(Path(root), subfolder)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the folder's safetensors file, as float32."""
    candidates = [folder / WEIGHTS, folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder} has no {WEIGHTS}")
    try:
        return {name: np.asarray(tensor, np.float32) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
