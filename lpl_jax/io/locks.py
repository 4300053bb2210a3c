"""Folders that one writer has at a time: runs, stores, and whatever a program writes several files into.

The lock is a file `.lock` in the folder that the system locks (flock), not one that is merely there: the system
releases it when its owner ends, however it does, so what a killed process has left is taken over. The owner writes into
it who it is, for the message to others; it removes the file at its end. Object storage has no locks, nor have some
network file systems: that is said in a line, and nothing is refused there.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpl_jax import distributed
from lpl_jax.errors import InputError
from lpl_jax.io.jsons import read_json
from lpl_jax.io.paths import AnyPath, is_remote
from lpl_jax.io.places import need_folder, watched

LOCK = ".lock"
TRIES = 1000
SECONDS = 1.0  # that another one has to say its name
# What a file system without locks answers, and a folder in which nothing can be written anyway.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

_held = threading.local()  # a thread may take a lock again that it has


@contextlib.contextmanager
def only_writer(folder: AnyPath, part: int | None = None) -> Iterator[None]:
    """Nobody else writes into the folder while the block runs, in this process or another, on this host or another.

    A folder that is not there is made, and removed again where nothing is in it at the end. In a folder that cannot be
    written the lock is passed over, as there is nothing to be kept apart.

    Args:
      part: the number of one of several writers that share the folder: others with other numbers are let in.

    Raises:
      InputError: another one has it; says which process of which host, as far as is known.
    """
    held, this = _held_here(), (_place(folder), part)
    if this in held:
        yield
        return
    with contextlib.ExitStack() as stack:
        if is_remote(folder):
            _say(f"{folder} is remote and has no lock: no other process may write there")
        else:
            need_folder(folder)
            stack.callback(_remove_empty, [each for each in (folder, *folder.parents) if not each.exists()])
            stack.enter_context(_locked(folder, LOCK, fcntl.LOCK_EX if part is None else fcntl.LOCK_SH))
            if part is not None:
                stack.enter_context(_locked(folder, f"{LOCK}.{part}", fcntl.LOCK_EX))
            stack.enter_context(watched(folder))
        held.add(this)
        stack.callback(held.discard, this)
        yield


@contextlib.contextmanager
def only_writers(folder: AnyPath) -> Iterator[None]:
    """As `only_writer`, for all processes of a program: the first one has the lock, and all raise its error."""
    with contextlib.ExitStack() as stack:
        # Also the point up to which nobody writes: all processes have seen the folder as it was.
        distributed.on_first(lambda: stack.enter_context(only_writer(folder)))
        yield


def writer_of(folder: AnyPath) -> str | None:
    """Who writes into the folder just now, in words for a message; None where nobody does, or nobody can tell."""
    if is_remote(folder) or _place(folder) in {place for place, _ in _held_here()}:
        return None
    path = folder / LOCK
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return _owner(path)
    except OSError:
        return None


def _held_here() -> set[tuple[str, int | None]]:
    return _held.__dict__.setdefault("places", set())


def _place(folder: AnyPath) -> str:
    return str(folder) if is_remote(folder) else os.path.realpath(folder)


@contextlib.contextmanager
def _locked(folder: Path, name: str, how: int) -> Iterator[None]:
    path = folder / name
    try:
        file = _open_and_lock(path, how)
    except BlockingIOError:
        owner = _owner(path, SECONDS)
        raise InputError(
            f"{folder} is in use by {owner}, which writes there: wait for its end, or give another folder"
        ) from None
    if file is None:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a full disk has no room for a name, which nothing but a message needs
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_myself()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # of several that share it, the last one removes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(file)


def _open_and_lock(path: Path, how: int) -> int | None:
    """The descriptor of the locked file; None where there are no locks. Raises BlockingIOError where it is taken.

    Another process that ends meanwhile removes its file, and the folder if it had made it: then again.
    """
    for left in reversed(range(TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _open(path)
        except FileNotFoundError:
            if not left:  # as in /proc
                raise
            continue
        if file is None:
            return None
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            if error.errno in NO_LOCKS:
                path.unlink(missing_ok=True)
                _say(f"{path.parent} is on a file system without locks: no other process may write there")
                return None
            raise
        os.close(file)
    raise BlockingIOError


def _open(path: Path) -> int | None:
    """The file of a lock; None where there is none and none can be made."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        if not path.exists():
            return None
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's, who was killed or is writing


@functools.cache
def _say(text: str) -> None:
    """Once."""
    print(text, flush=True)


def _myself() -> dict[str, Any]:
    program = Path(sys.argv[0]).stem
    command = " ".join(["lpl" if program == "__main__" else program, *sys.argv[1:2]])
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": command}


def _owner(path: Path, seconds: float = 0.0) -> str:
    """Of a lock, in words. seconds: to wait for its name, which it writes when it has the lock."""
    end = time.monotonic() + seconds
    while True:
        try:
            about = read_json(path, most=4096)
            here = about["host"] == socket.gethostname()
            if not (here and _has_ended(about["pid"])):  # else the name is that of the one before
                where = "" if here else f" on host {about['host']}"
                return f"process {about['pid']}{where} ({about['command']}{' of this host' if here else ''})"
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass
        if time.monotonic() >= end:
            return "another process"
        time.sleep(0.02)


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _remove_empty(made: list[Path]) -> None:
    """Folders that were made for a lock, from the innermost on, where nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()
