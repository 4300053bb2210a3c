"""The one exception for things that a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message is a single line that names what was given and what is possible. Command-line programs print it without
    a traceback and exit with status 2 (see `lpl_jax.tools.cli`).
    """


def nearest(name: object, possible: Iterable[str]) -> str:
    """A question for messages, " (did you mean NAME?)", with the most similar possible name; "" where none is."""
    found = difflib.get_close_matches(str(name), list(possible), n=1, cutoff=0.7)
    return f" (did you mean {found[0]}?)" if found else ""


def shown(value: object, most: int = 100) -> str:
    """A value in a message: on one line, and cut where it is long."""
    if isinstance(value, tuple | list) and len(value) > most:
        value = (*value[:most], ...)
    try:
        text = repr(value[: most + 1] if isinstance(value, str) else value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "a number of thousands of digits"
    return short(text, most)


def short(text: str, most: int = 100) -> str:
    """A text in a message: on one line, and cut where it is long."""
    line = " ".join(text[: most + 1].split())
    return line if len(text) <= most else f"{line[:most]} ..."


def some(things: Iterable[object], separator: str = ", ", most: int = 6) -> str:
    """The first few of a list for messages, and how many more there are: a line stays a line, whatever is in it."""
    texts = [text if text.isprintable() else ascii(text) for text in map(str, things)]
    shown = texts if len(texts) <= most else [*texts[: most - 1], f"and {len(texts) - most + 1} more"]
    return separator.join(shown)


def some_of_each(*groups: Iterable[object]) -> str:
    """The first few of every group, as of problems of one kind, so that none hides another."""
    return "; ".join(filter(None, (some(group, "; ") for group in groups)))
