"""The one reader of image files: prepare, evaluation and references see the same pixels of the same bytes.

`RULES` says what is done with each kind of image. What they do not cover is an InputError that names the file: nothing
is guessed and nothing is mended. An image in 8-bit RGB comes out as it is stored.
"""

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lpl_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_BYTES = 2**28  # of an image file
MAX_PIXELS = 89_478_485  # of an image: 256 MiB in 24 bits, Pillow's own default
MAX_SIDE = 2**16 - 1  # of an image, as in JPEG; offsets in an enlarged image stay below 2**31
LARGE = 2**24  # pixels: larger ones are decoded one at a time
RULES = (
    "JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF by content, whatever the name; RGB as stored; EXIF rotation applied; "
    "transparency composited on white; grey-scale, palette, CMYK, YCbCr and Lab images converted to RGB; colour "
    "profiles not applied; 16 bits per channel cut to the upper 8; of several pictures the first; refused: floating "
    f"point, 32-bit integers, damaged files, more than {MAX_BYTES // 2**20} MiB, {MAX_PIXELS:,} pixels or "
    f"{MAX_SIDE:,} pixels on a side"
)
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")  # what pixels depend on
PNG_EXIF = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts in which PNGs keep a rotation, too
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF
Used = TypeVar("Used")
_large = ThreadPoolExecutor(1)


def read_rgb(content: bytes, name: str) -> Image.Image:
    """The RGB image in the bytes of a file, by `RULES`.

    Raises:
      InputError: what the rules refuse; it begins with `name`.
    """
    return decode(content, name, lambda image: image)


def decode(content: bytes, name: str, use: Callable[[Image.Image], Used]) -> Used:
    """`use` of the RGB image in the bytes of a file; raises as `read_rgb`.

    Large images are decoded and used one at a time, whatever the number of threads that call this.
    """
    with _damage(name):
        image = _open(content, name)
    if image.width * image.height <= LARGE:
        return _decode(image, name, use)
    # One thread, and not a lock: each thread's allocator would keep the memory of its last image. It opens the file
    # itself, so that nobody else holds on to the image.
    del image
    return _large.submit(lambda: _decode(_open(content, name), name, use)).result()


def _decode(image: Image.Image, name: str, use: Callable[[Image.Image], Used]) -> Used:
    with _damage(name):
        image = _to_rgb(image, name)
    return use(image)


def _open(content: bytes, name: str) -> Image.Image:
    """The image of a file, not yet decoded: its size is known, and within bounds."""
    if len(content) > MAX_BYTES:
        raise InputError(f"{name}: more than {MAX_BYTES:,} bytes, which no image may have")
    image = Image.open(io.BytesIO(_png(content, name)), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise InputError(
            f"{name}: {image.width}x{image.height} pixels: possible: {MAX_PIXELS:,} pixels, {MAX_SIDE:,} on a side"
        )
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    _rotate(image)
    if image.mode.startswith("I;16"):
        image = _upper_bits(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point"
        raise InputError(f"{name}: {kind}, whose range nothing says: needed: 8 or 16 bits per channel")
    if image.has_transparency_data:
        return _on_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    if image.mode == "LAB":
        return _from_lab(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """What Pillow raises, as an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image that can be read as {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name}: its size in pixels is no image's: possible: {MAX_PIXELS:,}") from None
    except Exception as error:  # whatever the decoders of seven formats raise for damaged files
        raise InputError(f"{name}: image cannot be read ({error or type(error).__name__})") from None


def _png(content: bytes, name: str) -> bytes:
    """A PNG without the chunks that pixels do not depend on; files of other formats as they are.

    Pillow refuses long texts, inflates profiles, and passes over wrong checksums and a missing end.
    """
    if not content.startswith(PNG_START):
        return content
    view, place, kind = memoryview(content), len(PNG_START), b""
    kept: list[bytes | memoryview] = [PNG_START]
    while kind != b"IEND":
        length = int.from_bytes(view[place : place + 4], "big")
        chunk, kind = view[place : place + 12 + length], bytes(view[place + 4 : place + 8])
        if len(chunk) < 12 + length:
            raise InputError(f"{name}: image cannot be read (the end of the file is missing)")
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise InputError(f"{name}: image cannot be read (wrong checksum of the part {kind!r} at byte {place})")
        if kind == b"tRNS" and content[24:26] == b"\x10\x02":  # bits per channel, RGB
            raise InputError(f"{name}: a transparent colour of 16 bits per channel, which 8 cannot tell from its like")
        if kind in PNG_CHUNKS or bytes(chunk[8:40]).startswith(PNG_EXIF):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def _rotate(image: Image.Image) -> None:
    """Applies the rotation that EXIF tells, in place; EXIF that cannot be read tells none."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey-scale -> 8 bits, as Pillow does it in colour; a grey that is transparent becomes an alpha channel."""
    levels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # 12 where a scanner has no more
    grey = (levels >> (bits - 8)).astype(np.uint8)
    grey = Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    """An RGBA image over white, rounded."""
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image)
