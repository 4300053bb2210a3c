"""Folders that are fetched from the Hugging Face hub, where a user gives a hub id in place of a folder.

A hub id is `owner/name`, or `owner/name@REVISION` with a branch, tag or commit. It is read here alone, so that it means
the same wherever weights, towers and tokenisers are named.
"""

import functools
import itertools
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lpl_jax.errors import InputError
from lpl_jax.io.paths import to_path
from lpl_jax.io.progress import tell
from lpl_jax.io.weight_files import ENDINGS

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
CLOCK = 0.02  # seconds that the time of a file may be behind
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubId(NamedTuple):
    """A repository of the hub; revision: a branch, tag or commit, None: the newest of its main branch."""

    repository: str
    revision: str | None


def hub_id(source: str | Path) -> HubId | None:
    """What `source` names on the hub; None where it is something on this machine, a file of weights or no hub id."""
    text = str(source)
    found = _ID.fullmatch(text)
    if not found or found[1].startswith((".", "~")) or found[1].endswith(tuple(f".{ending}" for ending in ENDINGS)):
        return None
    return None if Path(text).exists() else HubId(found[1], found[2])


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` reads as owner/name or owner/name@REVISION, and is nothing on this machine."""
    return hub_id(source) is not None


def pinned(source: str | Path, folder: Path) -> str:
    """The name of what was found in `folder`: of a hub id the repository and its commit, else the source as given."""
    found = hub_id(source)
    commit = found and _commit(folder)
    return f"{found.repository}@{commit}" if found and commit else str(source)


def find(
    source: str | Path,
    names: Sequence[str],
    subfolder: str | None = None,
    *,
    field: str = "a source of weights",
    unless_there: Sequence[str] = (),
) -> Path:
    """The path that `source` names, or the local copy of that hub repository (see `fetch`), with `subfolder` inside.

    field: what the source was given as, for messages. unless_there: see `fetch`.
    """
    if is_hub_id(source):
        return fetch(str(source), names, subfolder=subfolder, unless_there=unless_there)
    path = to_path(source, field)
    return path / subfolder if subfolder else path


def fetch(source: str, names: Sequence[str], *, subfolder: str | None = None, unless_there: Sequence[str] = ()) -> Path:
    """The local copy of a hub repository's folder, fetched where it is not there yet or not as it is on the hub.

    A line says which commit it is, and what was fetched.

    Args:
      source: a hub id.
      names: the files to fetch, as patterns ("model*.safetensors"): nothing else is.
      subfolder: the folder inside the repository; None is its root.
      unless_there: patterns that are fetched only where none of `names` but .json files is there (old repositories have
        pickles alone; where there are safetensors, a pickle is never asked for).

    Raises:
      InputError: no such repository or revision, no network, or the hub refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found = hub_id(source)
    if found is None:
        raise InputError(f"{source!r} is no hub id: give owner/name, or owner/name@REVISION")
    begun = time.time() - CLOCK

    def get(patterns):
        inside = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        return Path(snapshot_download(found.repository, revision=found.revision, allow_patterns=inside))

    try:
        root = get(names)
        folder = root / (subfolder or "")
        weights = [pattern for pattern in names if not pattern.endswith(".json")]
        if unless_there and not any(any(folder.glob(pattern)) for pattern in weights):
            get(unless_there)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source!r} is neither a folder nor to be had from the hub: {reason}") from error
    _tell_once(found, _commit(root), *_new(folder.rglob("*"), begun))
    return folder


def _commit(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache is of: NAME/snapshots/COMMIT."""
    pairs = itertools.pairwise(folder.parts)
    return next((name for above, name in pairs if above == "snapshots" and _COMMIT.fullmatch(name)), None)


def _new(files: Iterable[Path], begun: float) -> tuple[int, int]:
    """How many of the files were written since, and their bytes."""
    states = [file.stat() for file in files if file.is_file()]
    sizes = [state.st_size for state in states if state.st_mtime >= begun]
    return len(sizes), sum(sizes)


@functools.cache
def _tell_once(found: HubId, commit: str | None, files: int, size: int) -> None:
    """Says it for every fetch, and once in a process of what was here already."""
    if not files and (commit is None or commit == found.revision):
        return
    name = f"hub: {found.repository}{f'@{found.revision}' if found.revision else ''}"
    of = f" is commit {commit}" if commit and commit != found.revision else ""
    tell(f"{name}{of}; {f'fetched {files} files, {size / 1e6:.1f} MB' if files else 'nothing fetched'}")
