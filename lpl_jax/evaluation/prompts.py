"""Prompts of an evaluation: lines of a text file, or the captions of a latent store."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl_jax.data import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.io.paths import AnyPath, PathLike, read_bounded, to_path
from lpl_jax.io.texts import decode_text

MAX_BYTES = 2**26  # of a file of prompts


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
        content = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"prompts {path} cannot be read: {error.strerror or error}") from None
    # Not splitlines(): it would cut a prompt at U+2028, a form feed, and six more.
    lines = decode_text(content, f"prompts {path}").removesuffix("\n").split("\n")
    if empty := next((number for number, line in enumerate(lines, 1) if not line.strip()), None):
        raise InputError(f"prompts {path}: line {empty} is empty: needed: one prompt on each line")
    return lines
