"""Headers of .npy streams, which say how much will have to be read."""

import io
from typing import IO

import numpy as np

MAX_HEADER = 2**16  # bytes; numpy writes some hundred, and reads as many as the file says
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
    return read(io.BytesIO(length + stream.read(size)))
