"""The one reader of image files: prepare, evaluation and references see the same pixels of the same bytes.

`RULES` says what is done with each kind of image. What they do not cover is an InputError that names the file: nothing
is guessed and nothing is mended. An image in 8-bit RGB comes out as it is stored.
"""

import contextlib
import ctypes
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from lpl_jax.data import containers
from lpl_jax.errors import InputError
from lpl_jax.io.image_limits import DEFAULT, ImageLimits

MAX_SIDE = 2**16 - 1  # of an image, as in JPEG; offsets in an enlarged image stay below 2**31
LARGE = 2**24  # pixels: larger ones are decoded one at a time
RULES = (
    "JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF by content, whatever the name; RGB as stored; EXIF rotation applied; "
    "transparency composited on white; grey-scale, palette, CMYK, YCbCr and Lab images converted to RGB; colour "
    "profiles not applied; 16 bits per channel cut to the upper 8; of several pictures the first; refused: floating "
    f"point, 32-bit integers, damaged files, more than {DEFAULT.bytes // 2**20} MiB, {DEFAULT.pixels:,} pixels or "
    f"{MAX_SIDE:,} pixels on a side"
)
# The classes themselves, not Image.open: that asks other formats, and makes an MPO of some JPEGs.
_OPENERS: dict[str, Callable[[Any], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP_TURN = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
Used = TypeVar("Used")
_large = ThreadPoolExecutor(1)


def _say_nothing() -> None:
    """What decoders print of damage is in our message already; sizes are checked here.

    Warnings and logs of Pillow are off, and so is what libtiff writes to stderr by itself, where it can be reached.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # found among what Pillow's library is linked with


_say_nothing()


def read_rgb(content: bytes, name: str, limits: ImageLimits = DEFAULT) -> Image.Image:
    """The RGB image in the bytes of a file, by `RULES`.

    limits: in place of the numbers of pixels and bytes in the rules.

    Raises:
      InputError: what the rules refuse; it begins with `name`.
    """
    return decode(content, name, lambda image: image, limits)


def decode(content: bytes, name: str, use: Callable[[Image.Image], Used], limits: ImageLimits = DEFAULT) -> Used:
    """`use` of the RGB image in the bytes of a file; raises as `read_rgb`, whatever a decoder raises.

    Large images are decoded and used one at a time, whatever the number of threads that call this.
    """
    with damage(name):
        image = _open(content, name, limits)
        if image.width * image.height <= LARGE:
            return use(_to_rgb(image, name))
        # One thread, and not a lock: each thread's allocator would keep the memory of its last image. It opens the file
        # itself, so that nobody else holds on to the image.
        del image
        return _large.submit(lambda: use(_to_rgb(_open(content, name, limits), name))).result()


def _open(content: bytes, name: str, limits: ImageLimits) -> Image.Image:
    """The image of a file, not yet decoded: its size is known, and within bounds."""
    if len(content) > limits.bytes:
        raise InputError(f"{name}: more than {limits.bytes:,} bytes (max_bytes)")
    kind = containers.kind_of(content, name)
    image = _OPENERS[kind](io.BytesIO(containers.first_picture(content, kind, name)))
    if image.width * image.height > limits.pixels or max(image.size) > MAX_SIDE:
        raise InputError(
            f"{name}: {image.width}x{image.height} pixels: possible: {limits.pixels:,} pixels (max_pixels), "
            f"{MAX_SIDE:,} on a side"
        )
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    image = _rotated(image)
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
def damage(name: str) -> Iterator[None]:
    """What a decoder raises, of whatever type, as an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of seven formats, and also out of memory and RecursionError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: image cannot be read ({reason})") from None


def _rotated(image: Image.Image) -> Image.Image:
    """Upright, by its EXIF; EXIF that cannot be read tells no rotation. A TIFF has been turned when it was loaded."""
    turn = TURNS.get(_orientation(image.info) or 1) if image.format != "TIFF" else None
    return image if turn is None else image.transpose(turn)


def _orientation(info: dict[Any, Any]) -> int | None:
    exif = info.get("exif", b"")
    if not exif and "Raw profile type exif" in info:  # hexadecimal, below three lines
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(str(info["Raw profile type exif"]).split("\n")[3:]))
    turned = containers.orientation(exif)
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    if turned is None and (found := _XMP_TURN.search(xmp.encode(errors="replace") if isinstance(xmp, str) else xmp)):
        turned = int(found[1])
    return turned


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
