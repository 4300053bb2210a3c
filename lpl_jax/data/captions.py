"""Captions of an image: which text a column is, and what of it is kept."""

import json
from collections.abc import Callable, Sequence

from lpl_jax.errors import InputError

TXT = "txt"  # the column that is a text file; every other name is a field of the json file


def read_captions(columns: Sequence[str], read: Callable[[str], bytes | None], name: str) -> tuple[str, ...]:
    """The caption of each column of an image.

    Args:
      columns: "txt", or the name of a field of the image's json; dots lead into objects and lists ("captions.0").
      read: the content of the image's file with this ending ("txt" or "json"); None where it has none.
      name: of the image, for errors.

    Raises:
      InputError: a caption that is missing or empty, or a json that cannot be read.
    """
    fields = _json(read("json"), name) if any(column != TXT for column in columns) else None
    found = []
    for column in columns:
        caption = _text(read(TXT)) if column == TXT else _field(fields, column)
        if caption is None:
            raise InputError(f"{name}: has no caption {column!r}")
        caption = clean_caption(caption)
        if not caption:
            raise InputError(f"{name}: its caption {column!r} is empty")
        found.append(caption)
    return tuple(found)


def clean_caption(caption: str) -> str:
    """The text without blanks around it, NULs and halves of surrogate pairs (which are no Unicode text)."""
    return caption.encode("utf-8", "replace").decode().replace("\0", " ").strip()


def check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns; raises an InputError where one is named twice or not at all."""
    if len(set(columns)) != len(columns) or not all(columns):
        raise InputError(f"caption columns {', '.join(map(repr, columns))}: give each its own name")
    return tuple(columns)


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode("utf-8", "replace")


def _json(content: bytes | None, name: str):
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise InputError(f"{name}: its json cannot be read ({error})") from None


def _field(fields, column: str) -> str | None:
    for part in column.split("."):
        if isinstance(fields, list) and part.isdecimal() and int(part) < len(fields):
            fields = fields[int(part)]
        elif isinstance(fields, dict):
            fields = fields.get(part)
        else:
            return None
    return fields if isinstance(fields, str) else None
