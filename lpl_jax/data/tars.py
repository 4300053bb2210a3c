"""Samples of a tar file: members that share a key.

A key is a member's path without its last ending. By the convention of webdataset it ends at the first dot of the
file's name, so that KEY.seg.png is a part of sample KEY; but people's file names have dots ("photo.2024.01.jpg"). Both
are read: a file with more dots belongs to the sample of the shorter name where there is one, unless it is an image with
a caption, json or class of its own, and is a sample of its own otherwise.
"""

import itertools
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lpl_jax.data.images import IMAGE_SUFFIXES
from lpl_jax.data.listing import is_side
from lpl_jax.data.tar_files import Member, members
from lpl_jax.errors import InputError

IMAGE_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
PART_ENDINGS = ("txt", "json", "cls")
MOST_DOTS = 16  # of a name that continues another one's


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
    found = _UntilDamage(members(file))
    entries: Iterable[Member] = found
    if whole:
        entries = list(found)
        order: dict[str, int] = {}
        places = [order.setdefault(_group(member.name), len(order)) for member in entries]
        if places != sorted(places):
            yield "its files are not sorted: those of a sample lie apart (tar --sort=name puts them together)"
            entries = [member for _, member in sorted(zip(places, entries, strict=True), key=lambda pair: pair[0])]
    closed = set()
    for group, together in itertools.groupby(entries, lambda member: _group(member.name)):
        if group in closed:
            raise InputError(
                f"is not sorted, files of sample {group} lie apart; remote tar files are read from the front: make it "
                "again with tar --sort=name, or copy it to this machine"
            )
        closed.add(group)
        yield from _samples(list(together))
    if found.damage is not None:
        raise found.damage


class _UntilDamage:
    """The members before the damage of a tar file, and the damage."""

    def __init__(self, entries: Iterator[Member]):
        self._entries, self.damage = entries, None

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._entries
        except tarfile.TarError as error:
            self.damage = error


def _group(name: str) -> str:
    """Path up to the first dot of the file's name: samples of one group are told apart together."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _samples(group: list[Member]) -> Iterator[Sample]:
    """The samples of a group."""
    keys: dict[str, dict[str, list[Member]]] = {}
    for member in group:
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


def _is_document(ending: str, found: list[Member]) -> bool:
    """Whether files are about the tar file, as README.md is, and no part of a sample without an image."""
    return ending not in PART_ENDINGS and all(is_side(member.name) for member in found)


def _parent(key: str, keys: Iterable[str]) -> str | None:
    """The shortest key of the same group that this one continues after a dot."""
    folder, slash, base = key.rpartition("/")
    words = base.split(".")
    shorter = (folder + slash + ".".join(words[:count]) for count in range(1, min(len(words), MOST_DOTS)))
    return next((each for each in shorter if each in keys), None)
