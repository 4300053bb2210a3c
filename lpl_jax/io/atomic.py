"""Files and folders that get their name when all is in them, so that a half-written one is never taken for complete.

Whatever a run, a store, an evaluation or a report needs later is written by one of these. A local file or folder is
written beside its path as `.NAME.PID-....partial` and renamed; what a process that was killed has left is removed by
the next one that writes in the folder. A remote file is written on this machine and uploaded, which puts an object in
place of the old one at once; a remote folder is uploaded file by file.
"""

import contextlib
import csv
import functools
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lpl_jax.errors import InputError
from lpl_jax.io import places
from lpl_jax.io.faults import naming
from lpl_jax.io.paths import AnyPath, PathLike, file_system, files_below, is_remote, to_path

PARTIAL = ".partial"
ABANDONED = 86400.0  # seconds after which nobody writes any more what another host has begun
_PROCESS = secrets.token_hex(4)
_MADE = re.compile(rf"\..+\.(\d+)-([0-9a-f]{{8}})-([0-9a-f]{{8}})-[0-9a-f]{{8}}{re.escape(PARTIAL)}")


def check_free(path: AnyPath) -> None:
    """Raises InputError where writing to `path` would overwrite something; an empty folder is nothing."""
    linked = not is_remote(path) and path.is_symlink()
    if path.is_dir() and not linked and not any(path.iterdir()):
        return
    if path.exists() or linked:
        raise InputError(f"{path} exists: nothing is overwritten, give another path")


@contextlib.contextmanager
def atomic_path(path: PathLike, *, replace: bool = False) -> Iterator[Path]:
    """A free local path, to make a file or a folder at; it becomes `path` when the block ends.

    Where the block fails, what it has written is removed.

    Args:
      replace: a file may replace another one.

    Raises:
      InputError: without `replace`, as `check_free` does, before and after the block.
    """
    path = to_path(path, remote=True)
    with naming(path), _atomic_path(path, replace) as partial:
        yield partial


@contextlib.contextmanager
def _atomic_path(path: AnyPath, replace: bool) -> Iterator[Path]:
    check = (lambda: None) if replace else (lambda: check_free(path))
    check()
    with _scratch(path) as partial:
        yield partial
        check()
        if is_remote(path):
            upload(partial, path)
        else:
            partial.replace(path)


@contextlib.contextmanager
def _scratch(path: AnyPath) -> Iterator[Path]:
    """Where to make what becomes `path`: beside it, so that it can be renamed; for a remote one, anywhere here."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
        return
    path = path.absolute()
    places.check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    # The tokens keep apart threads, and processes of several hosts that share the folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{_host()}-{_PROCESS}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
    finally:
        _remove(partial)


@functools.cache
def _tidy(folder: Path) -> None:
    """Removes what killed processes have left in a folder, once, before this process writes there.

    Those of this host are known to be dead; of another one, what nobody has touched for a day.
    """
    for entry in os.scandir(folder):
        if (made := _MADE.fullmatch(entry.name)) is None:
            continue
        pid, host, process = int(made[1]), made[2], made[3]
        with contextlib.suppress(OSError):
            if host == _host():
                dead = process != _PROCESS and (pid == os.getpid() or not _runs(pid))
            else:
                dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED
            if dead:
                _remove(Path(entry.path))


@functools.cache
def _host() -> str:
    """This host, and the table of processes that its containers may have for themselves."""
    try:
        table = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        table = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {table}'.encode()):08x}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def upload(local: Path, path: AnyPath) -> None:
    """Writes a local file, or all files of a local folder, to a remote path; each object appears at once."""
    system, name = file_system(str(path))
    if local.is_dir():
        for file in files_below(local):
            system.put_file(str(file), f"{name}/{file.relative_to(local).as_posix()}")
    else:
        system.put_file(str(local), name)


@contextlib.contextmanager
def atomic_open(path: PathLike, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file open for writing; what is written replaces `path` when the block ends without an error.

    Args:
      mode, options: as of `open`, "w" or "wb"; text is UTF-8.
    """
    path = to_path(path, remote=True)
    if "b" not in mode:
        options = {"encoding": "utf-8", **options}
    if not is_remote(path) and path.exists() and not path.is_file():  # such as /dev/stdout, which nothing can replace
        with naming(path), path.open(mode, **options) as file:
            yield file
        return
    with atomic_path(path, replace=True) as partial, partial.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave the name with nothing in it


def write_bytes(path: PathLike, content: bytes) -> None:
    """The content of a file, all of it or none."""
    with atomic_open(path) as file:
        file.write(content)


def write_text(path: PathLike, text: str) -> None:
    """The text of a file in UTF-8, all of it or none."""
    write_bytes(path, text.encode())


def append_text(path: PathLike, text: str) -> None:
    """Adds to the end of a text file, or begins one. A remote one is read and written anew: for small files."""
    path = to_path(path, remote=True)
    if is_remote(path):
        write_bytes(path, (path.read_bytes() if path.exists() else b"") + text.encode())
        return
    places.check(path)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_json(path: PathLike, content: Any, **options: Any) -> None:
    """A JSON file; options: of `json.dumps`."""
    write_text(path, json.dumps(content, **{"indent": 1, **options}) + "\n")


def write_csv(path: PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table: a column for each key, in the order in which they come; empty where a row lacks it."""
    with atomic_open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
