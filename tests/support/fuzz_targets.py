"""What is fuzzed: readers of files, given any bytes. Short in tests/test_damage.py, long by benchmarks/fuzz.py.

A target has valid files (`seeds`), which fuzzers change, and `run`, which reads what it is given as such a file. It
returns where the bytes are read, or refused with an InputError of one line; anything else that it raises is a fault.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_media
import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.io import jsons


class Target(NamedTuple):
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]


def of_bytes(seeds: Callable[[], list[bytes]], read: Callable[[bytes], Any]) -> Target:
    """Of a reader of bytes."""

    def run(data: bytes) -> None:
        refused(lambda: read(data))

    return Target(seeds, run)


def of_file(make: Callable[[Path], Path], read: Callable[[Path], Any], *, covered: bool = False) -> Target:
    """Of a reader of a file.

    make: function(new folder) -> a valid file in it, with all that it needs beside it. covered: the file holds a
    checksum, so that what is read is what was written, whatever was changed.
    """

    @functools.cache
    def valid() -> tuple[Path, bytes, Any]:
        path = make(Path(tempfile.mkdtemp(prefix="lpl_jax-fuzz-")))
        return path, path.read_bytes(), read(path)

    def run(data: bytes) -> None:
        path, _, before = valid()
        path.write_bytes(data)
        found, error = refused(lambda: read(path))
        if error is not None:
            assert str(path.parent) in error, f"names no file: {error}"
        elif covered:
            np.testing.assert_equal(found, before)

    return Target(lambda: [valid()[1]], run)


def refused(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what is read, None), or (None, the line that says why it is not)."""
    try:
        return read(), None
    except InputError as error:
        assert "\n" not in str(error), str(error)
        return None, str(error)


TARGETS: dict[str, Target] = {
    "json": of_bytes(
        lambda: [b'{"a": [1, 2.5, true, null, "text"], "b": {"c": "\\u00e9"}}', b'"\xef\xbb\xbf"', b"[1e3, -0.0]"],
        lambda data: jsons.parse(data, "a file"),
    ),
}
TARGETS |= {name: of_bytes(*reader) for name, reader in fuzz_media.READERS.items()}
