"""Which files of a folder are images: one rule for stores, image sets and references.

What a file is, its ending says, in any case: an image (`IMAGE_SUFFIXES`), a tar file, or what usually lies beside
images (`SIDE_SUFFIXES`). All else is named with a reason: whoever lists a folder skips it in a report, or refuses it.
Hidden files and folders, what systems leave behind (`SYSTEM_NAMES`), and our own pictures of images (`io.pictures`) are
not there at all.
"""

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lpl_jax.data.images import IMAGE_SUFFIXES
from lpl_jax.errors import InputError
from lpl_jax.io.paths import AnyPath, files_below, is_remote, read_bounded
from lpl_jax.io.pictures import without_pictures

TAR_SUFFIXES = tuple(f".tar{end}" for end in ("", ".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".z", ".br"))
TAR_SUFFIXES += (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
SIDE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".cls", ".caption", ".xml", ".yaml", ".yml")
SIDE_SUFFIXES += (".md", ".html", ".log", ".py", ".sh")
SIDE_NAMES = ("readme", "license", "licence", "copying", "notice", "md5sums", "sha256sums")
SYSTEM_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "@eadir")
# What is wrong with one file alone, and not with the disk or the network.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
_OF_ONE_FILE += (errno.ENAMETOOLONG,)
MOST_AGAIN = 1000  # folders that are read more than once; links to links would grow without end


class Listing(NamedTuple):
    """The files below a folder: paths relative to it with "/" between, in natural order.

    Attributes:
      images, tars, sides: by their endings.
      others: every other file, with the reason why it is no image.
      folders: those that lie in the folder itself.
      loops: symbolic links back to a folder that they lie in; they are not followed.
      again: folders that are read in another place, too, by symbolic links: each of their files is listed twice.
    """

    images: list[str]
    tars: list[str]
    sides: list[str]
    others: dict[str, str]
    folders: list[str]
    loops: list[str]
    again: list[str]


def list_files(folder: AnyPath) -> Listing:
    """Lists a folder and its subfolders, which may be remote; symbolic links are followed.

    Raises:
      InputError: a folder that cannot be read, or `MOST_AGAIN` that are read several times.
    """
    found = Listing([], [], [], {}, [], [], [])
    walk = _remote(folder) if is_remote(folder) else _Walk(folder, found).files()
    for name, fault in sorted(walk, key=lambda entry: natural(entry[0])):
        if fault:
            found.others[name] = fault
        elif is_image(name):
            found.images.append(name)
        elif is_tar(name):
            found.tars.append(name)
        elif is_side(name):
            found.sides.append(name)
        else:
            ending = PurePosixPath(name).suffix
            found.others[name] = f"{ending or 'a name without an ending'} is no ending of an image that is read"
    found.folders.sort(key=natural)
    return found._replace(images=without_pictures(folder, found.images))


def read_listed(path: AnyPath, most: int) -> bytes:
    """The content of a file that was listed, of at most `most` bytes.

    Raises:
      InputError: it is longer, may not be read, or is no file any more. OSError: the disk or the network has failed.
    """
    try:
        return read_bounded(path, most)
    except OSError as error:
        if error.errno not in _OF_ONE_FILE:
            raise
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def first_kind(folder: Path) -> str | None:
    """Of a folder: "tar" or "image", whichever file is met first in it or below; None where there is neither."""
    for name, _ in _Walk(folder, Listing([], [], [], {}, [], [], [])).files():
        if is_tar(name) or is_image(name):
            return "tar" if is_tar(name) else "image"
    return None


def is_image(name: str) -> bool:
    """Whether a file's ending is that of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_tar(name: str) -> bool:
    """Whether a file's ending is that of a tar file, compressed ones included."""
    return name.lower().endswith(TAR_SUFFIXES)


def is_side(name: str) -> bool:
    """Whether a file is one of those that usually lie beside images."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SIDE_SUFFIXES or path.name.lower() in SIDE_NAMES


def is_hidden(name: str) -> bool:
    """Whether a path is passed over: a part of it begins with a dot, or a system has left it behind."""
    parts = PurePosixPath(name).parts
    return any((part[0] == "." and part != "..") or part.lower() in SYSTEM_NAMES for part in parts)


def natural(name: str) -> tuple:
    """Sorts 2.png before 10.png, folder by folder."""
    parts = (re.split("([0-9]+)", part) for part in name.split("/"))
    numbers = tuple(tuple(int(text[-999:]) if i % 2 else text for i, text in enumerate(part)) for part in parts)
    return numbers, name


def name_text(name: str) -> str:
    r"""A file's name as text of one line: bytes that are no UTF-8, and control characters, become \xe9 and the like.

    It is what keys and class names of stores are made with.
    """
    return "".join(map(_escaped, name))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that does not decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


class _Walk:
    """Files of a local folder and what is wrong with them; a listing gets links that lead back or are read again."""

    def __init__(self, root: Path, listing: Listing):
        self._root, self._listing = root, listing

    def files(self) -> Iterator[tuple[str, str]]:
        """(path, "" or the reason why it cannot be read)."""
        places = set()
        waiting: list[tuple[str, tuple]] = [("", ())]
        while waiting:
            parent, above = waiting.pop()
            place = _place(self._root / parent)
            if place in above:
                self._listing.loops.append(parent)
                continue
            if place in places:
                self._again(parent)
            places.add(place)
            for name, fault in self._entries(parent):
                if fault is None:
                    waiting.append((name, (*above, place)))
                else:
                    yield name, fault

    def _entries(self, parent: str) -> list[tuple[str, str | None]]:
        """(path, None of a folder, else as in `files`), the last one first."""
        found = []
        try:
            with os.scandir(self._root / parent) as entries:
                for entry in entries:
                    if not is_hidden(entry.name):
                        name = f"{parent}/{entry.name}" if parent else entry.name
                        found.append((name, _fault(entry)))
        except OSError as error:
            raise InputError(f"{self._root / parent} cannot be read: {error.strerror}") from None
        if not parent:
            self._listing.folders.extend(name for name, fault in found if fault is None)
        return sorted(found, reverse=True)

    def _again(self, folder: str) -> None:
        self._listing.again.append(folder)
        if len(self._listing.again) > MOST_AGAIN:
            raise InputError(
                f"{self._root}: more than {MOST_AGAIN} folders are read several times, by symbolic links; "
                f"{folder} is one of them"
            )


def _place(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino


def _fault(entry: os.DirEntry) -> str | None:
    """None of a folder, "" of a file, else what it is."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return f"a symbolic link to nothing that can be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return None
    return "" if stat.S_ISREG(mode) else "neither a file nor a folder"


def _remote(folder: AnyPath) -> Iterator[tuple[str, str]]:
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        if not is_hidden(name):
            yield name, ""
