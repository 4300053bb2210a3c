"""Paths as a user types them: on this machine, in the home folder (~), or on object storage (gs://, s3://).

`to_path` is the one place where text becomes a path. A local one is a `pathlib.Path`. A remote one is an
`etils.epath.Path`, which reads and writes through fsspec (`pip install 'lpl_jax[remote]'`) and has pathlib's methods,
but for those of a file system: nothing is renamed, locked or appended to there, and a folder is there when something
is in it. No path is ever taken for a local folder that is called "gs:".

Remote may be: the folder of a run (gs:// alone, see `runs.workdir`), latent stores, reference images and statistics,
images to be scored, prompts, and everything that is given as an output.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, overload

import fsspec
from etils import epath
from fsspec.config import conf
from typing_extensions import TypeIs

from lpl_jax.errors import InputError
from lpl_jax.redaction import refuse_credentials

AnyPath: TypeAlias = Path | epath.Path
PathLike: TypeAlias = str | os.PathLike[str]

REMOTE = ("gs", "s3")
MAX_NAME = 255  # bytes of the name of a file
# At least two letters, and one slash: of "gs://bucket", `pathlib.Path` keeps one.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)


@overload
def to_path(text: PathLike, name: str = ..., *, remote: Literal[False] = False) -> Path: ...
@overload
def to_path(text: PathLike, name: str = ..., *, remote: bool | tuple[str, ...]) -> AnyPath: ...
def to_path(text: PathLike, name: str = "path", *, remote: bool | tuple[str, ...] = False) -> AnyPath:
    """The path that a user has typed, or that a caller has already.

    Args:
      name: the flag or config field that it was given as, for messages.
      remote: whether gs:// and s3:// are possible here, or which of them.

    Raises:
      InputError: a remote path where local ones alone are possible, one of a kind that is not possible or whose package
        is not installed, or a home folder that is not there.
    """
    if not (url := _URL.fullmatch(os.fspath(text))):
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise InputError(f"{name}={text}: {error}") from None
    scheme, rest = url[1].lower(), url[2]
    refuse_credentials(f"{scheme}://{rest}", name)
    if not remote:
        raise InputError(f"{scheme}://{rest} is remote; {name} takes local paths only")
    kinds = REMOTE if remote is True else remote
    if scheme not in kinds or not rest:
        possible = " and ".join(f"{kind}://BUCKET/..." for kind in kinds)
        raise InputError(f"{name}={scheme}://{rest}: possible are local paths, {possible}")
    path = epath.Path(f"{scheme}://{rest}")
    file_system(str(path))
    return path


@overload
def is_remote(path: AnyPath) -> TypeIs[epath.Path]: ...
@overload
def is_remote(path: PathLike) -> bool: ...
def is_remote(path: PathLike) -> bool:
    """Whether a path, or a source that a user has typed, is on object storage."""
    return "://" in os.fspath(path)


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of a URL of any kind, and the path in it.

    Raises:
      InputError: a kind that fsspec does not know, or whose package is not installed.
    """
    # Other hosts write there, too: what was listed a while ago is not what is there now.
    conf.setdefault(url.partition("://")[0], {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol that fsspec does not know is a ValueError
        reason = str(error).splitlines()[0]
        raise InputError(f"{url}: {reason}; pip install 'lpl_jax[remote]' reads gs:// and s3://") from None


def size_of(path: AnyPath) -> int:
    """Bytes of a file."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def open_regular(path: Path) -> BinaryIO:
    """A local file, opened to be read.

    Raises:
      InputError: a pipe, socket or device, which might never end. OSError: it cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder")
    return open(path, "rb", opener=_without_waiting)


def _without_waiting(path: str, flags: int) -> int:
    """A pipe that has come in between would wait for somebody to write."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bounded(path: AnyPath, most: int) -> bytes:
    """The content of a file of at most `most` bytes; of a longer one nothing, or little, is read.

    Raises:
      InputError: it is longer, or no file. OSError: it cannot be read.
    """
    if is_remote(path):  # without a request for its size
        with path.open("rb") as file:
            content = file.read(most + 1)
        size = len(content)
    else:
        with open_regular(Path(path)) as file:  # Etils' local paths have another `stat`
            size = os.fstat(file.fileno()).st_size
            content = file.read(most + 1) if size <= most else b""
        size = max(size, len(content))  # it may have grown since
    if size > most:
        raise InputError(f"{path}: {'more' if is_remote(path) else f'{size:,}'} bytes: at most {most:,} are read")
    return content


def is_plain_name(name: str) -> bool:
    """Whether a text from a file names something in a folder itself: no path, no drive, nothing that is hidden."""
    odd = any(character in "/\\:" or not character.isprintable() for character in name)
    return bool(name) and not odd and not name.startswith(".") and len(name.encode(errors="replace")) <= MAX_NAME


def entries(folder: AnyPath) -> list[AnyPath]:
    """What is in a folder, by name; nothing where it is not there, as a remote one is not while it is empty."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def files_below(folder: AnyPath) -> Iterator[AnyPath]:
    """All files in a folder and its subfolders, each folder's in the order of their names."""
    if is_remote(folder):
        system, name = file_system(str(folder))
        yield from (folder / found.removeprefix(f"{name}/") for found in system.find(name))  # one request for all
        return
    for path in entries(folder):
        yield from files_below(path) if path.is_dir() else [path]


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where lpl_jax keeps what can be computed or fetched again: $XDG_CACHE_HOME/lpl_jax, or ~/.cache/lpl_jax."""
    return Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lpl_jax"
