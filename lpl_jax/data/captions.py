"""Captions of an image: which text a column is, and what of it is kept."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lpl_jax.errors import InputError
from lpl_jax.io.texts import check_text, decode_text

MAX_BYTES = 2**22  # of a txt or json file
MOST_DEPTH = 64  # of objects and lists in each other: whoever writes them again has a stack, too
TXT = "txt"  # the column that is a text file; every other name is a field of the json file


def read_captions(columns: Sequence[str], read: Callable[[str], bytes | None], name: str) -> tuple[str, ...]:
    """The caption of each column of an image.

    Args:
      columns: "txt", or the name of a field of the image's json; dots lead into objects and lists ("captions.0").
      read: the content of the image's file with this ending ("txt" or "json"); None where it has none.
      name: of the image, for errors.

    Raises:
      InputError: a caption that is missing, empty or no text (see `io.texts`), or a json that cannot be read.
    """
    fields = _json(read("json"), name) if any(column != TXT for column in columns) else None
    found = []
    for column in columns:
        caption = _text(read(TXT), f"{name}: its txt") if column == TXT else _field(fields, column)
        if caption is None:
            raise InputError(f"{name}: has no caption {column!r}")
        found.append(clean_caption(caption, f"{name}: its caption {column!r}"))
    return tuple(found)


def clean_caption(caption: str, name: str) -> str:
    """The text without blanks and byte order marks around it.

    Raises:
      InputError: nothing is left, or no text (see `io.texts.check_text`); begins with `name`.
    """
    caption = check_text(caption, name).strip().strip("\ufeff").strip()
    if not caption:
        raise InputError(f"{name} is empty")
    return caption


def check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns; raises an InputError where one is named twice or not at all."""
    if len(set(columns)) != len(columns) or not all(columns):
        raise InputError(f"caption columns {', '.join(map(repr, columns))}: give each its own name")
    return tuple(columns)


def _text(content: bytes | None, name: str) -> str | None:
    if content is None:
        return None
    if len(content) > MAX_BYTES:
        raise InputError(f"{name} has more than {MAX_BYTES:,} bytes")
    return decode_text(content, name)


def _json(content: bytes | None, name: str):
    text = _text(content, f"{name}: its json")
    return None if text is None else parse_json(text, f"{name}: its json")


def parse_json(text: str, name: str) -> Any:
    """JSON that people have beside their images: nothing is asked of it but that it can be read and is not too deep.

    Raises:
      InputError: it begins with `name`.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be read ({error})") from None
    level = [found]
    for _ in range(MOST_DEPTH):
        level = [part for value in level if isinstance(value, (dict, list)) for part in _parts(value)]
        if not level:
            return found
    raise InputError(f"{name} cannot be read (objects and lists are more than {MOST_DEPTH} deep in each other)")


def _parts(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _field(fields, column: str) -> str | None:
    for part in column.split("."):
        if isinstance(fields, list) and part.isdecimal() and int(part) < len(fields):
            fields = fields[int(part)]
        elif isinstance(fields, dict):
            fields = fields.get(part)
        else:
            return None
    return fields if isinstance(fields, str) else None
