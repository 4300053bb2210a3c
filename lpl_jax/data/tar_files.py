"""The files in a tar file: plain, compressed and concatenated ones, with every size checked before it is believed.

A header may claim any number of bytes for a name, a member, a hole in it or the headers themselves, and a compressed
file of a kilobyte may inflate without end. What is claimed is compared with what is there, or with a bound, before
memory is taken.
"""

import bz2
import errno
import functools
import gzip
import io
import lzma
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from lpl_jax.data.listing import is_hidden
from lpl_jax.errors import InputError

BLOCK = 512  # a tar file is made of blocks of so many bytes; one of zeros ends it
CHUNK = 2**20
IN_MEMORY = 2**26  # bytes of a stream that are kept there, before a temporary file is made
MARK = 16  # bytes that tell how a file is compressed
MOST_HEADERS = 2**20  # bytes of the headers of a member, with its name
MOST_NAME = 4096  # characters of it, as of a path
MOST_HOLES = 2**24  # bytes of a member that are not stored, because they are zero
MOST_LINKS = 16  # from one to the next
# A compressed file may inflate to so many bytes, or to so many times its own: images hardly do.
INFLATED, RATIO = 2**27, 100
READERS = (  # by the bytes that a file begins with, whatever its name is
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
)
UNREADABLE = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"\x1f\x9d": "compress", b"PK\x03\x04": "zip"}

Read: TypeAlias = Callable[[int], bytes]


class Member(NamedTuple):
    """A file in a tar file.

    read: function(most) -> its content of at most `most` bytes; raises the InputError that says why there is none.
    """

    name: str
    read: Read


def members(file: Any) -> Iterator[Member]:
    """The files of a tar file and of those that follow behind its end mark; hidden ones and folders are passed over.

    file: it has to be seekable (see `seekable`).

    Raises:
      tarfile.TarError: damaged, or ending without the mark that ends a tar file; all files before that were given.
    """
    places: dict[str, str | Read] = {}
    start: int | None = 0
    while start is not None:
        _seek(file, start)
        headers: Any = _Headers(file)  # it has of a file what tarfile reads with
        opened: Any = _safely(lambda h=headers: tarfile.open(fileobj=h, mode="r:"))  # noqa: SIM115
        while (info := _next(opened, headers)) is not None:
            if not _reaches(file, _stored_end(info)):
                raise tarfile.ReadError("unexpected end of data")
            member = _member(file, info, places)
            if member is not None:
                yield member
        start = _behind(file, opened.offset, start)


def _next(opened: Any, headers: Any) -> tarfile.TarInfo | None:
    headers.left = MOST_HEADERS
    info = _safely(opened.next)
    opened.members = []  # or it would remember every header
    opened.pax_headers.clear()
    if info is not None and (info.size < 0 or opened.offset < info.offset_data):
        raise tarfile.ReadError("a member of a negative size")
    return info


def _safely(read: Callable[[], Any]) -> Any:
    """What tarfile reads; whatever it raises for damaged headers is a TarError."""
    try:
        return read()
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:  # numbers and encodings that are none, headers of headers without end
        raise tarfile.ReadError(f"a header that cannot be read ({type(error).__name__})") from None


class _Headers:
    """The file as tarfile sees it: of each member it may read so many bytes of headers."""

    def __init__(self, file: Any):
        self._file, self.left = file, MOST_HEADERS

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers of a member of more than {MOST_HEADERS:,} bytes")
        self.left -= size
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return _seek(self._file, place)

    def tell(self) -> int:
        return self._file.tell()


def _seek(file: Any, place: int) -> int:
    try:
        if 0 <= place < 2**62:
            return file.seek(place)
    except OSError as error:  # a place that no file on this disk can have
        if error.errno != errno.EINVAL:
            raise
    raise tarfile.ReadError("a size that no file has")


def _stored_end(info: Any) -> int:
    """Where the content of a member ends in the tar file."""
    if info.issparse():
        return info.offset_data + sum(max(0, length) for _, length in info.sparse)
    return info.offset_data + (info.size if info.isreg() else 0)


def _reaches(file: Any, end: int) -> bool:
    """Whether a file has that many bytes."""
    _seek(file, end - 1)
    return bool(file.read(1))


def _member(file: Any, info: Any, places: dict[str, str | Read]) -> Member | None:
    name = posixpath.normpath(info.name).lstrip("/")
    if info.isdir():
        return None
    if len(name) > MOST_NAME:
        short = f"{name[:80]}..."
        return Member(short, functools.partial(_refuse, f"{short}: a name of {len(name):,} characters"))
    if info.islnk() or info.issym():
        folder = posixpath.dirname(name) if info.issym() else ""
        places[name] = target = posixpath.normpath(posixpath.join(folder, info.linkname)).lstrip("/")
        read = functools.partial(_follow, places, name, target)
    elif not info.isreg():
        places[name] = read = functools.partial(_refuse, f"{name}: neither a file nor a link")
    elif info.issparse():
        places[name] = read = functools.partial(_sparse, file, info.offset_data, info.size, info.sparse, name)
    else:
        places[name] = read = functools.partial(_content, file, info.offset_data, info.size, name)
    return None if is_hidden(name) else Member(name, read)


def _content(file: Any, offset: int, size: int, name: str, most: int) -> bytes:
    _check_size(name, size, most)
    file.seek(offset)
    return file.read(size)


def _sparse(file: Any, offset: int, size: int, blocks: list[tuple[int, int]], name: str, most: int) -> bytes:
    """A file with holes, of which the tar file keeps the rest, one block behind the other."""
    _check_size(name, size, most)
    if size - sum(length for _, length in blocks) > MOST_HOLES:
        raise InputError(f"{name}: {size:,} bytes with holes of more than {MOST_HOLES:,}")
    content, end = bytearray(size), 0
    file.seek(offset)
    for place, length in blocks:
        if not (end <= place and 0 <= length <= size - place):
            raise InputError(f"{name}: its map of holes is damaged")
        end = place + length
        content[place:end] = file.read(length)
    return bytes(content)


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise InputError(f"{name}: {size:,} bytes: at most {most:,} are read")


def _follow(places: dict[str, str | Read], name: str, target: str, most: int) -> bytes:
    for _ in range(MOST_LINKS):
        found = places.get(target)
        if found is None:
            raise InputError(f"{name}: a link to {target}, which is not in the tar file")
        if not isinstance(found, str):
            return found(most)
        target = found
    raise InputError(f"{name}: a link that leads to no file")


def _refuse(reason: str, most: int) -> bytes:
    raise InputError(reason)


def _behind(file: Any, end: int, start: int) -> int | None:
    """Where the next tar file begins behind the end mark at `end` of one that began at `start`; None where none does.

    tarfile takes a damaged header for the end of the file: an end has a block of zeros.
    """
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        damaged = "no end mark where the next file should begin" if end > start or not start else "data behind its end"
        raise tarfile.ReadError(damaged)
    place = end + BLOCK
    while chunk := file.read(CHUNK):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return place + zeros // BLOCK * BLOCK
        place += len(chunk)
    return None


def seekable(stream: Any, *, local: bool) -> Any:
    """A stream of bytes as a file for `read_tar`: decompressed, and kept on this machine as far as it was read.

    local: it is a file on this machine, which is read where it is unless it is compressed.

    Raises:
      InputError: a compression that is not read.
    """
    head = stream.read(MARK)
    for mark, kind in UNREADABLE.items():
        if head.startswith(mark):
            raise InputError(f"compressed by {kind}, which is not read; possible: no compression, gzip, bzip2, xz")
    reader: Any = next((reader for mark, reader in READERS if mark.match(head)), None)
    if reader is not None:
        joined = _Joined(head, stream)
        return _Spool(_Decompressed(reader(joined), joined))
    return stream if local else _Spool(_Joined(head, stream))


class _Joined:
    """A stream of which the first bytes were read."""

    def __init__(self, head: bytes, rest: Any):
        self._head, self._rest, self.taken = head, rest, 0

    def read(self, size: int) -> bytes:
        if self._head:
            found, self._head = self._head[:size], self._head[size:]
        else:
            found = self._rest.read(size)
        self.taken += len(found)
        return found


class _Decompressed:
    """A stream that says of damage that it is none of the tar file that one can read on from."""

    def __init__(self, stream: Any, compressed: _Joined):
        self._stream, self._compressed, self._given = stream, compressed, 0

    def read(self, size: int) -> bytes:
        found = self._read(size)
        self._given += len(found)
        if self._given > INFLATED and self._given > RATIO * self._compressed.taken:
            raise tarfile.ReadError(f"its compression: it inflates to more than {RATIO} times its size")
        return found

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read1(size)  # `read` would lose what came before the damage
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, MemoryError) as error:
            raise tarfile.ReadError(f"its compression: {error or 'more memory than there is'}") from None
        except OSError as error:
            if "Invalid data stream" not in str(error):  # what bz2 says; others come from the disk or the network
                raise
            raise tarfile.ReadError(f"its compression: {error}") from None


class _Spool:
    """A stream that can be read again from any place that was reached: it is kept in a temporary file."""

    def __init__(self, stream: Any):
        self._stream, self._place, self._size, self._ended = stream, 0, 0, False
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def seek(self, place: int) -> int:
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        self._reach(self._place + size)
        if self._place >= self._size:
            return b""
        self._file.seek(self._place)
        found = self._file.read(size)
        self._place += len(found)
        return found

    def _reach(self, end: int) -> None:
        self._file.seek(0, io.SEEK_END)
        while self._size < end and not self._ended:
            chunk = self._stream.read(CHUNK)
            self._ended = not chunk
            self._file.write(chunk)
            self._size += len(chunk)
