"""Webdataset shards as img2dataset writes them: tar files with KEY.jpg, KEY.txt, KEY.json and KEY.cls for each image.

They are on a disk or on object storage (through fsspec). What cannot be used is yielded as an item that says why; an
error of the disk or of the network is no such thing, and is raised. `tars` says what is a sample.
"""

import codecs
import contextlib
import functools
import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lpl_jax.data.captions import MAX_BYTES, TXT, check_columns, read_captions
from lpl_jax.data.examples import Example, Identified, Item, Note, Skipped, Unit
from lpl_jax.data.images import Crop
from lpl_jax.data.listing import first_kind, is_hidden, is_image, is_tar, list_files, name_text, natural
from lpl_jax.data.records import MOST_CLASSES
from lpl_jax.data.tar_files import seekable
from lpl_jax.data.tars import IMAGE_ENDINGS, PART_ENDINGS, Sample, read_tar
from lpl_jax.errors import InputError, some
from lpl_jax.io.fingerprints import fingerprint_files
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.paths import file_system, is_remote, open_regular, to_path

AGAIN = "is in the tar file twice; the first one is taken"
MOST_FILES = 10**6
LABEL = "cls"  # ending of the file with the number of a sample's class
UNLABELLED = ("all",)


class WebDatasetSource(Identified):
    """Images and captions of tar files, and labels where the first sample has one: then the others need one, too.

    Args:
      pattern: a tar file, a folder of them (those in its subfolders included), or a pattern with * or {00000..00099}; a
        path, or a URL that fsspec knows (gs://, s3://, memory://).
      captions: columns: "txt" or a field of the json (see `captions.read_captions`); none: images without text.
      limit: at most this many samples, the first of every tar file alike.
      identity: how these files are told from others of their names, see `io.fingerprints`.
      limits: the largest image that is read.

    Attributes:
      urls, sizes: the tar files in order of their names, and their bytes.
      class_names: none where there are labels: how many classes there are is known when all is read.

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
        limits: ImageLimits = DEFAULT,
    ):
        if limit is not None and limit < 1:
            raise InputError(f"limit={limit}: must be a positive number of images")
        self.crop = Crop(resolution, crop, seed=seed)
        self.caption_columns = check_columns(captions)
        texts = ((TXT, TXT in self.caption_columns), ("json", set(self.caption_columns) - {TXT}))
        self._endings = (LABEL, *(ending for ending, wanted in texts if wanted))
        self.urls, self.sizes = _find(pattern)
        self._names = _names(self.urls)
        self._stems = _stems(self._names)
        self._limit, self._limits = limit, limits
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

    @property
    def class_names(self) -> tuple[str, ...]:
        """See above."""
        return () if self._is_labelled else UNLABELLED

    @functools.cached_property
    def _is_labelled(self) -> bool:
        """Whether the first sample with an image has a label."""
        for url in self.urls:
            try:
                with _samples(url) as samples:
                    for sample in samples:
                        if isinstance(sample, Sample) and sample.image:
                            return LABEL in sample.parts
            except (tarfile.TarError, InputError):
                continue  # which is said when it is read
        return False

    def _items(self, number: int) -> Iterator[Item | Skipped | Note]:
        url, name = self.urls[number], self._names[number]
        most = None
        if self._limit is not None:
            most = self._limit // len(self.urls) + (number < self._limit % len(self.urls))
        if most == 0:
            return
        count = 0
        try:
            with _samples(url) as samples:
                for entry in samples:
                    if isinstance(entry, str):
                        yield Note(f"{url}: {entry}")
                        continue
                    if count == most:
                        return
                    count += 1
                    yield from self._entries(number, entry)
            if not count:
                yield Note(f"{url}: has no samples")
        except tarfile.TarError as error:
            reason = f"{url}: tar file is damaged or was cut short after {count} images ({error})"
            yield Skipped(name, name, reason)
        except InputError as error:
            raise InputError(f"{url}: {error}") from None

    def _entries(self, number: int, sample: Sample) -> Iterator[Item | Skipped | Note]:
        """What a sample gives: itself, and what of it is left out."""
        stem, unit = self._stems[number], self._names[number]
        key = f"{stem}/{sample.key}"
        try:
            if sample.image is None:
                found = ", ".join(ending or "a name without an ending" for ending in sample.found[:4])
                raise InputError(f"{key}: has no image ({', '.join(IMAGE_ENDINGS)}); it has {found}")
            parts = {
                ending: member.read(MAX_BYTES if ending in PART_ENDINGS else self._limits.bytes)
                for ending, member in sample.parts.items()
                if ending in (sample.image, *self._endings)
            }
            size = sum(map(len, parts.values()))
            yield Item(key, functools.partial(self._load, key, sample.image, parts), size)
        except InputError as error:
            yield Skipped(key, unit, str(error))
        for name in sample.further:
            reason = f"{stem}/{name}: another image of sample {name_text(sample.key)}, no sample of its own"
            yield Skipped(f"{stem}/{name}", unit, reason, tolerated=True)
        for name in sample.again:
            if is_image(name):
                yield Skipped(f"{stem}/{name}", unit, f"{stem}/{name}: {AGAIN}")
        if texts := [name for name in dict.fromkeys(sample.again) if not is_image(name)]:
            yield Note(name_text(f"{stem}/{some(texts)}: {AGAIN}"))

    def _load(self, key: str, ending: str, parts: dict[str, bytes]) -> Example:
        captions = read_captions(self.caption_columns, parts.get, key)
        label = self._label(key, parts.get(LABEL))
        # Files are read in any order by any host: a random crop is drawn from the key, not from a running number.
        index = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        image, control = self.crop.read(parts[ending], index, key, self._limits)
        return Example(image, label, key, control, captions)

    def _label(self, key: str, content: bytes | None) -> int:
        labelled = self._is_labelled
        if content is None and labelled:
            raise InputError(f"{key}: has no label (.{LABEL}), as the first sample has")
        if content is not None and not labelled:
            raise InputError(f"{key}: has a label (.{LABEL}), and the first sample has none")
        if content is None:
            return 0
        content = content.removeprefix(codecs.BOM_UTF8)
        if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content) or int(content) >= MOST_CLASSES:
            raise InputError(f"{key}: its label {content[:20]!r} is no number of a class, 0 to {MOST_CLASSES - 1}")
        return int(content)


@contextlib.contextmanager
def _samples(url: str) -> Iterator[Iterator[Sample | str]]:
    """What `read_tar` gives of a tar file; one on this machine is looked at as a whole."""
    local = not is_remote(url)
    with _open(url) as stream:
        yield read_tar(seekable(stream, local=local), whole=local)


def is_webdataset(spec: str) -> bool:
    """Whether the name of a source means tar files: a URL, their name or pattern, or a folder that holds them."""
    if is_remote(spec) or is_tar(spec) or expand(spec) != [spec]:
        return True
    path = to_path(spec, "data.source")
    return first_kind(path) == "tar" if path.is_dir() else glob.has_magic(spec)


def expand(pattern: str) -> list[str]:
    """Every {00000..00099} of a pattern written out, zeros in front kept; the last one changes fastest."""
    match = re.search(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) < int(first):
        raise InputError(f"webdataset {pattern}: {match[0]} counts down; write the smaller number first")
    numbers = range(int(first), int(last) + 1)
    rest = expand(pattern[match.end() :])
    if len(numbers) * len(rest) > MOST_FILES:
        raise InputError(f"webdataset {pattern}: means more than {MOST_FILES:,} files")
    return [f"{pattern[: match.start()]}{number:0{len(first)}d}{end}" for number in numbers for end in rest]


def _find(pattern: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Paths or URLs of the tar files that a pattern means, each once, and their sizes in bytes."""
    urls = [url for part in expand(pattern) for url in (_remote(part) if is_remote(part) else _local(part))]
    urls = list(dict.fromkeys(urls))
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
        files = list_files(path)
        if files.images:
            raise InputError(
                f"webdataset {part}: holds tar files ({files.tars[0]}) and images ({files.images[0]}), in folders of "
                "it perhaps: either all images lie in tar files, or none (a pattern such as FOLDER/*.tar means the "
                "tar files alone)"
            )
        return [str(path / name) for name in files.tars]
    if not glob.has_magic(part):
        return [str(path)]
    found = sorted(glob.glob(str(path), recursive=True), key=natural)  # noqa: PTH207, Path.glob takes no absolute one
    return [name for name in found if Path(name).is_file() and (is_tar(name) or is_tar(part))]


def _remote(part: str) -> list[str]:
    if not glob.has_magic(part) and is_tar(part):
        return [part]
    system, path = file_system(part)
    found = map(str, system.glob(path) if glob.has_magic(part) else system.find(path.rstrip("/")))
    tars = [name for name in sorted(found, key=natural) if is_tar(name) and not is_hidden(name.rpartition("/")[2])]
    return [system.unstrip_protocol(name) for name in tars]


def _size(url: str) -> int:
    if not is_remote(url):
        with open_regular(Path(url)) as file:
            return os.fstat(file.fileno()).st_size
    system, path = file_system(url)
    return system.info(path)["size"]


def _open(url: str):
    if not is_remote(url):
        return open_regular(Path(url))
    system, path = file_system(url)
    return system.open(path, "rb")


def _names(urls: Sequence[str]) -> tuple[str, ...]:
    """Paths of the tar files relative to their common folder, so that names do not depend on where it is."""
    folders = [url.split("/")[:-1] for url in urls]
    common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    return tuple("/".join(url.split("/")[common:]) for url in urls)


def _stems(names: Sequence[str]) -> tuple[str, ...]:
    """What keys begin with: names without their ending, or as they are where a sample's key could belong to two."""
    stems = [name[: -len(".tar")] if name.lower().endswith(".tar") else name for name in names]
    inside = {"/".join(stem.split("/")[:depth]) for stem in stems for depth in range(1, stem.count("/") + 1)}
    if len(set(map(name_text, stems))) == len(names) and inside.isdisjoint(stems):
        return tuple(stems)
    if len(set(map(name_text, names))) < len(names):
        raise InputError(
            f"webdataset {name_text(names[0])}: two of its tar files have the same name, as text: rename one"
        )
    return tuple(names)
