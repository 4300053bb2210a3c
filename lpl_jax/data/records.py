"""A record of a store: how it is laid out, and what it must be. One rule for who writes and who verifies.

A record is a row of `Manifest.record_dtype`, then key and captions in UTF-8 with zero bytes between them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lpl_jax.data.manifest import Manifest

MOST_CLASSES = 100_000  # of a source whose classes are counted while it is read


def pack(row: np.void, key: str, captions: Sequence[str]) -> bytes:
    """The bytes of a record; raises UnicodeEncodeError where a text is none."""
    return row.tobytes() + "\0".join((key, *captions)).encode()


def unpack(data: bytes, dtype: np.dtype, errors: str = "strict") -> tuple[np.void, str, tuple[str, ...]]:
    """(row, key, captions) of a record. Raises UnicodeDecodeError, unless `errors` says otherwise."""
    row = np.frombuffer(data, dtype, count=1)[0]
    key, *captions = data[dtype.itemsize :].decode(errors=errors).split("\0")
    return row, key, tuple(captions)


def faults(manifest: "Manifest", row: np.void, key: str, captions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong) of a record by itself; that no other has its key is for the store to see."""
    text = manifest.text
    if not key or not _is_text(key) or "\n" in key:
        yield "text", "its key is no text of one line"
    if not all(map(_is_text, captions)):
        yield "text", "a caption is no text"
    if not np.isfinite(row["moments"]).all():
        yield "not finite", f"its latent is not finite in {manifest.dtype}; possible: dtype float32, other weights"
    if not 0 <= row["label"] < (manifest.num_classes or MOST_CLASSES):
        yield "label", f"label {row['label']} of {manifest.num_classes or MOST_CLASSES} classes"
    if len(captions) != (len(text.columns) if text else 0) or not all(captions):
        yield "captions", f"{len(captions)} captions, or an empty one"
    if text and not ((row["tokens"] >= 0) & (row["tokens"] < text.vocab_size)).all():
        yield "tokens", f"a number that is not 0 to {text.vocab_size - 1}"
    for part in ("text_hidden", "text_pooled"):
        if part in manifest.field_names and not np.isfinite(row[part]).all():
            yield "not finite", f"its {part} is not finite"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
