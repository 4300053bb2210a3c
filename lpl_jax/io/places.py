"""Folders that must stay what they are while a program writes into them.

A folder that is removed or renamed meanwhile would quietly be made anew by the next write, with a part of its files.
Whoever holds a folder (`io.locks`) has it watched: what `io.atomic` writes below it, and what asks by `check`, fails
instead with one line.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lpl_jax.errors import InputError
from lpl_jax.io.paths import AnyPath, is_remote

_held: list["Place"] = []  # by all threads


class Place:
    """A folder as it is now. A remote one is not watched: there are no folders there, but names."""

    def __init__(self, path: AnyPath):
        self.path = Path(path)
        self._file = None if is_remote(path) else os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def check(self) -> None:
        """Raises InputError where the folder is no longer there."""
        if self._file is None or self._is_there():
            return
        now = self._now()
        what = "was removed" if now is None or now.endswith(" (deleted)") else f"was renamed to {now}"
        raise InputError(f"{self.path} {what} while files were written there: nothing is made anew there")

    def close(self) -> None:
        """Watches no longer."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_there(self) -> bool:
        assert self._file is not None
        try:
            if os.path.samestat(self.path.stat(), os.fstat(self._file)):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self._now() == os.path.realpath(self.path)  # on file systems that number a file anew

    def _now(self) -> str | None:
        """Where the folder is, as Linux knows; None elsewhere."""
        try:
            return str(Path(f"/proc/self/fd/{self._file}").readlink())
        except OSError:
            return None


@contextlib.contextmanager
def watched(folder: AnyPath) -> Iterator[None]:
    """The folder is watched while the block runs."""
    place = Place(folder)
    _held.append(place)
    try:
        yield
    finally:
        _held.remove(place)
        place.close()


def check(path: AnyPath) -> None:
    """Raises InputError where a watched folder that the path is in, or is, is no longer there."""
    if not is_remote(path):
        for place in [*_held]:
            if Path(path).absolute().is_relative_to(place.path.absolute()):
                place.check()


def need_folder(path: AnyPath, name: str | None = None) -> None:
    """Raises InputError where the path cannot be a folder, as it or what it would be in is a file.

    name: the flag or field that it was given as; None: not known.
    """
    if is_remote(path):
        return
    for each in (path, *path.parents):
        if each.is_dir():
            return
        if os.path.lexists(each):
            link = each.is_symlink() and not each.exists()
            what = "is a link to nothing" if link else "is a file"
            where = "" if each == path else f"{path}: "
            raise InputError(f"{where}{each} {what}: give a folder{f' as {name}' if name else ''}")
