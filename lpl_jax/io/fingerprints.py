"""Identities: what is equal has the same fingerprint, and nothing else has. SHA-256, hexadecimal.

Nothing is identified by its name alone: files are by their content, or by their sizes and change times, which a copy
that keeps times (`cp -p`, `mv`, `rsync -t`) leaves as they are.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lpl_jax.errors import InputError
from lpl_jax.io.paths import PathLike, file_system, files_below, is_remote, to_path

# How files are told from others of their names.
IDENTITIES = ("times", "content")
CHUNK = 256  # files that a thread looks at in one go
# What object storages say of a file's state, by what fsspec's file systems call it; a size alone is no state.
STATES = ("generation", "etag", "md5hash", "content-md5", "mtime", "lastmodified", "last-modified", "updated")
STATES += ("created",)


def fingerprint(params: Mapping[str, Any]) -> str:
    """Of the parameters of a network: their names, shapes and values, as float32.

    One for all that is frozen: autoencoders, text towers, the networks of evaluations.
    """
    digest = hashlib.sha256()
    for path, array in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{array.shape}".encode())
        digest.update(np.asarray(array, np.float32).tobytes())
    return digest.hexdigest()


def fingerprint_texts(*texts: str) -> str:
    """Of some texts in their order, file names that are no UTF-8 among them."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def fingerprint_values(values: Mapping[str, Any]) -> str:
    """Of plain values by name, in any order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_files(files: Mapping[str, PathLike], identity: str = "times") -> dict[str, str]:
    """Of files: fingerprints of their "names", and of their "sizes" and "change times", or of their "content".

    Args:
      files: name -> path or URL. The name is what identifies a file beside its state, so it says nothing of where all
        of them lie. A file that is not there counts as absent.
      identity: one of `IDENTITIES`. Content is read to the end.

    Raises:
      InputError: another identity.
    """
    if identity not in IDENTITIES:
        raise InputError(f"identity={identity!r}; possible: {', '.join(IDENTITIES)}")
    columns = ("names", "content") if identity == "content" else ("names", "sizes", "change times")
    digests = {column: hashlib.sha256() for column in columns}
    for row in _states(files, identity):
        for digest, text in zip(digests.values(), row, strict=True):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return {column: digest.hexdigest() for column, digest in digests.items()}


def fingerprint_path(path: PathLike, identity: str = "times") -> dict[str, str]:
    """As `fingerprint_files`, of a file, or of all files below a folder, by their paths in it."""
    path = to_path(path, remote=True)
    if not path.is_dir():
        return fingerprint_files({"": str(path)}, identity)
    return fingerprint_files({str(file.relative_to(path)): str(file) for file in files_below(path)}, identity)


def _states(files: Mapping[str, PathLike], identity: str) -> Iterator[tuple[str, ...]]:
    """(name, state...) of every file in order, looked at by several threads."""
    of_file = _content if identity == "content" else state_of

    def rows(chunk):
        return [(name, *of_file(path)) for name, path in chunk]

    with ThreadPoolExecutor(16) as pool:
        for wave in _chunks(_chunks(iter(files.items()), CHUNK), 64):  # of millions of files, not all at once
            yield from itertools.chain.from_iterable(pool.map(rows, wave))


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def state_of(path: PathLike) -> tuple[str, str]:
    """(size, change time in ns) of a file, or what an object storage has in place of the latter; "absent" for none.

    Where a storage tells nothing of a file's state but its size, the second is empty.
    """
    try:
        if not is_remote(path):
            found = Path(path).stat()
            return str(found.st_size), str(found.st_mtime_ns)
        system, name = file_system(str(path))
        about = {key.lower(): value for key, value in system.info(name).items()}
    except FileNotFoundError:
        return "absent", "absent"
    return str(about.get("size")), next((str(about[key]) for key in STATES if about.get(key)), "")


def _content(path: PathLike) -> tuple[str]:
    system, name = file_system(str(path))  # a local path is a URL of fsspec's, too
    digest = hashlib.sha256()
    try:
        with system.open(name, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)  # pyright: ignore[reportArgumentType]  # of bytes: it was opened so
    except FileNotFoundError:
        return ("absent",)
    return (digest.hexdigest(),)
