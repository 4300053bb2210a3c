"""Webdataset shards as img2dataset writes them: tar files with KEY.jpg, KEY.txt and KEY.json for each image.

They are read from the front, on a disk or from object storage (through fsspec). What cannot be used is yielded as an
item that says why; an error of the disk or of the network is no such thing, and is raised.
"""

import functools
import glob
import hashlib
import itertools
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lpl_jax.data.captions import TXT, check_columns, read_captions
from lpl_jax.data.examples import Example, Identified, Item, Unit
from lpl_jax.data.images import Crop, read_rgb
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint_files
from lpl_jax.io.paths import file_system, is_remote, to_path

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
ENDINGS = (*IMAGE_ENDINGS, "txt", "json")
BLOCK = 512  # a tar file is made of blocks of so many bytes; one of zeros ends it
UNLABELLED = ("all",)


class WebDatasetSource(Identified):
    """Images and captions of tar files.

    Args:
      pattern: a tar file, a folder of them, or a pattern with * or {00000..00099}; a path, or a URL that fsspec knows
        (gs://, s3://, memory://).
      captions: columns: "txt" or a field of the json (see `captions.read_captions`); none: images without text.
      limit: at most this many samples, the first of every tar file alike.
      identity: how these files are told from others of their names, see `io.fingerprints`.

    Attributes:
      urls, sizes: the tar files in order of their names, and their bytes.

    Raises:
      InputError: nothing there, or a file system that is not installed.
    """

    def __init__(
        self,
        pattern: str,
        resolution: int,
        *,
        captions: Sequence[str] = (TXT,),
        crop: str = "resize_center_crop",
        seed: int = 0,
        limit: int | None = None,
        identity: str = "times",
    ):
        if limit is not None and limit < 1:
            raise InputError(f"limit={limit}: must be a positive number of images")
        self.crop = Crop(resolution, crop, seed=seed)
        self.class_names = UNLABELLED
        self.caption_columns = check_columns(captions)
        self.urls, self.sizes = _find(pattern)
        self._names = _names(self.urls)
        self._limit = limit
        text = f", captions {', '.join(self.caption_columns)}" if self.caption_columns else ""
        most = "" if limit is None else f"at most {limit} images of "
        self.description = f"{most}webdataset {pattern}: {len(self.urls)} tar files{text}"
        self._identified_by = identity

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """Of the tar files."""
        files = fingerprint_files(dict(zip(self._names, self.urls, strict=True)), self._identified_by)
        return self._options("webdataset") | {"limit": str(self._limit)} | files

    def units(self) -> list[Unit]:
        """One for each tar file."""
        return [Unit(name, functools.partial(self._items, number)) for number, name in enumerate(self._names)]

    def _items(self, number: int) -> Iterator[Item]:
        url, name = self.urls[number], self._names[number]
        stem = name.removesuffix(".tar")
        most = None
        if self._limit is not None:
            most = self._limit // len(self.urls) + (number < self._limit % len(self.urls))
        count = 0
        with _open(url) as file:
            try:
                for sample, parts in read_tar(file):
                    if count == most:
                        return
                    count += 1
                    key = f"{stem}/{sample}"
                    yield Item(key, functools.partial(self._load, key, parts))
            except tarfile.TarError as error:
                reason = f"{url}: tar file is damaged or was cut short after {count} images ({error})"
                yield Item(name, functools.partial(_refuse, reason))

    def _load(self, key: str, parts: dict[str, bytes]) -> Example:
        found = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
        if found is None:
            raise InputError(f"{key}: has no image ({', '.join(IMAGE_ENDINGS)})")
        captions = read_captions(self.caption_columns, parts.get, key)
        # Files are read in any order by any host: a random crop is drawn from the key, not from a running number.
        index = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        image, control = self.crop.with_control(read_rgb(found, key), index, key)
        return Example(image, 0, key, control, captions)


def read_tar(file) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, ending -> content) of each sample of an open tar file; a sample is a run of members with one key.

    A key is a member's path up to the first dot of its name, the ending what follows, in lower case; endings other
    than `ENDINGS` are skipped.

    Raises:
      tarfile.TarError: damaged, or ending without the mark that ends a tar file. What was read before that was yielded,
        the last sample perhaps without some of its files.
    """
    key, parts, damage = "", {}, None
    try:
        for name, content in _members(file):
            folder, _, file_name = name.rpartition("/")
            base, _, ending = file_name.partition(".")
            found = f"{folder}/{base}" if folder else base
            if found != key:
                if parts:
                    yield key, parts
                key, parts = found, {}
            if base and ending.lower() in ENDINGS:
                parts[ending.lower()] = content
    except tarfile.TarError as error:
        damage = error
    if parts:
        yield key, parts
    if damage is not None:
        raise damage


def _members(file) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a tar file."""
    watched: Any = _Watched(file)
    opened: Any = tarfile.open(fileobj=watched, mode="r|")  # noqa: SIM115  # typed loosely: it has `members`
    with opened as tar:
        for member in tar:
            tar.members = []  # or it would remember every header
            if member.isfile():
                yield member.name, tar.extractfile(member).read()
        if not watched.is_zero(tar.offset):
            raise tarfile.ReadError("no end mark where the next file should begin")


class _Watched:
    """A file that remembers the last bytes read: tarfile takes a damaged header for the end of the file."""

    def __init__(self, file):
        self._file, self._read, self._chunks = file, 0, deque(maxlen=3)

    def read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self._read += len(chunk)
        self._chunks.append(chunk)
        return chunk

    def is_zero(self, offset: int) -> bool:
        """Whether the block at `offset`, which was read recently, is one of zeros."""
        tail = b"".join(self._chunks)
        start = offset - (self._read - len(tail))
        return tail[start : start + BLOCK] == bytes(BLOCK)


def is_webdataset(spec: str) -> bool:
    """Whether the name of a source means tar files: a URL, a name with .tar, or a folder that holds tar files."""
    return is_remote(spec) or spec.endswith(".tar") or any(to_path(spec, "data.source").glob("*.tar"))


def expand(pattern: str) -> list[str]:
    """Every {00000..00099} of a pattern written out, zeros in front kept; the last one changes fastest."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) < int(first):
        raise InputError(f"webdataset {pattern}: {match[0]} counts down; write the smaller number first")
    numbers = range(int(first), int(last) + 1)
    rest = expand(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{number:0{len(first)}d}{end}" for number in numbers for end in rest]


def _find(pattern: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Paths or URLs of the tar files that a pattern means, and their sizes in bytes."""
    urls = [url for part in expand(pattern) for url in (_remote(part) if is_remote(part) else _local(part))]
    if not urls:
        raise InputError(f"webdataset {pattern}: no tar file there")
    try:
        with ThreadPoolExecutor(32) as pool:
            return tuple(urls), tuple(pool.map(_size, urls))
    except FileNotFoundError as error:
        raise InputError(f"webdataset {pattern}: {error.filename or error} is missing") from None


def _local(part: str) -> list[str]:
    path = to_path(part, "data.source")
    if path.is_dir():
        return sorted(map(str, path.glob("*.tar")))
    return sorted(glob.glob(str(path))) if glob.has_magic(part) else [str(path)]  # noqa: PTH207, Path.glob takes no absolute one


def _remote(part: str) -> list[str]:
    if not glob.has_magic(part) and part.endswith(".tar"):
        return [part]
    system, path = file_system(part)
    found = system.glob(path if glob.has_magic(part) else f"{path.rstrip('/')}/*.tar")
    return [system.unstrip_protocol(str(name)) for name in sorted(found)]


def _size(url: str) -> int:
    if not is_remote(url):
        return Path(url).stat().st_size
    system, path = file_system(url)
    return system.info(path)["size"]


def _open(url: str):
    if not is_remote(url):
        return Path(url).open("rb")
    system, path = file_system(url)
    return system.open(path, "rb")


def _names(urls: Sequence[str]) -> tuple[str, ...]:
    """Paths of the tar files relative to their common folder, so that names do not depend on where it is."""
    folders = [url.split("/")[:-1] for url in urls]
    common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    return tuple("/".join(url.split("/")[common:]) for url in urls)


def _refuse(reason: str):
    raise InputError(reason)
