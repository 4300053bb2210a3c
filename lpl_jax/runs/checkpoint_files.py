"""The files of a checkpoint, and whether they are those that were written.

    <step>/files.json   {name: [bytes, CRC-32]} of all other files of the checkpoint, and of itself under its own name

It is written when all else is there, right before the checkpoint gets its final name. What Orbax adds after that is
listed as it will be. Earlier versions listed neither that nor the list itself: their checkpoints are still read, with
what they list checked.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from lpl_jax.io.atomic import write_text
from lpl_jax.io.jsons import parse
from lpl_jax.io.paths import entries, files_below, is_remote

FILES = "files.json"
# Of Orbax: what a checkpoint is made of, with the time of its end; and that a folder is complete.
ABOUT, COMPLETE = "_CHECKPOINT_METADATA", "commit_success.txt"
_TIME = re.compile(rb'("commit_timestamp_nsecs": )(?:null|\d{19})')  # set last, read by nobody

Listed = dict[str, list[int]]


def write_list(path: epath.Path, final: epath.Path) -> None:
    """Writes the list of a checkpoint that is complete but for its name, which will be `final`."""
    listed = {name: size_and_checksum(path / name) for item in _items(path) for name in _files(path, item)}
    for name, content in _added_last(path, final).items():
        listed[name] = [len(content), zlib.crc32(content)]
    write_text(path / FILES, _text(listed | {FILES: _own(listed)}))


def read_list(path: epath.Path) -> Listed:
    """What a checkpoint lists.

    Raises:
      ValueError: it lists nothing, or not what was written. OSError: it cannot be read.
    """
    try:
        text = (path / FILES).read_text(encoding="utf-8")
        listed = parse(text, FILES)
    except FileNotFoundError:
        raise ValueError(f"{FILES} is missing") from None
    except ValueError:
        raise ValueError(f"{FILES} is not what was written") from None
    if not isinstance(listed, dict) or not listed or not all(map(_is_entry, listed.items())):
        raise ValueError(f"{FILES} is not what was written")
    if FILES in listed:
        others = {name: entry for name, entry in listed.items() if name != FILES}
        if listed[FILES] != _own(others) or text != _text(listed):
            raise ValueError(f"{FILES} is not what was written")
    return listed


def faults(path: epath.Path, item: str | None = None, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of an item (None: of all of the checkpoint), in words; [] where nothing is.

    part, parts: which of how many shares of the files to look at. The list itself is in every share.
    """
    try:
        listed = read_list(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    items = [item] if item is not None else sorted({*_items(path), *(n.split("/")[0] for n in listed if "/" in n)})
    names = [name for name in listed if "/" in name and name.split("/")[0] in items]
    wrong = [f"{each} is not listed" for each in items if not any(name.startswith(f"{each}/") for name in names)]
    there = [name for each in items for name in _files(path, each)]
    marks = FILES not in listed  # which earlier versions left out
    extra = [name for name in there if name not in listed and not (marks and name.endswith(f"/{COMPLETE}"))]
    wrong += [f"{name} is none of its files" for name in extra]
    added = _added_last(path)
    for name in (ABOUT, COMPLETE):
        if name in listed and [len(added[name]), zlib.crc32(added[name])] != listed[name]:
            wrong.append(f"{name} is not what was written" if added[name] else f"{name} is missing")
    names.sort(key=lambda name: listed[name])  # so that every share has large and small ones
    for name in names[part::parts]:
        try:
            if size_and_checksum(path / name) != listed[name]:
                wrong.append(f"{name} is not what was written")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            wrong.append(f"{name} is missing")
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    return wrong


def size_and_checksum(file: epath.Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def forget_cached(path: epath.Path) -> None:
    """What is read of these files next comes from the disk, not from memory, as far as the system does so."""
    if is_remote(path) or not hasattr(os, "posix_fadvise"):
        return
    for file in files_below(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _items(path: epath.Path) -> list[str]:
    return [entry.name for entry in entries(path) if entry.is_dir()]


def _files(path: epath.Path, item: str) -> list[str]:
    """The files of an item, by their path in the checkpoint, but for hidden ones, which file systems leave."""
    names = [file.relative_to(path).as_posix() for file in files_below(path / item)]
    return [name for name in names if not name.rpartition("/")[2].startswith(".")]


def _added_last(path: epath.Path, final: epath.Path | None = None) -> dict[str, bytes]:
    """What Orbax writes after the list: its content, without the time; b"" where there is none.

    final: the checkpoint's name to be, where it is not finished.
    """

    def content(name: str) -> bytes:
        file = path / name
        return file.read_bytes() if file.is_file() else b""

    found = {ABOUT: _TIME.sub(rb"\1null", content(ABOUT))}
    if final is None:
        return found | {COMPLETE: content(COMPLETE)}
    # The mark of a folder ends with its path: those of the items are there, the checkpoint's own will be like them.
    for item in _items(path):
        mark, own = content(f"{item}/{COMPLETE}"), str(path / item).encode()
        if mark.endswith(own):
            return found | {COMPLETE: mark.removesuffix(own) + str(final).encode()}
    return found


def _own(listed: Mapping[str, Any]) -> list[int]:
    """The list's entry of itself: of its text without this entry."""
    text = _text(listed).encode()
    return [len(text), zlib.crc32(text)]


def _text(listed: Mapping[str, Any]) -> str:
    return json.dumps(listed) + "\n"


def _is_entry(entry: tuple[str, Any]) -> bool:
    name, value = entry
    inside = not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
    whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return bool(name) and inside and whole
