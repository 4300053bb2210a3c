"""Sets of images to be scored, read from folders, .npz and .npy files: other people's samples included.

Numbers depend on every pixel, so nothing is mended, skipped or resized without being asked: `RULES` says what is done
with each kind of file, and whatever it does not cover is an error that names the file.
"""

import contextlib
import functools
import hashlib
import math
import os
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from lpl_jax.data import decoding
from lpl_jax.data.images import IMAGE_SUFFIXES, LONG, Crop
from lpl_jax.data.listing import SIDE_SUFFIXES, list_files
from lpl_jax.errors import InputError, some
from lpl_jax.io.copies import local_copy
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.npy import read_header
from lpl_jax.io.paths import AnyPath, PathLike, read_bounded, to_path

RULES = (
    f"{decoding.RULES}; all images of one size unless a resolution is asked for (then the shorter side is resized to "
    "it, Lanczos antialiased, and the centre cropped); folders in natural order of names, subfolders included, hidden "
    "files and texts ignored, other files refused; arrays: uint8 (N, H, W, 3), in .npz files under the name arr_0"
)
WORKERS = min(8, os.cpu_count() or 1)
BLOCK = 2**22  # bytes hashed at a time

Fit = Callable[[Image.Image, str], np.ndarray]  # an RGB image and its name -> uint8 (H, W, 3)


def open_images(
    path: PathLike, *, resolution: int | None = None, minimum: int = 1, limits: ImageLimits = DEFAULT
) -> "ImageSet":
    """The images of a folder (PNG, JPEG, WebP), of an .npz (`arr_0`, as ADM's sample batches) or of an .npy file.

    What happens to each kind of image is said in `RULES`. The list of files, or the array's header, and the first image
    are read here; all others when they are asked for. Damage is noticed wherever the format allows it: files cut short
    always, changed bytes in PNG and .npz, which have checksums, but not in JPEG, WebP and .npy, which have none.

    Args:
      path: of the folder or file, which may be remote (gs://, s3://); a file is then copied to this machine.
      resolution: resize the shorter side of every image to it and cut the centre square; None leaves images as they
        are, and they must be of one size.
      minimum: number of images that are needed.
      limits: the largest image that is read.

    Raises:
      InputError: nothing there, another kind of file, a file in the folder that is no image, fewer than `minimum`
        images, or a first image that cannot be used; it names the file. On access: the same for the other images.
    """
    path = to_path(path, "a set of images", remote=True)
    if path.is_dir():
        reader = _Folder(path, limits)
    elif path.suffix.lower() in (".npz", ".npy") and path.is_file():
        reader = _Array(path, limits)
    else:
        found = "is not one" if path.exists() else "does not exist"
        raise InputError(f"image set {_shown(path)} {found}: possible: a folder of images, an .npz or an .npy file")
    if len(reader.names) < max(minimum, 1):
        raise InputError(f"image set {_shown(path)} has {len(reader.names)} images: needed: at least {max(minimum, 1)}")
    return ImageSet(reader, resolution)


class ImageSet:
    """Images uint8 (N, H, W, 3) of one size, read when they are asked for; made by `open_images`.

    `images[start:stop]` is an array (stop - start, H, W, 3); `len(images)` is N. Reading an image always gives the same
    pixels, in any order and batch size.

    Attributes:
      names: N names, unique: paths relative to the folder with "/" between, or numbers in an array.
      shape: (H, W).
      description: for people: where, how many, how large.
    """

    def __init__(self, reader: "_Folder | _Array", resolution: int | None):
        self._reader, self._crop = reader, None if resolution is None else Crop(resolution)
        self.names: Sequence[str] = reader.names
        first = next(reader.images(0, 1, self._fit, 1))
        self.shape: tuple[int, int] = first.shape[:2]
        resized = "" if resolution is None else ", shorter side resized to it (Lanczos) and centre cropped"
        height, width = self.shape
        self.description = f"{_shown(reader.path)}: {len(self)} images of {width}x{height} pixels{resized}"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> np.ndarray:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"an image set is indexed by [start:stop], not by {rows!r}")
        start, stop, _ = rows.indices(len(self))
        images = list(self._images(start, stop, 2 * WORKERS))
        return np.stack(images) if images else np.zeros((0, *self.shape, 3), np.uint8)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images `start` to `stop` in their order, uint8 (B, H, W, 3); the last batch may be smaller.

        Files are read and decoded by a few threads, up to two batches ahead.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be at least 1")
        start, stop, _ = slice(start, stop).indices(len(self))
        images = self._images(start, stop, 2 * batch_size)
        for first in range(start, stop, batch_size):
            yield np.stack([next(images) for _ in range(min(batch_size, stop - first))])

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all names, the bytes of all files (or of the array), and the resolution.

        It reads everything once. Equal pixels in other files, or under other names, have another one.
        """
        resolution = None if self._crop is None else self._crop.resolution
        digest = hashlib.sha256(f"resolution={resolution}".encode() + b"\0")
        for part in self._reader.digests():
            digest.update(part)
        return digest.hexdigest()

    def _images(self, start: int, stop: int, ahead: int) -> Iterator[np.ndarray]:
        for index, image in enumerate(self._reader.images(start, stop, self._fit, ahead), start):
            if image.shape[:2] != self.shape:
                (height, width), (first_height, first_width) = image.shape[:2], self.shape
                raise InputError(
                    f"{self._reader.shown(index)}: {width}x{height} pixels, but {self._reader.shown(0)} has "
                    f"{first_width}x{first_height}: give a resolution to resize and crop all to"
                )
            yield image

    def _fit(self, image: Image.Image, name: str) -> np.ndarray:
        if self._crop is not None:
            return self._crop(image, 0, name)
        if image.width * image.height > decoding.LARGE or max(image.size) > LONG * min(image.size):
            raise InputError(f"{name}: {image.width}x{image.height} pixels: give a resolution to resize and crop to")
        return np.asarray(image)


class _Folder:
    """Files of a folder and its subfolders, in natural order."""

    def __init__(self, path: AnyPath, limits: ImageLimits):
        self.path, self._limits = path, limits
        self.names = _image_names(path)

    def shown(self, index: int) -> str:
        return _shown(self.path / self.names[index])

    def images(self, start: int, stop: int, fit: Fit, ahead: int) -> Iterator[np.ndarray]:
        def pixels(index):
            name = self.shown(index)
            return decoding.decode(self._read(index), name, lambda image: fit(image, name), self._limits)

        return _ahead(pixels, range(start, stop), ahead)

    def digests(self) -> Iterator[bytes]:
        def digest(index):
            name = self.names[index].encode("utf-8", "surrogateescape")
            return name + b"\0" + hashlib.sha256(self._read(index)).digest()

        return _ahead(digest, range(len(self.names)), 4 * WORKERS)

    def _read(self, index: int) -> bytes:
        try:
            return read_bounded(self.path / self.names[index], self._limits.bytes)
        except OSError as error:
            raise InputError(f"{self.shown(index)} cannot be read: {error.strerror}") from None


class _Array:
    """Rows of an .npy file or of an .npz's `arr_0`; the array is never in memory as a whole.

    The file stays open where it was read last, because a compressed .npz can only be read forwards: reading it part by
    part costs as much as reading it once, and only steps back start again.
    """

    def __init__(self, path: AnyPath, limits: ImageLimits):
        self.path, self._lock = path, threading.Lock()
        with _damage(path):
            self._local = local_copy(path)
            self._stream, size = _open_array(self._local)
            shape = _array_shape(self._stream, _shown(path), limits)
            self._row, self._first = shape[1:], self._stream.tell()
            self._end = self._first + math.prod(shape)
            if size != self._end:
                raise ValueError(f"{size} bytes where its header says {self._end}")
        self.names = _Numbers(shape[0])

    def shown(self, index: int) -> str:
        return f"{_shown(self.path)}, image {index}"

    def images(self, start: int, stop: int, fit: Fit, ahead: int) -> Iterator[np.ndarray]:
        size = math.prod(self._row)
        for index in range(start, stop):
            row = np.frombuffer(self._read(self._first + index * size, size), np.uint8).reshape(self._row)
            yield fit(Image.fromarray(row), self.shown(index))

    def digests(self) -> Iterator[bytes]:
        yield repr((len(self.names), *self._row)).encode()
        self._read(0, self._first)
        for place in range(self._first, self._end, BLOCK):
            yield self._read(place, min(BLOCK, self._end - place))

    def _read(self, place: int, size: int) -> bytes:
        with self._lock, _damage(self.path):
            if place < self._stream.tell():
                self._stream.close()
                self._stream = _open_array(self._local)[0]
                self._stream.read(min(place, self._first))  # zipfile gives up the checksum where it has to seek
            if place > self._stream.tell():
                self._stream.seek(place)
            content = self._stream.read(size)
            if len(content) < size:
                raise ValueError("it is cut short")
            return content


class _Numbers(Sequence[str]):
    """The names of the rows of an array, "0", "1" and so on, however many its header says that there are."""

    def __init__(self, count: int):
        self._rows = range(count)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        found = self._rows[index]
        return list(map(str, found)) if isinstance(index, slice) else str(found)


def _open_array(path: Path) -> tuple[IO[bytes], int]:
    """The .npy stream of a file and its length."""
    if path.suffix.lower() == ".npy":
        return path.open("rb"), path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names:
            reason = " (statistics, no images)" if {"mu", "sigma"} <= set(names) else ""
            raise InputError(f"{_shown(path)} has the arrays {some(names)}{reason}: needed: arr_0")
        return archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size  # open until it is closed itself


def _array_shape(stream: IO[bytes], name: str, limits: ImageLimits) -> tuple[int, ...]:
    """(N, H, W, 3) from an .npy header; leaves the stream after it. Nothing is unpickled."""
    shape, fortran_order, dtype = read_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or min(shape[1:]) < 1:
        raise InputError(f"{name} is an array {shape}, {dtype}: needed: (N, H, W, 3), uint8")
    if max(shape[1:]) > decoding.MAX_SIDE or shape[1] * shape[2] > limits.pixels:
        raise InputError(f"{name} is an array {shape}: possible: images of up to {limits.pixels:,} pixels (max_pixels)")
    if fortran_order:
        raise InputError(f"{name} is in Fortran order: needed: C order (np.ascontiguousarray)")
    return shape


@contextlib.contextmanager
def _damage(path: AnyPath) -> Iterator[None]:
    """What reading a damaged array file raises, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{_shown(path)} cannot be read as an array of images: {error}") from None


def _image_names(folder: AnyPath) -> list[str]:
    """Paths of the images below a folder, relative to it, in natural order; refuses what is no image and read twice."""
    files = list_files(folder)
    if others := dict.fromkeys(files.tars, "a tar file") | files.others:
        name, reason = next(iter(others.items()))
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise InputError(
            f"{_shown(folder / name)}{more} is no image ({reason}): possible: {', '.join(IMAGE_SUFFIXES)}; "
            f"ignored: hidden files, {', '.join(SIDE_SUFFIXES)}"
        )
    if links := [*files.loops, *files.again]:
        raise InputError(f"{_shown(folder / links[0])} is a symbolic link to a folder that is read already")
    return files.images


def _ahead(function: Callable[[int], Any], items: Iterable[int], count: int) -> Iterator[Any]:
    """function(item) in the order of the items, computed by threads, at most `count` results before they are taken."""
    pending = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # where the caller stops early
            for future in pending:
                future.cancel()


def _shown(path: PathLike) -> str:
    """A path in a message of one line, whatever characters or bytes it has."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
