"""Failures of the machine in a line: a full disk, a file that may not be read, a network that is not there, memory.

They come out of libraries as exceptions of many types, often without the path, and some as text alone. `naming` puts
the path in where it is known; `explain` is what a program says in the end.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from lpl_jax.errors import InputError
from lpl_jax.redaction import redact

LONGEST = 600  # characters of a line
# As libraries in C++ and Rust write the system's error number into their messages.
_NUMBER = re.compile(r"(?:os[ _]error(?:_code)?[ =:']+|\[errno )(\d+)", re.IGNORECASE)
_SAID = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)}
_NETWORK = ("requests.", "urllib3.", "aiohttp.", "httpx", "httpcore", "botocore.", "aiobotocore.", "gcsfs.", "s3fs.")
_NETWORK += ("google.auth.", "google.api_core.", "google.cloud.")
_SOCKET = ("gaierror", "herror", "timeout", "TimeoutError", "SSLError", "SSLCertVerificationError")
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ETIMEDOUT)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """An error of the system in the block names this path, where it names none.

    One that a library has put into words of its own becomes an OSError.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def explain(error: BaseException, *, lower: str = "") -> tuple[str, int]:
    """A line on an error, and the exit status: 2 for what the user or the machine can mend, 1 for a fault of ours.

    lower: what takes less memory, for messages.
    """
    causes = list(_chain(error))
    if isinstance(error, InputError):
        return _line(str(error)), 2
    if found := next((cause for cause in causes if isinstance(cause, InputError)), None):
        return _line(str(found)), 2
    for known in (_disk, _memory, _network, _missing, _worker):
        if text := next((text for cause in causes if (text := known(cause))), None):
            return _line(f"{text}; {lower}" if known is _memory and lower else text), 2
    return _line(f"{type(error).__name__}: {error} (not expected: --debug shows where)"), 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, from the last to the first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _errno(error: BaseException) -> int | None:
    """The system's number of an error; None where it is no error of the system."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if match := _NUMBER.search(text):
        return int(match[1])
    return next((number for said, number in _SAID.items() if said in text), None)


def _disk(error: BaseException) -> str | None:
    number = _errno(error)
    if number is None or _is_network(error):
        return None
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([os.strerror(number) if number > 0 else str(error.strerror), *names[:1]])
    path = re.search(r"(?:[\w.-]+://|/)[^\s\"',;:]+", str(error))
    return f"{os.strerror(number)}{f': {path[0]}' if path else ''}"


def _memory(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError):
        return "out of memory on the host" + (f": {text}" if text else "")
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    asked = re.search(r"(?:allocating|allocate) (\d[\d.]*\s?\w+)", text)
    return f"out of memory on the device{f': {asked[1]} more were asked for' if asked else ''}"


def _network(error: BaseException) -> str | None:
    if not _is_network(error):
        return None
    reason = str(error) or type(error).__name__
    return f"the network is not there, or refuses: {reason.splitlines()[0]}"


def _is_network(error: BaseException) -> bool:
    kinds = type(error).__mro__
    return (
        any(kind.__module__.startswith(_NETWORK) or kind.__name__ in _SOCKET for kind in kinds)
        or isinstance(error, ConnectionError)
        or (isinstance(error, OSError) and error.errno in _NO_ROUTE)
    )


def _missing(error: BaseException) -> str | None:
    if isinstance(error, ImportError) and error.name and not error.name.startswith("lpl_jax"):
        return f"the package {error.name.partition('.')[0]} is not installed, or cannot be imported: {error}"
    return None


def _worker(error: BaseException) -> str | None:
    if type(error).__name__ == "BrokenProcessPool" or re.search(r"worker.{0,40}(killed|terminated|died)", str(error)):
        return f"a worker process was killed, perhaps for lack of memory: {error}"
    return None


def _line(text: str) -> str:
    line = redact(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
