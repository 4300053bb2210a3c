"""Named tensors from files of others, of which nothing is ever executed; tensors into files."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lpl_jax.errors import InputError, some
from lpl_jax.io.atomic import atomic_path
from lpl_jax.io.paths import PathLike, to_path
from lpl_jax.io.texts import not_downloaded

# Name in safetensors -> name in PyTorch.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Types of numbers that count or index; no parameter of a network here is of one.
COUNTS = ("I64", "I32", "BOOL", "int64", "int32", "bool")
# Last part of the name of a tensor that a trainer keeps beside the parameters, or a constant of older files.
COUNTERS = (
    "num_batches_tracked",
    "position_ids",
    "step",
    "global_step",
    "num_updates",
    "decay",
    "initted",
    "n_averaged",
)


MAX_DEPTH = 16  # of dictionaries in each other


class Tensor(NamedTuple):
    """A tensor in a file: its type, as the file's format names it, and how its values are read."""

    dtype: str
    read: Callable[[], np.ndarray]  # as float32


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The parameters in one file, as float32: safetensors or, where PyTorch is installed, what `torch.save` writes.

    Raises:
      InputError: missing, damaged, a type of numbers that is not read, or values that are not finite (all are named).
    """
    return read_tensors(parameters(open_file(path)), str(path))


def parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without counters and indices (`COUNTS`, `COUNTERS`), which are no parameters of a network."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype not in COUNTS and name.rpartition(".")[2] not in COUNTERS
    }


def read_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, np.ndarray]:
    """The values of tensors in files, float32; `where` they are, for messages.

    Raises:
      InputError: another type than floating-point numbers of 16, 32 or 64 bits, or values that are not finite.
    """
    possible = (*DTYPES, *DTYPES.values())
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in possible]:
        raise InputError(f"{where}: {some(odd)} given, possible dtypes are {', '.join(DTYPES)}")
    result = {name: tensor.read() for name, tensor in tensors.items()}
    if broken := sorted(name for name, array in result.items() if not np.isfinite(array).all()):
        raise InputError(f"{where} has infinite or undefined values in {some(broken)}")
    return result


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, to be read one by one; dictionaries in dictionaries become names with dots.

    What the file is shows in its first bytes, not in its name.

    Raises:
      InputError: missing, damaged, not a file of tensors, or one of PyTorch where that is not installed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        if kind := not_downloaded(file.read(256)):
            raise InputError(f"{path} is {kind}")
    return _open_torch(path) if _is_torch(path) else _open_safetensors(path)


def _is_torch(path: Path) -> bool:
    """Whether the first bytes are of a zip file or a pickle, the two forms of `torch.save`; else it is safetensors."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] != b"{" and head.startswith((b"PK", b"\x80"))


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, "np").__enter__()  # stays open as long as a tensor of it is wanted
        names = file.keys()
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is damaged, cut short or not a file of weights, of safetensors or PyTorch: {error}"
        ) from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(file.get_tensor(name), np.float32)

    return {name: Tensor(dtype, reader(name)) for name, dtype in dtypes.items()}


class _Inert:
    """Stands in a pickle for whatever is not a tensor: it takes everything and does nothing."""

    def __new__(cls, *_args, **_kwargs):
        return object.__new__(cls)

    def __init__(self, *_args, **_kwargs):
        pass

    def __setstate__(self, state):
        pass


def _open_torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} can only be read with PyTorch: pip install torch, or use a safetensors file"
        ) from None
    try:
        content = _load_torch(path)
    except Exception as error:  # whatever the restricted unpickler meets in a damaged or hostile file
        # Before what it met, PyTorch advises to run the code.
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[0].partition(". ")[0][:200]
        raise InputError(
            f"{path} is damaged or holds more than tensors; code in it is not run ({reason}): use safetensors"
        ) from error
    tensors = dict(_flat(content, "", torch.Tensor)) if isinstance(content, Mapping) else {}
    if not tensors:
        raise InputError(f"{path} is not a state dict: names with tensors are needed; code in it is not run")
    size = path.stat().st_size
    for name, tensor in tensors.items():  # a view may repeat a number without end, or be laid out as no array is
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"{path}: {_named(name)} is no plain array of numbers")
        if tensor.numel() * tensor.element_size() > size:
            raise InputError(
                f"{path}: {_named(name)} has {tensor.numel():,} numbers, more than the file of {size:,} bytes"
            )

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        return lambda: tensor.detach().to(torch.float32).numpy()

    names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return {name: Tensor(names[name], reader(tensor)) for name, tensor in tensors.items()}


def _load_torch(path: Path) -> Any:
    """What `torch.save` wrote, with nothing run: objects that are no tensors (a trainer's options) come as `_Inert`."""
    import torch

    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with path.open("rb") as file:  # given a path, PyTorch goes by the ending
        if not zipfile.is_zipfile(path):  # as PyTorch wrote before 1.6
            return torch.load(file, **options)
        others: list[Any] = [(_Inert, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)]
        file.seek(0)
        _check_stored(path)
        source = dict(f=file) if path.suffix == ".safetensors" else dict(f=path, mmap=True)
        with torch.serialization.safe_globals(others):
            return torch.load(**source, **options)


def _check_stored(path: Path) -> None:
    """Raises ValueError where a zip file is larger inside than outside: `torch.save` compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        inside, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if inside > size:
        raise ValueError(f"{inside:,} bytes in a file of {size:,}")


def _flat(content: Mapping, prefix: str, kind: type, depth: int = 0) -> Any:
    """(name, tensor) of all tensors in dictionaries in dictionaries, which may hold each other."""
    for name, value in content.items():
        if isinstance(value, kind):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _flat(value, f"{prefix}{name}.", kind, depth + 1)


def _named(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def write_file(path: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """A new safetensors file of a PyTorch state dict, which `read_file` reads.

    Raises:
      InputError: another ending than .safetensors, or a file that exists, which is not overwritten.
    """
    path = to_path(path)
    if path.suffix != ".safetensors" or path.exists():
        raise InputError(f"{path}: a new file is needed, with the ending .safetensors")
    write_tensors(path, tensors)


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
