"""The one exception for things that a user can mend, and how a name that is not known is answered."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message is a single line that names what was given and what is possible. Command-line programs print it without
    a traceback and exit with status 2 (see `lpl_jax.tools.cli`).
    """


def nearest(given: str, possible: Iterable[str]) -> str:
    """The end of a message on a name that is not known: the name it is nearest to, or all that there are."""
    possible = list(possible)
    close = difflib.get_close_matches(given, possible, n=1)
    return f"did you mean {close[0]}?" if close else f"possible: {', '.join(possible) or 'none'}"
