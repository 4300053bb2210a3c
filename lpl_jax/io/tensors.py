"""JSON objects and named tensors from files of others, of which nothing is ever executed; tensors into files."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lpl_jax.errors import InputError
from lpl_jax.io.atomic import atomic_path
from lpl_jax.io.paths import AnyPath, PathLike, to_path

# Name in safetensors -> name in PyTorch.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json(path: AnyPath) -> dict:
    """The JSON object in a file. Raises InputError where the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content


def read_folder(
    folder: Path, names: Sequence[str], *, torch_files: bool = False, ignore: str | tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """All tensors of a folder, as float32.

    Args:
      names: possible files in the order of preference, of which the first that exists is read; one that ends in .json
        is an index, with a `weight_map` from tensors to the files beside it over which they are spread.
      torch_files, ignore: see `read_file`.

    Raises:
      InputError: no such file, an index that does not fit its files, or a file that `read_file` refuses.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        only = "" if torch_files else " (only safetensors are read)"
        raise InputError(f"{folder} has neither {' nor '.join(names)}{only}")
    if path.suffix != ".json":
        return read_file(path, torch_files=torch_files, ignore=ignore)
    files = _read_index(path, torch_files)
    tensors, found = {}, set()
    for shard in sorted(set(files.values())):
        part = read_file(folder / shard, torch_files=torch_files, ignore=ignore)
        if twice := sorted(tensors.keys() & part.keys()):
            raise InputError(f"{folder / shard} repeats tensors of another part: {', '.join(twice)}")
        tensors |= part
        found |= {(name, shard) for name in part}
    if astray := sorted(name for name, shard in files.items() - found if not name.endswith(ignore)):
        raise InputError(f"{path} names tensors that are not where it says: {', '.join(astray)}")
    return tensors


def _read_index(path: Path, torch_files: bool) -> dict[str, str]:
    """Tensor name -> name of the file beside the index, which exists."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(shard, str) for shard in files.values()):
        raise InputError(f"{path} has no weight_map of tensor names to file names")
    endings = ("safetensors", "bin") if torch_files else ("safetensors",)
    shards = sorted(set(files.values()))
    pattern = rf"[\w.-]+\.({'|'.join(endings)})"  # a path would leave the folder
    if outside := [shard for shard in shards if not re.fullmatch(pattern, shard)]:
        possible = " or ".join(f".{ending}" for ending in endings)
        raise InputError(f"{path} names {', '.join(map(repr, outside))}; possible: {possible} files beside it")
    if absent := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise InputError(f"{path.parent} lacks {', '.join(absent)}, which {path.name} names")
    return files


def read_file(path: Path, *, torch_files: bool = False, ignore: str | tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The tensors of one file, as float32.

    Args:
      torch_files: whether a file that is not named .safetensors is read with PyTorch, as .bin and .pth files need;
        otherwise every file has to be a safetensors file.
      ignore: ending, or endings, of the names of tensors that are left out, whatever they are.

    Raises:
      InputError: missing, damaged, holding something else than floating-point tensors, or with values that are not
        finite (all are named).
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    by_torch = torch_files and path.suffix != ".safetensors"
    tensors = (_read_torch if by_torch else _read_safetensors)(path, ignore)
    if broken := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
        raise InputError(f"{path} has infinite or undefined values in {', '.join(broken)}")
    return tensors


def write_file(path: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """A new safetensors file of a PyTorch state dict, which `read_file` reads.

    Raises:
      InputError: another ending than .safetensors, or a file that exists, which is not overwritten.
    """
    path = to_path(path)
    if path.suffix != ".safetensors" or path.exists():
        raise InputError(f"{path}: a new file is needed, with the ending .safetensors")
    write_tensors(path, tensors)


def _read_safetensors(path: Path, ignore: str | tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if not name.endswith(ignore)]  # noqa: SIM118
            _check_dtypes(path, {name: file.get_slice(name).get_dtype() for name in names}, DTYPES)
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_torch(path: Path, ignore: str | tuple[str, ...]) -> dict[str, np.ndarray]:
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
    tensors = {str(name): tensor for name, tensor in tensors.items() if not str(name).endswith(ignore)}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    _check_dtypes(path, dtypes, DTYPES.values())
    return {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}


def _check_dtypes(path: Path, dtypes: dict[str, str], possible: Collection[str]) -> None:
    if odd := [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in possible]:
        raise InputError(f"{path}: {', '.join(odd)} given, possible dtypes are {', '.join(possible)}")


def write_tensors(
    path: PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = MappingProxyType({"format": "pt"})
) -> None:
    """A safetensors file of named tensors. Written atomically, in place of the one that is there.

    metadata: texts in its head; readers of PyTorch's files ask for "format".
    """
    with atomic_path(path, replace=True) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.chmod(mode)  # as every new file is; safetensors lets nobody but the owner read it
