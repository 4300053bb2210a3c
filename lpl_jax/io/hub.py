"""Folders that are fetched from the Hugging Face hub, where a user gives a hub id in place of a folder."""

from collections.abc import Sequence
from pathlib import Path

from lpl_jax.errors import InputError
from lpl_jax.io.paths import to_path
from lpl_jax.io.weight_files import ENDINGS


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` reads as owner/name, not as a file of weights, and is nothing on this machine."""
    text = str(source)
    if text.endswith(tuple(f".{ending}" for ending in ENDINGS)):
        return False
    return text.count("/") == 1 and ":" not in text and not text.startswith((".", "~", "/")) and not Path(text).exists()


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


def fetch(hub_id: str, names: Sequence[str], *, subfolder: str | None = None, unless_there: Sequence[str] = ()) -> Path:
    """The local copy of a hub repository's folder, fetched where it is not there yet or not as it is on the hub.

    Args:
      hub_id: owner/name.
      names: the files to fetch, as patterns ("model*.safetensors"): nothing else is.
      subfolder: the folder inside the repository; None is its root.
      unless_there: patterns that are fetched only where none of `names` but .json files is there (old repositories have
        pickles alone; where there are safetensors, a pickle is never asked for).

    Raises:
      InputError: no such repository, no network, or the hub refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def get(patterns):
        inside = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        return Path(snapshot_download(hub_id, allow_patterns=inside)) / (subfolder or "")

    try:
        folder = get(names)
        weights = [pattern for pattern in names if not pattern.endswith(".json")]
        if unless_there and not any(any(folder.glob(pattern)) for pattern in weights):
            get(unless_there)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{hub_id!r} is neither a folder nor to be had from the hub: {reason}") from error
    return folder
