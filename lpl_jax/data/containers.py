"""What of an image file its decoder gets: the first picture, without anything that its pixels do not depend on.

Decoders trust what a file says of itself: texts, profiles and directories of EXIF are inflated or copied as often as
they are named, and a picture may have any number of scans, tiles and frames. What is left out here cannot do that.
`kind_of` is the list of formats: content decides, whatever the name, and no other decoder is ever asked.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from lpl_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_MARKS = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), "TIFF"),
    (re.compile(rb".{4}ftyp(?:.{4}){0,14}?(?:avif|avis)", re.DOTALL), "AVIF"),
)
# Others, for messages: what people call .png, and what would start other programs.
_OTHERS = (
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "an EPS"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"8BPS"), "a PSD"),
    (re.compile(rb"icns"), "an ICNS"),
    (re.compile(rb"\x00\x00\x01\x00[^\x00]"), "an ICO"),
    (re.compile(rb"P[1-7]\s"), "a PNM"),
    (re.compile(rb".{4}ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "a HEIC"),
    (re.compile(rb".{4}ftyp", re.DOTALL), "an MP4"),
    (re.compile(rb"\x00\x00\x00\x0cjP {2}|\xff\x4f\xff\x51"), "a JPEG 2000"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "a JPEG XL"),
    (re.compile(rb"v/1\x01"), "an OpenEXR"),
    (re.compile(rb"#\?RADIANCE|#\?RGBE"), "a Radiance HDR"),
    (re.compile(rb"DDS "), "a DDS"),
    (re.compile(rb"qoif"), "a QOI"),
    (re.compile(rb"SIMPLE {2}="), "a FITS"),
    (re.compile(rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", re.DOTALL), "a Windows metafile"),
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg|<svg)", re.DOTALL | re.I), "an SVG"),
    (re.compile(rb"\s*<(?:!doctype html|html)", re.I), "an HTML"),
    (re.compile(rb"PK\x03\x04"), "a ZIP"),
    (re.compile(rb"\x1f\x8b"), "a gzip"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer"),
)
HEAD = 256  # bytes that tell what a file is

MOST_SCANS = 100  # of a JPEG: each is a pass over all its pixels
MOST_BLOCKS = 2**16  # of a GIF before its picture, and segments of a JPEG
MOST_CHUNKS = 2**17  # of a PNG: 256 MiB in parts of 2 KiB
MOST_VALUES = 2**18  # of a tag of a TIFF: 65,535 strips of three planes are below it
MOST_TAGS = 2**16
TILE = 2**22  # pixels of a TIFF's tile, where the picture itself has fewer
XMP_BYTES = 2**20
# Tags of TIFFs that pixels depend on. 700 may have the rotation, as XMP.
TIFF_TAGS = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332}
TIFF_TAGS |= {338, 339, 347, 529, 530, 531, 532, 700, 50674, *range(512, 522)}
WIDTH, HEIGHT, XMP, TILE_WIDTH, TILE_HEIGHT, ORIENTATION = 256, 257, 700, 322, 323, 274
# Bytes of a value, by its type.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SHORT, _LONG, _LONG8 = 3, 4, 16
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
PNG_EXIF = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts in which PNGs keep a rotation, too
# Segments of JPEGs: what applications have to say, but for JFIF's and Adobe's, and comments.
JPEG_ABOUT = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
_GIF_BLOCK = re.compile(rb"[!,;]")
# In a list of items: version, flags, number and protection of one, and its type.
_AVIF_EXIF = re.compile(rb"(infe[\x02\x03].{3}(?:.{4}|.{6}))Exif", re.DOTALL)


def kind_of(content: bytes, name: str) -> str:
    """Which of `FORMATS` a file is.

    Raises:
      InputError: none of them; it says what the file is instead, where that is known.
    """
    head = content[:HEAD]
    if kind := next((kind for mark, kind in _MARKS if mark.match(head)), None):
        return kind
    if other := next((other for mark, other in _OTHERS if mark.match(head)), None):
        raise InputError(f"{name}: {other} file, which is not read; possible: {', '.join(FORMATS)}")
    raise InputError(f"{name}: not an image that can be read as {', '.join(FORMATS)}")


def first_picture(content: bytes, kind: str, name: str) -> bytes:
    """The file as its decoder gets it, see above; of a format without a container it is the file itself.

    Raises:
      InputError: a damaged container, or one with more parts than a picture has.
    """
    return _READERS[kind](content, name) if kind in _READERS else content


def orientation(exif: bytes) -> int | None:
    """The rotation in the bytes of EXIF, 1 to 8; None where they tell none. Nothing else of them is looked at."""
    content = exif
    while content.startswith(_EXIF):
        content = content[len(_EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        return None
    try:
        _, entries = _directory(content, order, big=False)
        found = [_number(order, entry) for entry in entries if entry[0] == ORIENTATION]
    except struct.error:
        return None
    return found[-1] if found and found[-1] in range(1, 9) else None


def _png(content: bytes, name: str) -> bytes:
    """Without texts, profiles and further pictures. Pillow passes over wrong checksums and a missing end; we do not."""
    view, place, kind = memoryview(content), 8, b""
    kept: list[bytes | memoryview] = [view[:8]]
    for _ in range(MOST_CHUNKS):
        if kind == b"IEND":
            return b"".join(kept)
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
    raise InputError(f"{name}: image cannot be read (a PNG of more than {MOST_CHUNKS:,} parts)")


def _jpeg(content: bytes, name: str) -> bytes:
    """Without comments, profiles and thumbnails, and with the rotation alone of EXIF."""
    kept, place, seen = [content[:2]], 2, set()
    for number, (kind, end) in enumerate(_jpeg_segments(content)):
        if number == MOST_BLOCKS:
            raise InputError(f"{name}: image cannot be read (a JPEG of more than {MOST_BLOCKS:,} segments)")
        segment, place = content[place:end].lstrip(b"\xff"), end
        about = next((mark for mark in (_EXIF, _XMP) if kind == 0xE1 and segment[3:].startswith(mark)), None)
        if about == _EXIF and about not in seen:
            kept.append(_exif_segment(orientation(segment[3:])))
        elif (about == _XMP and about not in seen) or kind not in JPEG_ABOUT:
            kept.append(b"\xff" + segment)
        seen.add(about)
    if content.count(b"\xff\xda", place) > MOST_SCANS and _scans(content, place) > MOST_SCANS:
        raise InputError(f"{name}: a JPEG of more than {MOST_SCANS} scans, each of which is a pass over all pixels")
    return b"".join([*kept, memoryview(content)[place:]])


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Kind and end of each segment before the picture. What is no segment is the decoder's to refuse."""
    place = 2
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        kind, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if kind == 0xFF:  # fills
            place += 1
            continue
        if kind in (0x00, 0x01, 0xDA) or 0xD0 <= kind <= 0xD9 or length < 2:
            return
        place += 2 + length
        yield kind, place


def _exif_segment(turned: int | None) -> bytes:
    """EXIF of a rotation; nothing of none."""
    if turned is None:
        return b""
    exif = _EXIF + b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION, _SHORT, 1, turned, 0, 0)
    return b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif


def _scans(content: bytes, place: int) -> int:
    """How many scans a JPEG has up to its end; what lies behind it, such as a film, is none of it."""
    count = 0
    while found := _JPEG_MARKER.search(content, place):
        kind, end = content[found.end() - 1], found.end()
        if kind == 0xD9:
            break
        count += kind == 0xDA
        place = end + max(2, int.from_bytes(content[end : end + 2], "big"))
    return count


def _gif(content: bytes, name: str) -> bytes:
    """Up to the end of the first picture, without comments."""
    place = 13 + _gif_table(content[10:11])
    head, control = content[:place], b""
    for _ in range(MOST_BLOCKS):
        if not (found := _GIF_BLOCK.search(content, place)) or found[0] == b";":
            raise InputError(f"{name}: image cannot be read (a GIF without a picture)")
        place = found.start()
        if found[0] == b",":
            end = _gif_end(content, place + 11 + _gif_table(content[place + 9 : place + 10]))
            whole = end <= len(content)
            return head + control + content[place:end] + (b";" if whole else b"")
        end = _gif_end(content, place + 2)
        if content[place + 1 : place + 2] == b"\xf9":  # transparency
            control = content[place:end]
        place = end
    raise InputError(f"{name}: a GIF of more than {MOST_BLOCKS:,} blocks before its picture")


def _gif_table(flags: bytes) -> int:
    """Bytes of the table of colours that follows."""
    return 6 << (flags[0] & 7) if flags and flags[0] & 128 else 0


def _gif_end(content: bytes, place: int) -> int:
    """Where a list of blocks of data ends; beyond the file where its end is missing."""
    size = len(content)
    while place < size and (length := content[place]):
        place += length + 1
    return place + 1


def _tiff(content: bytes, name: str) -> bytes:
    """With one directory, of the tags that pixels depend on: libraries read whatever is listed, and as often."""
    order, big = "<" if content[:2] == b"II" else ">", b"+" in content[2:4]
    try:
        start, entries = _directory(content, order, big=big)
    except struct.error:
        raise InputError(f"{name}: image cannot be read (the end of the file is missing)") from None
    kept: dict[int, tuple] = {}
    for entry in entries:
        tag, kind, count, _ = entry
        if tag not in TIFF_TAGS or tag in kept or (tag == XMP and count > XMP_BYTES):
            continue
        if count * _SIZES.get(kind, 1) > len(content) or (count > MOST_VALUES and tag != XMP):
            raise InputError(f"{name}: image cannot be read (tag {tag} of a TIFF with {count:,} values)")
        kept[tag] = entry
    sides = {tag: _number(order, kept[tag]) for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT) if tag in kept}
    picture, tile = (sides.get(x, 0) * sides.get(y, 0) for x, y in ((WIDTH, HEIGHT), (TILE_WIDTH, TILE_HEIGHT)))
    if tile > max(TILE, picture):
        raise InputError(f"{name}: image cannot be read (a TIFF of {picture:,} pixels with tiles of {tile:,})")
    changed = bytearray(content)
    counted, listed = (f"{order}Q", f"{order}HHQ8s") if big else (f"{order}H", f"{order}HHI4s")
    written = struct.pack(counted, len(kept)) + b"".join(struct.pack(listed, *kept[tag]) for tag in sorted(kept))
    written += bytes(8 if big else 4)  # no further directory
    changed[start : start + len(written)] = written
    return bytes(changed)


def _directory(content: bytes, order: str, *, big: bool) -> tuple[int, Iterator[tuple]]:
    """Where the first directory of a TIFF begins, and its entries: (tag, type, count, bytes of the value or place).

    Raises struct.error where it is cut short.
    """
    place, counted, listed = (8, "Q", "HHQ8s") if big else (4, "I", "HHI4s")
    (start,) = struct.unpack_from(order + counted, content, place)
    if start > len(content):
        raise struct.error
    counted = "Q" if big else "H"
    (count,) = struct.unpack_from(order + counted, content, start)
    first, size = start + struct.calcsize(counted), struct.calcsize(order + listed)
    if count > MOST_TAGS or first + count * size > len(content):
        raise struct.error
    return start, struct.iter_unpack(order + listed, content[first : first + count * size])


def _number(order: str, entry: tuple) -> int:
    """The value of an entry that is one whole number; 0 of another."""
    _, kind, count, value = entry
    form = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}.get(kind)
    if form is None or count != 1 or struct.calcsize(form) > len(value):
        return 0
    return struct.unpack_from(order + form, value)[0]


def _avif(content: bytes, name: str) -> bytes:
    """Without EXIF, whose rotation does not count there: the decoder's own does."""
    return _AVIF_EXIF.sub(rb"\1none", content)


_READERS: dict[str, Callable[[bytes, str], bytes]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "GIF": _gif,
    "TIFF": _tiff,
    "AVIF": _avif,
}
