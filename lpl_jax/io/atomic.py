"""Files and folders that get their name when all is in them, so that a half-written one is never taken for whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lpl_jax.errors import InputError


def check_free(place: Path) -> None:
    """Raises InputError where writing to `place` would write over something; an empty folder is nothing."""
    if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
        return
    if place.exists() or place.is_symlink():
        raise InputError(f"{place} exists: nothing is written over, give another place")


@contextlib.contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """A free path beside `place`, to make a file or a folder at; it is renamed to `place` when the block ends.

    Where the block fails, what it has made is removed. A process that is killed leaves `.NAME.PID.partial` behind.
    Raises InputError as `check_free` does, before and after the block.
    """
    place = place.absolute()
    check_free(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        yield partial
        check_free(place)
        partial.rename(place)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
