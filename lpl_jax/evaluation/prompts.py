"""Prompts of an evaluation: lines of a text file, or the captions of a latent store."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl_jax.data import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.io.paths import AnyPath, PathLike, to_path


class Prompts(NamedTuple):
    """lines: the texts. provenance: of them, for the result card."""

    lines: tuple[str, ...]
    provenance: dict[str, Any]


def read_prompts(path: PathLike, count: int | None = None) -> Prompts:
    """The prompts at `path`: a text file with one on each line, or a latent store, of which the first captions count.

    count: at most this many of a store's.

    Raises:
      InputError: nothing there, an empty line, or a store without captions.
    """
    path = to_path(path, "evaluation.prompts", remote=True)
    lines = store_captions(LatentStore(path), count) if path.is_dir() else _read_lines(path)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Prompts(tuple(lines), {"prompts.file": str(path), "prompts.count": len(lines), "prompts.hash": digest})


def store_captions(store: LatentStore, count: int | None = None) -> list[str]:
    """The first caption of each of the first `count` records; None: of all."""
    if not len(store) or not store[0].captions:
        raise InputError(f"latent store {store.path} has no captions")
    return [store[index].captions[0] for index in range(min(len(store), count or len(store)))]


def _read_lines(path: AnyPath) -> Sequence[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {path} cannot be read: {error}") from None
    if not lines or not all(line.strip() for line in lines):
        raise InputError(f"prompts {path}: needs one prompt on each line, and no empty lines")
    return lines
