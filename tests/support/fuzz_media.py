"""What people bring, for fuzzing: images of each format, tar files, and json beside images.

`READERS`: name -> (function() -> valid files, function(bytes) that reads one, or refuses it with an InputError).
"""

import bz2
import contextlib
import gzip
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import image_kinds
from image_kinds import encoded, smooth

from lpl_jax.data import containers
from lpl_jax.data.captions import read_captions
from lpl_jax.data.decoding import read_rgb
from lpl_jax.data.tar_files import seekable
from lpl_jax.data.tars import read_tar
from lpl_jax.errors import InputError
from lpl_jax.io.image_limits import ImageLimits

LIMITS = ImageLimits(pixels=2**22, bytes=2**24)
MOST_OF_SMALL = 2**16  # bytes of a seed: fuzzers change them as a whole


def images(kind: str) -> list[bytes]:
    """Every kind of image in a format, and what is damaged of it."""
    found = [content for content, *_ in (*image_kinds.kinds().values(), *image_kinds.damaged().values())]
    found = [*found, *image_kinds.bombs().values()]
    return [content for content in found if len(content) < MOST_OF_SMALL and _is(content, kind)]


def _is(content: bytes, kind: str) -> bool:
    try:
        return containers.kind_of(content, "") == kind
    except InputError:
        return False


def read_image(content: bytes) -> Any:
    """An image is an RGB image within the limits; its name begins what is said of another."""
    try:
        image = read_rgb(content, "a file", LIMITS)
    except InputError as error:
        assert str(error).startswith("a file: "), error
        raise
    assert image.mode == "RGB" and 0 < image.width * image.height <= LIMITS.pixels
    return image


def read_png(content: bytes) -> Any:
    """As `read_image`, with right checksums, which few changes of a file would leave."""
    repaired, place = [content[:8]], 8
    while place + 12 <= len(content):
        length = min(int.from_bytes(content[place : place + 4], "big"), len(content) - place - 12)
        inside = content[place + 4 : place + 8 + length]
        repaired.append(struct.pack(">I", length) + inside + struct.pack(">I", zlib.crc32(inside)))
        place += 12 + length
    return read_image(b"".join(repaired))


def tars() -> list[bytes]:
    """Tar files of every layout, with links, holes and long names."""
    members = [("a.jpg", encoded(smooth(), "JPEG")), ("a.txt", b"a cat"), ("a.json", b'{"caption": "a cat"}')]
    members += [("b/c.0.png", encoded(smooth(1))), ("b/c.0.cls", b"1")]
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w", format=form) as opened:
            for name, content in members:
                _add(opened, name, content)
            if form != tarfile.USTAR_FORMAT:
                _add(opened, "d" * 120 + ".png", b"no image")
            for kind, target in ((tarfile.LNKTYPE, "a.jpg"), (tarfile.SYMTYPE, "a.jpg"), (tarfile.FIFOTYPE, "")):
                _add(opened, f"{int(kind)}.jpg", b"", type=kind, linkname=target)
            if form == tarfile.PAX_FORMAT:
                holes = {"GNU.sparse.size": "99", "GNU.sparse.map": "0,5,90,3", "GNU.sparse.name": "e.png"}
                _add(opened, "e.png", b"abcdefgh", pax_headers=holes)
        found.append(written.getvalue())
    return [*found, found[0] + found[1]]


def _add(opened: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    opened.addfile(info, io.BytesIO(content))


def read_samples(content: bytes) -> list[Any]:
    """Damage is a TarError behind the samples before it; a member that cannot be read is an InputError of its own."""
    found = []
    for whole in (True, False):
        try:
            for sample in read_tar(seekable(io.BytesIO(content), local=whole), whole=whole):
                found.append(sample)
                for member in () if isinstance(sample, str) else sample.parts.values():
                    _read(member)
        except (tarfile.TarError, InputError) as error:
            assert len(str(error)) < 1000, error
    return found


def _read(member: Any) -> None:
    with contextlib.suppress(InputError):
        assert len(member.read(2**20)) <= 2**20


def _packed(compress: Callable[[bytes], bytes]) -> Callable[[], list[bytes]]:
    return lambda: [compress(content) for content in tars()[:2]]


READERS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes], Any]]] = {
    **{kind.lower(): (lambda kind=kind: images(kind), read_image) for kind in containers.FORMATS},
    "png-checksums": (lambda: images("PNG"), read_png),
    "tar": (tars, read_samples),
    "tar.gz": (_packed(gzip.compress), read_samples),
    "tar.bz2": (_packed(bz2.compress), read_samples),
    "tar.xz": (_packed(lzma.compress), read_samples),
    "captions": (
        lambda: [b'{"caption": ["a cat", {"b": 1}]}', b'{"caption": "a \\u00e9"}'],
        lambda data: read_captions(("caption.0",), {"json": data}.get, "a file"),
    ),
}
