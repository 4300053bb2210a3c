"""Samples of a tar file: members that share a key, from plain, compressed and concatenated files.

A key is a member's path without its last ending. By the convention of webdataset it ends at the first dot of the
file's name, so that KEY.seg.png is a part of sample KEY; but people's file names have dots ("photo.2024.01.jpg"). Both
are read: a file with more dots belongs to the sample of the shorter name where there is one, unless it is an image with
a caption, json or class of its own, and is a sample of its own otherwise.
"""

import bz2
import functools
import gzip
import io
import itertools
import lzma
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from lpl_jax.data import decoding
from lpl_jax.data.images import IMAGE_SUFFIXES
from lpl_jax.data.listing import is_hidden, is_side
from lpl_jax.errors import InputError

IMAGE_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
PART_ENDINGS = ("txt", "json", "cls")
BLOCK = 512  # a tar file is made of blocks of so many bytes; one of zeros ends it
CHUNK = 2**20
MOST_BYTES = decoding.MAX_BYTES  # of a member
IN_MEMORY = 2**26  # bytes of a stream that are kept there, before a temporary file is made
MARK = 16  # bytes that tell how a file is compressed
MOST_LINKS = 16  # from one to the next
READERS = (  # by the bytes that a file begins with, whatever its name is
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
)
UNREADABLE = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"\x1f\x9d": "compress", b"PK\x03\x04": "zip"}


class Member(NamedTuple):
    """A file in a tar file; `read` gives its content, or raises the InputError that says why it cannot."""

    name: str
    read: Callable[[], bytes]


class Sample(NamedTuple):
    """Members with one key.

    Attributes:
      image: the ending of its image; None where it has none.
      parts: ending -> member: the image, and those of `PART_ENDINGS`.
      further: names of images that are left to it: a second one of its key, or KEY.seg.png.
      again: names of members that it has already.
      found: every ending of its key, for messages.
    """

    key: str
    image: str | None
    parts: dict[str, Member]
    further: list[str]
    again: list[str]
    found: list[str]


def read_tar(file: Any, *, whole: bool) -> Iterator[Sample | str]:
    """The samples of an open tar file, and what is to be told about it, in a line.

    Args:
      file: it has to be seekable.
      whole: look for all members first, so that those of a sample may lie apart. Otherwise it is read from the front
        as far as it is wanted.

    Raises:
      InputError: members of a sample lie apart, where not the whole file is looked at first.
      tarfile.TarError: damaged, or ending without the mark that ends a tar file; all samples before that were given.
    """
    entries, damage = _members(file), None
    if whole:
        entries, damage = _all_of(entries)
        order: dict[str, int] = {}
        places = [order.setdefault(_group(member.name), len(order)) for member in entries]
        if places != sorted(places):
            yield "its files are not sorted: those of a sample lie apart (tar --sort=name puts them together)"
            entries = [member for _, member in sorted(zip(places, entries, strict=True), key=lambda pair: pair[0])]
    closed = set()
    for group, members in itertools.groupby(entries, lambda member: _group(member.name)):
        if group in closed:
            raise InputError(
                f"is not sorted, files of sample {group} lie apart; remote tar files are read from the front: make it "
                "again with tar --sort=name, or copy it to this machine"
            )
        closed.add(group)
        yield from _samples(list(members))
    if damage is not None:
        raise damage


def _all_of(entries: Iterable[Member]) -> tuple[list[Member], tarfile.TarError | None]:
    found = []
    try:
        found.extend(entries)  # keeps what came before an error
    except tarfile.TarError as error:
        return found, error
    return found, None


def _group(name: str) -> str:
    """Path up to the first dot of the file's name: samples of one group are told apart together."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _samples(members: list[Member]) -> Iterator[Sample]:
    """The samples of a group."""
    keys: dict[str, dict[str, list[Member]]] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.rpartition(".") if "." in base else (base, "", "")
        keys.setdefault(folder + slash + stem, {}).setdefault(ending.lower(), []).append(member)
    further: dict[str, list[str]] = {}
    own: dict[str, list[str]] = {}
    for key, parts in keys.items():
        images = [ending for ending in IMAGE_ENDINGS if ending in parts]
        parent = _parent(key, keys)
        if parent is None or (images and any(ending in parts for ending in PART_ENDINGS)):
            own[key] = images
        else:
            further.setdefault(parent, []).extend(each.name for ending in images for each in parts[ending])
    for key, images in own.items():
        parts = keys[key]
        left = [parts[ending][0].name for ending in images[1:]] + further.get(key, [])
        if not images and not left and all(map(_is_document, parts, parts.values())):
            continue
        image = images[0] if images else None
        again = [member.name for found in parts.values() for member in found[1:]]
        wanted = {ending: found[0] for ending, found in parts.items() if ending in (image, *PART_ENDINGS)}
        yield Sample(key, image, wanted, left, again, list(parts))


def _is_document(ending: str, members: list[Member]) -> bool:
    """Whether files are about the tar file, as README.md is, and no part of a sample without an image."""
    return ending not in PART_ENDINGS and all(is_side(member.name) for member in members)


def _parent(key: str, keys: Iterable[str]) -> str | None:
    """The shortest key of the same group that this one continues after a dot."""
    folder, slash, base = key.rpartition("/")
    words = base.split(".")
    shorter = (folder + slash + ".".join(words[:count]) for count in range(1, len(words)))
    return next((each for each in shorter if each in keys), None)


def _members(file: Any) -> Iterator[Member]:
    """The files of a tar file and of those that follow behind its end mark; hidden ones and folders are passed over."""
    places: dict[str, str | Callable[[], bytes]] = {}
    start: int | None = 0
    while start is not None:
        file.seek(start)
        opened: Any = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # typed loosely: it has `members`
        while (info := opened.next()) is not None:
            opened.members = []  # or it would remember every header
            whole = not info.isreg() or info.issparse() or _reaches(file, info.offset_data + info.size)
            if not whole:
                raise tarfile.ReadError("unexpected end of data")
            member = _member(opened, info, places)
            if member is not None:
                yield member
        start = _behind(file, opened.offset, start)


def _reaches(file: Any, end: int) -> bool:
    """Whether a file has that many bytes."""
    file.seek(end - 1)
    return bool(file.read(1))


def _member(opened: Any, info: tarfile.TarInfo, places: dict[str, str | Callable[[], bytes]]) -> Member | None:
    name = posixpath.normpath(info.name).lstrip("/")
    if info.isdir():
        return None
    if info.islnk() or info.issym():
        folder = posixpath.dirname(name) if info.issym() else ""
        places[name] = target = posixpath.normpath(posixpath.join(folder, info.linkname)).lstrip("/")
        read = functools.partial(_follow, places, name, target)
    elif not info.isreg():
        places[name] = read = functools.partial(_refuse, f"{name}: neither a file nor a link")
    elif info.size > MOST_BYTES:
        places[name] = read = functools.partial(_refuse, f"{name}: {info.size} bytes, more than {MOST_BYTES}")
    elif info.issparse():
        places[name] = read = opened.extractfile(info).read
    else:
        places[name] = read = functools.partial(_content, opened.fileobj, info.offset_data, info.size)
    return None if is_hidden(name) else Member(name, read)


def _content(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _follow(places: dict[str, str | Callable[[], bytes]], name: str, target: str) -> bytes:
    for _ in range(MOST_LINKS):
        found = places.get(target)
        if found is None:
            raise InputError(f"{name}: a link to {target}, which is not in the tar file")
        if not isinstance(found, str):
            return found()
        target = found
    raise InputError(f"{name}: a link that leads to no file")


def _refuse(reason: str) -> bytes:
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
        return _Spool(_Decompressed(reader(_Joined(head, stream))))
    return stream if local else _Spool(_Joined(head, stream))


class _Joined:
    """A stream of which the first bytes were read."""

    def __init__(self, head: bytes, rest: Any):
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        if self._head:
            found, self._head = self._head[:size], self._head[size:]
            return found
        return self._rest.read(size)


class _Decompressed:
    """A stream that says of damage that it is none of the tar file that one can read on from."""

    def __init__(self, stream: Any):
        self._stream = stream

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read1(size)  # `read` would lose what came before the damage
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise tarfile.ReadError(f"its compression: {error}") from None
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
