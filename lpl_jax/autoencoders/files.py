"""Where autoencoder files are found and how their tensors are read. Nothing in a file is ever executed."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

from lpl_jax.errors import InputError

BUNDLED = Path(__file__).parent / "bundled"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
# In the order of preference; an index names the files over which the tensors are spread.
FORMATS = tuple(
    STEM + ending
    for ending in (
        ".safetensors",
        ".fp16.safetensors",
        ".safetensors.index.json",
        ".bin",
        ".fp16.bin",
        ".bin.index.json",
    )
)


def find_folder(source: str | Path, subfolder: str | None) -> Path:
    """The local folder of `source`, fetched from the hub where `source` is a hub id."""
    if str(source) == "bundled":
        return BUNDLED
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = folder / subfolder if subfolder else folder
        if (found / "config.json").is_file() or taesd_pair(found):
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
    safe = [prefix + name for name in ("config.json", f"{STEM}*.safetensors", f"{STEM}*.safetensors.index.json")]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=safe)) / prefix
        if not any((folder / name).is_file() for name in FORMATS):  # an old repository with .bin files only
            snapshot_download(hub_id, allow_patterns=[prefix + f"{STEM}*.bin", prefix + f"{STEM}*.bin.index.json"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{hub_id!r} is neither a folder nor to be had from the hub: {reason}") from error
    return find_folder(folder, None)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a diffusers folder (safetensors or .bin, in one file or several), as float32."""
    path = next((folder / name for name in FORMATS if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder} has no {WEIGHTS}, nor it in parts or as .bin")
    if path.suffix != ".json":
        return read_file(path)
    tensors = {}
    for name in _shards(path):
        part = read_file(folder / name)
        if twice := sorted(tensors.keys() & part.keys()):
            raise InputError(f"{folder / name} repeats tensors of another part: {', '.join(twice)}")
        tensors |= part
    return tensors


def _shards(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index} has no weight_map from tensors to files")
    names = sorted({str(name) for name in files.values()})
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):  # a path would leave the folder
            raise InputError(f"{index} names the file {name!r}; possible: .safetensors or .bin files beside it")
    return names


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one .safetensors, .bin or .pth file, as float32.

    Raises:
      InputError: missing, damaged, holding something else than tensors, or with values that are not finite.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if broken := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
        raise InputError(f"{path} has infinite or undefined values in {', '.join(broken)}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:  # through JAX, because NumPy alone has no bfloat16
        return {name: np.asarray(tensor, np.float32) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a type that JAX does not have
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} can only be read with PyTorch: pip install torch, or use a safetensors file"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the restricted unpickler meets in a damaged or hostile file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or holds more than tensors; code in it is not run: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} is not a state dict: names with tensors are needed and nothing else")
    return {str(name): tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}


def taesd_pair(folder: Path) -> tuple[Path, Path] | None:
    """The files NAME_encoder.pth and NAME_decoder.pth of the original TAESD layout, None where there are none."""
    pairs = [
        (encoder, decoder)
        for encoder in sorted(folder.glob("*_encoder.pth"))
        if (decoder := encoder.with_name(encoder.name.replace("_encoder.pth", "_decoder.pth"))).is_file()
    ]
    if len(pairs) > 1:
        names = ", ".join(encoder.name for encoder, _ in pairs)
        raise InputError(f"{folder} has several autoencoders ({names}): put the pair that you want into a folder alone")
    return pairs[0] if pairs else None
