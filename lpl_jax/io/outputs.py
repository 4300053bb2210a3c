"""Whether results can be written where a user wants them: asked before the work, not after it."""

import os

from lpl_jax.errors import InputError
from lpl_jax.io.paths import AnyPath, is_remote


def check_folder(path: AnyPath, name: str) -> None:
    """Raises InputError unless files can be written into this folder, which need not be there; makes nothing.

    name: what the path was given as, for messages.
    """
    if is_remote(path):
        return
    for each in (path, *path.parents):
        if each.is_dir():
            if not os.access(each, os.W_OK | os.X_OK):
                raise InputError(f"{name} {path}: {each} may not be written into: give another place")
            return
        if each.exists() or each.is_symlink():
            raise InputError(f"{name} {path}: {each} is a file: give a folder")


def check_file(path: AnyPath, name: str) -> None:
    """Raises InputError unless a file can be written here; one that is there is replaced."""
    if path.is_dir():
        raise InputError(f"{name} {path} is a folder: give a file")
    check_folder(path.parent, name)
