"""Arrays in .npy and .npz files of anybody. Nothing is unpickled, and nothing is taken that the file does not hold.

The header of an array says how much will have to be read: it is compared with the bytes that are there before memory is
taken. In a compressed .npz these may be a thousand times those of the file, so that what is taken is bounded as well.
A file of ours holds a checksum of all its arrays (`write_npz`): what is there belongs together.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Collection, Mapping
from typing import IO, Any

import numpy as np

from lpl_jax.errors import InputError, some
from lpl_jax.io.atomic import atomic_open
from lpl_jax.io.copies import local_copy
from lpl_jax.io.paths import AnyPath, PathLike

MAX_HEADER = 2**16  # bytes; numpy writes some hundred, and reads as many as the file says
MAX_BYTES = 2**32  # of all arrays that are read
CHECKSUM = "checksum"  # name of an array, uint8 (32,)
NUMBERS = "biuf"  # kinds of types
_HEADERS = {(1, 0): (2, np.lib.format.read_array_header_1_0), (2, 0): (4, np.lib.format.read_array_header_2_0)}


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of an .npy stream, which is left after them. Nothing is unpickled.

    Raises:
      ValueError: no .npy, another version of the format, or a header that is damaged or too long.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format")
    width, read = _HEADERS[version]
    length = stream.read(width)
    if (size := int.from_bytes(length, "little")) > MAX_HEADER:
        raise ValueError(f"a header of {size:,} bytes")
    try:
        shape, fortran_order, dtype = read(io.BytesIO(length + stream.read(size)))
    except ValueError:
        raise
    except Exception as error:  # numpy evaluates its text, which may be anything
        raise ValueError(f"a damaged header ({type(error).__name__})") from None
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, fortran_order, dtype


def read_npy(path: AnyPath, *, most: int = MAX_BYTES) -> np.ndarray:
    """The array in an .npy file.

    Raises:
      InputError: missing, damaged, not of numbers, or of more than `most` bytes.
    """
    try:
        with local_copy(path).open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _array(file, size, most)
    except Exception as error:
        raise _refusal(path, error) from None


def npz_names(path: AnyPath) -> list[str]:
    """The names of the arrays in an .npz file. Raises InputError where it is missing or none."""
    try:
        with zipfile.ZipFile(local_copy(path)) as archive:
            return _names(archive)
    except Exception as error:
        raise _refusal(path, error) from None


def read_npz(path: AnyPath, names: Collection[str] | None = None, *, most: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The arrays in an .npz file by name, read to the end, where the checksum of each is.

    Args:
      names: only these, where the file has no checksum of all of them; None: all. One that is not there is left out.
      most: bytes of all that are read.

    Raises:
      InputError: missing, damaged, not of numbers, of more than `most` bytes, or arrays that do not belong together.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(local_copy(path)) as archive:
            there = _names(archive)
            for name in there if names is None or CHECKSUM in there else [name for name in there if name in names]:
                member = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
                with archive.open(member) as file:
                    found[name] = _array(file, archive.getinfo(member).file_size, most, f"{some([name])}: ")
                most -= found[name].nbytes
    except Exception as error:
        raise _refusal(path, error) from None
    checksum = found.pop(CHECKSUM, None)
    if checksum is not None and bytes(checksum.tobytes()) != _checksum(found):
        raise InputError(f"{path}: its arrays are not those that were written together: restore it, or make it again")
    return found


def write_npz(path: PathLike, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """An .npz file of named arrays and their checksum."""
    named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    named[CHECKSUM] = np.frombuffer(_checksum(named), np.uint8)
    with atomic_open(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, **named)


def _array(stream: IO[bytes], size: int, most: int, name: str = "") -> np.ndarray:
    """The array of an .npy stream of so many bytes; its name is for messages."""
    shape, fortran_order, dtype = read_header(stream)
    if dtype.kind not in NUMBERS:
        raise ValueError(f"{name}an array of {dtype}, not of numbers")
    needed, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if needed > most:
        raise ValueError(f"{name}an array {shape} of {dtype} has {needed:,} bytes: at most {most:,} are read")
    if needed != there:
        raise ValueError(f"{name}{there:,} bytes where its header says {needed:,}")
    content = stream.read(needed + 1)  # to the end, where the checksum is compared
    if len(content) != needed:
        raise ValueError(f"{name}it is cut short")
    array = np.frombuffer(content, dtype)
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)


def _names(archive: zipfile.ZipFile) -> list[str]:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if len(set(names)) < len(names):
        raise ValueError("an array is there twice")
    return names


def _checksum(arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _refusal(path: AnyPath, error: Exception) -> InputError:
    """Whatever the readers of zip files, compressed data and headers meet in a damaged file."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, InputError):
        return error
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} cannot be read as a file of arrays: no such file")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{path} cannot be read as a file of arrays: {reason}")
