"""Remote files on this machine, for readers that need local ones (ArrayRecord, zip files)."""

import errno
import os
from pathlib import Path

from lpl_jax.io.atomic import atomic_path
from lpl_jax.io.fingerprints import fingerprint_texts, state_of
from lpl_jax.io.paths import AnyPath, cache_folder, file_system, is_remote


def local_copy(path: AnyPath) -> Path:
    """A remote file's local copy, fetched where there is none yet; a local file is itself.

    Copies are kept in `cache_folder()`/remote, under what tells this state of the file from others.

    Raises:
      FileNotFoundError: there is no such remote file.
    """
    if not is_remote(path):
        return path
    system, name = file_system(str(path))
    if (state := state_of(path))[0] == "absent":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    state = fingerprint_texts(str(path), *state)[:32]
    copy = cache_folder() / "remote" / state / path.name
    if not copy.exists():
        with atomic_path(copy, replace=True) as partial:
            system.get_file(name, str(partial))
    return copy
