"""How far something is: a bar on a terminal; elsewhere, such as in a log file, a line now and then, on stdout.

So stderr holds errors alone where nobody looks on.
"""

import sys
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 30.0  # seconds


def place() -> TextIO:
    """Where progress is shown."""
    return sys.stderr if sys.stderr.isatty() else sys.stdout


def tell(line: str) -> None:
    """Prints a line on stdout, above a bar where one is shown."""
    if sys.stderr.isatty():
        tqdm.write(line)
    else:  # tqdm would draw a bar behind it, into which the next line runs
        print(line, flush=True)


def progress_bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm; what ends within half a minute shows none in a log file."""
    if not sys.stderr.isatty():
        options |= dict(file=sys.stdout, delay=EVERY, mininterval=EVERY)
    return tqdm(*args, **options)
