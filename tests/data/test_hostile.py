"""One bad item is one skip, whatever it is and whatever its decoder raises, in every source; and it takes no memory."""

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import random
import socket
import struct
import tarfile
import threading
import types
import warnings
import zlib

import fuzz_media
import fuzz_targets
import image_kinds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_kinds import HEIGHT, WIDTH, chunk, encoded, png, smooth
from peak_memory import peak_growth
from PIL import Image, TiffImagePlugin

from lpl_jax.data import FolderSource, WebDatasetSource, containers, decoding, open_source, tfds
from lpl_jax.data.examples import Example, Skipped, work_units
from lpl_jax.data.reading import load_units
from lpl_jax.data.tar_files import seekable
from lpl_jax.data.tars import read_tar
from lpl_jax.errors import InputError
from lpl_jax.evaluation.image_sets import open_images
from lpl_jax.experiment.data import DataConfig
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.tools import evaluate, prepare

GOOD = encoded(smooth())
ENOUGH = 2**26  # bytes that nothing small may need more than
OTHERS = {  # what people, and programs, call .png -> what is said of it
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "an EPS file, which is not read"),
    "pdf": (b"%PDF-1.7\n", "a PDF file, which is not read"),
    "psd": (b"8BPS\0\1" + bytes(40), "a PSD file, which is not read"),
    "icns": (b"icns" + bytes(40), "an ICNS file, which is not read"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC file, which is not read"),
    "jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 file, which is not read"),
    "svg": (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG file, which is not read"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer file, which is not read"),
    "fits": (b"SIMPLE  =                    T", "a FITS file, which is not read"),
    "tga": (b"\0\0\2" + bytes(40), "not an image that can be read"),
}


def changed(content, seed):
    """A file with a few bytes changed behind its mark, and perhaps cut short."""
    rng, found = random.Random(seed), bytearray(content)
    for _ in range(4):
        found[rng.randrange(16, len(found))] = rng.randrange(256)
    return bytes(found[: rng.randrange(len(found) // 2, len(found))])


def bad_images():
    """Name -> bytes that are no image that is read."""
    kinds = image_kinds.kinds()
    found = {name: content for name, (content, _) in (image_kinds.damaged() | OTHERS).items()}
    found |= {f"{name}-bomb": content for name, content in image_kinds.bombs().items()}
    for kind in ("jpeg", "png", "webp", "avif", "tiff-lzw", "bmp"):
        found[f"{kind}-cut"] = kinds[kind][0][:-40]
    return found


def skips_of(source, limit=30):
    """Keys of the images, and key -> reason of what is skipped, as prepare gets them; nothing may hang."""
    found, reasons, failed = [], {}, []

    def read():
        try:
            for _, item in load_units(enumerate(work_units(source, 100)), threads=2, ahead=4):
                if isinstance(item, Example):
                    found.append(item.key.split("/")[-1])
                elif isinstance(item, Skipped):
                    assert item.key not in reasons, f"{item.key} is skipped twice"
                    reasons[item.key.split("/")[-1].removesuffix(".png")] = item.reason
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(limit)
    assert not thread.is_alive(), "reading hangs"
    assert not failed, failed
    return sorted(found), reasons


def tar_of(members):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as opened:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return written.getvalue()


class Examples(list):
    dataset_info = types.SimpleNamespace(features={"image": None, "text": None}, full_name="examples")


def sources(folder, monkeypatch, bad):
    """way -> source of good images "0" and "z", and the bad ones between them."""
    contents = {"0": GOOD, **bad, "z": GOOD}
    for place in ("plain", "named"):
        (folder / place).mkdir()
        for name, content in contents.items():
            (folder / place / f"{name}.png").write_bytes(content)
    rows = [json.dumps({"file_name": f"{name}.png", "text": "a cat"}) for name in contents]
    (folder / "named/metadata.jsonl").write_text("\n".join(rows))
    members = [(f"{name}.{kind}", part) for name, content in contents.items() for kind, part in
               (("png", content), ("txt", b"a cat"))]  # fmt: skip
    (folder / "all.tar").write_bytes(tar_of(members))
    half = len(members) // 4 * 2
    (folder / "two.tar").write_bytes(tar_of(members[:half]) + tar_of(members[half:]))
    (folder / "all.tar.gz").write_bytes(gzip.compress(tar_of(members)))
    import fsspec

    with fsspec.open(f"memory://{folder.name}/all.tar", "wb") as file:
        file.write(tar_of(members))
    examples = Examples({"image": each, "text": b"a cat"} for each in contents.values())
    monkeypatch.setattr(tfds, "_open", lambda *_: examples)
    return {
        "folder": FolderSource(folder / "plain", 8),
        "metadata": FolderSource(folder / "named", 8, captions=("text",)),
        **{name: WebDatasetSource(str(folder / name), 8) for name in ("all.tar", "two.tar", "all.tar.gz")},
        "stream": WebDatasetSource(f"memory://{folder.name}/all.tar", 8),
        "tfds": tfds.TFDSSource("a", 8, captions=("text",)),
    }


def check_skips(found, bad):
    for way, source in found.items():
        images, reasons = skips_of(source)
        assert len(images) == 2, (way, images)
        names = set(map(str, range(1, len(bad) + 1))) if way == "tfds" else set(bad)
        assert set(reasons) == names, way
        for reason in reasons.values():
            assert reason.isprintable() and len(reason) < 600, reason


def test_one_bad_image_is_one_skip_in_every_source(tmp_path, monkeypatch, capfd):
    bad = bad_images()
    growth = peak_growth(lambda: check_skips(sources(tmp_path, monkeypatch, bad), bad))
    assert growth < 2 * ENOUGH
    _, reasons = skips_of(FolderSource(tmp_path / "plain", 8))
    for name, (_, said) in OTHERS.items():
        assert said in reasons[name]
    (tmp_path / "plain/0.png").unlink()
    with pytest.raises(InputError, match=r"plain/.*\.png"):
        open_images(tmp_path / "plain", resolution=8)[:]
    assert capfd.readouterr().err == ""


ERRORS = (MemoryError(), RecursionError("too deep"), SyntaxError("odd"), struct.error("short"), SystemError("tile"),
          zlib.error("bad"), AttributeError("none"), KeyError(5), AssertionError(), OverflowError("long"),
          Image.DecompressionBombError("large"), OSError("broken\ndata stream"), StopIteration())  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_is_a_skip(tmp_path, monkeypatch, error):
    class Opened(TiffImagePlugin.TiffImageFile):
        def load(self):
            raise error

    monkeypatch.setitem(decoding._OPENERS, "TIFF", Opened)
    bad = {"bad": encoded(smooth(), "TIFF")}
    check_skips(sources(tmp_path, monkeypatch, bad), bad)


def test_whatever_a_source_raises_for_an_item_is_a_skip(tmp_path, monkeypatch):
    """Records of TFDS that cannot be parsed; and what nobody has foreseen."""

    class Damaged(Examples):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("data loss: crc mismatch")
            return super().__getitem__(index)

    examples = Damaged([{"image": GOOD, "text": b"a cat"}, {}, {"image": None, "text": b"a cat"}])
    monkeypatch.setattr(tfds, "_open", lambda *_: examples)
    images, reasons = skips_of(tfds.TFDSSource("a", 8, captions=("text",)))
    assert len(images) == 1 and set(reasons) == {"1", "2"} and "crc mismatch" in reasons["1"]
    (tmp_path / "a.png").write_bytes(GOOD)
    monkeypatch.setattr(decoding, "_open", None)
    monkeypatch.setattr(decoding, "damage", lambda name: types.SimpleNamespace(__enter__=0))
    assert set(skips_of(FolderSource(tmp_path, 8))[1]) == {"a"}


def test_what_is_no_file_is_a_skip_and_nothing_hangs(tmp_path):
    """Pipes, sockets, folders and links under the names of images, and odd names."""
    folder, outside = tmp_path / "images", tmp_path / "outside.png"
    folder.mkdir()
    outside.write_bytes(GOOD)
    for name in ("good", "new\nline", "\x1b[31mred", "gone"):
        (folder / f"{name}.png").write_bytes(GOOD)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "good.txt")
    (folder / "nowhere.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "linked.png").symlink_to(outside)
    (folder / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(folder / "socket.png"))
        source = FolderSource(folder, 8)
        (folder / "gone.png").unlink()
        images, reasons = skips_of(source)
    assert images == ["\\x1b[31mred.png", "good.png", "linked.png", "new\\nline.png"]
    assert set(reasons) == {"pipe", "good.txt", "socket", "nowhere", "loop", "device", "gone"}
    (folder / "linked.png").unlink()
    captioned, reasons = skips_of(FolderSource(folder, 8, captions=("txt",)))
    assert captioned == [] and "no caption" in reasons["good"]
    with pytest.raises(InputError, match="is no image"):
        open_images(folder)


def test_a_pipe_that_comes_after_the_listing_does_not_hang(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(GOOD)
    source, images = FolderSource(tmp_path, 8), open_images(tmp_path)
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    assert skips_of(source) == (["a.png"], {"b": f"{tmp_path / 'b.png'} is neither a file nor a folder"})
    with pytest.raises(InputError, match="neither a file nor a folder"):
        images[:]
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        WebDatasetSource(str(tmp_path / "a.tar"), 8)


@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_nested_json_is_a_skip(tmp_path, depth):
    """Also of a depth that one parser takes and another one, or a deeper stack, would not."""
    nested = "[" * depth + "]" * depth
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(GOOD)
        (tmp_path / f"{name}.json").write_text('{"text": "a cat"}')
    (tmp_path / "b.json").write_text(f'{{"text": "a cat", "more": {nested}}}')
    images, reasons = skips_of(FolderSource(tmp_path, 8, captions=("text",)))
    assert images == ["a.png"] and "json cannot be read" in reasons["b"]
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "a cat"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metadata.jsonl").write_text(f'{lines[0]}\n{lines[1][:-1]}, "more": {nested}}}\n')
    source = FolderSource(tmp_path, 8, captions=("text",))
    assert source.fingerprint and skips_of(source)[0] == ["a.png"]


# --- tar files ---


def header(name=b"a.png", size=0, kind=b"0", number=None):
    """512 bytes by hand; number: a size that the octal field cannot hold, as GNU tar writes it."""
    block = bytearray(512)
    parts = ((0, name), (100, b"0000644\0"), (124, b"%011o\0" % size), (136, b"%011o\0" % 0), (156, kind))
    for place, part in (*parts, (257, b"ustar\0" + b"00"), (148, b" " * 8)):
        block[place : place + len(part)] = part
    if number is not None:
        block[124:136] = (b"\x80" if number >= 0 else b"\xff") + (number % 2**88).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**fields):
    text = b""
    for name, value in fields.items():
        line = f" {name.replace('__', '.')}={value}\n".encode()
        length = len(line) + len(str(len(line) + 3))
        text += str(length).encode() + line
    return header(b"pax", len(text), b"x") + text + bytes(-len(text) % 512)


def holes(**fields):
    return pax(GNU__sparse__name="a.png", **fields) + header(b"x", 8) + b"abcdefgh" + bytes(504)


NEXT = header(b"a.png", 8) + b"abcdefgh" + bytes(504)
END = bytes(1024)
DAMAGED = {  # behind a good sample: what is said of the tar file
    "a huge size": (header(number=2**60), "unexpected end of data"),
    "a size that no file has": (header(number=2**80), "a size that no file has"),
    "a negative size": (header(number=-512), "negative size"),
    "a long way back": (header(number=-(2**40)), "negative size"),
    "a name of a GiB": (header(kind=b"L", number=2**30), "headers of a member of more than"),
    "a name of a negative size": (header(kind=b"L", number=-512), "headers of a member of more than"),
    "headers of a GiB": (header(kind=b"x", number=2**30), "headers of a member of more than"),
    "headers of headers": (pax(path="b.png") * 3000 + NEXT, "header that cannot be read"),
    "a size in words": (pax(size="-5") + NEXT, "negative size"),
    "a map that never ends": (
        pax(GNU__sparse__major=1, GNU__sparse__minor=0, GNU__sparse__realsize=9, GNU__sparse__name="a.png")
        + header(size=2048) + b"9999999\n" + b"1\n" * 10**6,
        "headers of a member of more than",
    ),
    "a map of words": (holes(GNU__sparse__size="x", GNU__sparse__map="y"), "header that cannot be read"),
}  # fmt: skip
REFUSED = {  # members: what is said of each
    "holes": (holes(GNU__sparse__size=3 * 2**27, GNU__sparse__map="0,8"), "bytes: at most"),
    "smaller holes": (holes(GNU__sparse__size=2**27, GNU__sparse__map="0,8"), "with holes of more than"),
    "overlaps": (holes(GNU__sparse__size=99, GNU__sparse__map="0,4,2,4"), "its map of holes is damaged"),
    "negative holes": (holes(GNU__sparse__size=99, GNU__sparse__map="-4,8"), "its map of holes is damaged"),
    "a device": (header(b"a.png", kind=b"3"), "neither a file nor a link"),
    "a pipe": (header(b"a.png", kind=b"6"), "neither a file nor a link"),
    "a name of dots": (pax(path=".".join("a" * 100_000) + ".png") + NEXT, ""),
}


def samples_of(content, whole):
    """(key -> content or reason, what is said of the tar file)."""
    found = {}
    try:
        for each in read_tar(seekable(io.BytesIO(content), local=whole), whole=whole):
            assert not isinstance(each, str)
            for member in each.parts.values():
                try:
                    found[each.key] = member.read(2**28)
                except InputError as error:
                    found[each.key] = str(error)
    except tarfile.TarError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_tar_file_claims_is_not_believed(whole):
    """Samples before the damage are kept, and no memory is taken."""
    before = header(b"0.png", 5) + b"hello" + bytes(507)

    def check():
        for name, (part, said) in DAMAGED.items():
            found, damage = samples_of(before + part + END, whole)
            assert found.get("0") == b"hello" and said in damage, (name, found, damage)
        for name, (part, said) in REFUSED.items():
            found, damage = samples_of(before + part + END, whole)
            assert found.pop("0") == b"hello" and not damage, (name, damage)
            assert all(said in reason for reason in found.values()), (name, found)

    assert peak_growth(check) < ENOUGH


def test_names_in_a_tar_file_are_keys_and_never_paths(tmp_path):
    names = ("/etc/a.png", "../../b.png", "c\nd.png", "d/../../e.png")
    (tmp_path / "a.tar").write_bytes(tar_of([(name, GOOD) for name in names]))
    before = sorted(tmp_path.rglob("*"))
    source = WebDatasetSource(str(tmp_path / "a.tar"), 8, captions=())
    keys = [item.key for _, item in load_units(enumerate(source.units()), threads=1, ahead=1) if item]
    assert sorted(keys) == ["a/../../b", "a/../e", "a/c\nd", "a/etc/a"] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
def test_a_tar_file_that_inflates_without_end_takes_no_memory(compress, monkeypatch):
    monkeypatch.setattr("lpl_jax.data.tar_files.INFLATED", 2**22)
    monkeypatch.setattr("lpl_jax.data.tar_files.IN_MEMORY", 2**20)
    content = compress(header(b"0.png", 5) + b"hello" + bytes(507) + header(b"b.png", number=2**33) + bytes(2**23))
    found = []
    assert peak_growth(lambda: found.append(samples_of(content, True))) < ENOUGH
    assert found[0][0] == {"0": b"hello"} and "inflates to more than 100 times" in found[0][1]


def test_a_tar_file_cut_at_every_block_keeps_what_came_before(tmp_path):
    members = [(f"{number}.png", bytes([number]) * 700) for number in range(4)]
    content = tar_of(members)
    for end in range(0, len(content) - 10240 + 4096, 512):
        for whole in (True, False):
            found, damage = samples_of(content[:end], whole)
            assert list(found.values()) == [part for _, part in members[: len(found)]]
            assert len(found) == min(4, end // 1536) and (damage or end >= 4 * 1536)


def test_members_that_wait_for_a_decoder_are_bounded(tmp_path, monkeypatch):
    """A hundred members of 4 MiB that compress to nothing."""
    monkeypatch.setattr("lpl_jax.data.reading.MOST_WAITING", 2**23)
    members = [(f"{number}.bmp", b"BM" + bytes(2**22)) for number in range(40)]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    source = WebDatasetSource(str(tmp_path / "a.tar"), 8, captions=())
    found = []
    loading = load_units(enumerate(source.units()), threads=1, ahead=64)
    growth = peak_growth(lambda: found.extend(item for _, item in loading if item))
    assert len(found) == 40 and growth < ENOUGH


# --- images that are larger inside than they say ---


def directory(tags, data=b"", order="<"):
    """A TIFF by hand of (tag, type, count, value); -1 as a value: where `data` begins."""
    place = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", *tag[:3], place if tag[3] == -1 else tag[3]) for tag in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def grey(*more, width=WIDTH, height=HEIGHT, compression=1):
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    return [*tags, *more]


@functools.cache
def inside():
    """Name -> (a file of some kilobytes, whether it is read)."""
    strip, many, block = ((273, 4, 1, -1), (278, 4, 1, HEIGHT), (279, 4, 1, WIDTH * HEIGHT)), 30_000, 50_000
    repeated = [(1000 + tag, 7, block, -1) for tag in range(many)]
    turned = directory([(274, 3, 1, 1), *repeated], bytes(block))
    with warnings.catch_warnings(action="ignore"):  # Pillow reads EXIF that it writes, if it has a rotation
        avif = encoded(smooth(), "AVIF", exif=directory(repeated, bytes(block)))
    inflating = zlib.compress(bytes(2**24))
    tiles = [(322, 4, 1, 12_000), (323, 4, 1, 12_000), (324, 4, 1, -1), (325, 4, 1, len(inflating))]
    rows = b"".join(b"\0" + row.tobytes() for row in smooth())
    jpeg, gif = encoded(smooth(), "JPEG"), encoded(Image.fromarray(smooth()).quantize(4), "GIF")
    segments = [b"Exif\0\0" + turned[place : place + 60_000] for place in range(0, len(turned), 60_000)]
    exif = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(each)) + each for each in segments)
    scans = encoded(smooth(), "JPEG", progressive=True)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    table = 13 + (6 << (gif[10] & 7))
    comments = b"!\xfe" + (b"\xff" + bytes(255)) * 10_000 + b"\0"
    return {
        "tiff-repeated-tags": (directory(grey(*strip) + repeated, bytes(block)), True),
        "tiff-large-tiles": (directory(grey(*tiles, compression=8), inflating), False),
        "tiff-many-strips": (directory(grey((273, 4, 10**6, -1), (279, 4, 10**6, -1)), bytes(4 * 10**6)), False),
        "png-exif": (png((WIDTH, HEIGHT), 8, 2, rows, (b"eXIf", turned)), True),
        "webp-exif": (encoded(smooth(), "WEBP", exif=turned), True),
        "avif-exif": (avif, True),
        "jpeg-exif": (jpeg[:2] + exif + jpeg[2:], True),
        "jpeg-scans": (scans[:-2] + last * 2000 + b"\xff\xd9", False),
        "jpeg-segments": (jpeg[:2] + b"\xff\xe0\0\2" * 2**17 + jpeg[2:], False),
        "png-parts": (png((WIDTH, HEIGHT), 8, 2, rows)[:33] + chunk(b"IDAT", b"") * 2**19, False),
        "gif-comments": (gif[:table] + comments + gif[table:], True),
        "gif-frames": (gif[:-1] + gif[table:-1] * 2000 + b";", True),
        "gif-blocks": (gif[:table] + b"!\xfe\0" * 100_000 + gif[table:], False),
    }


@pytest.mark.parametrize("name", inside())
def test_what_is_in_a_file_beside_its_picture_takes_no_memory(name):
    content, read = inside()[name]
    found = []

    def image():
        try:
            found.append(decoding.read_rgb(content, "a").size == (WIDTH, HEIGHT))
        except InputError:
            found.append(False)

    assert peak_growth(image) < ENOUGH // 2 and found == [read]


def test_an_mpo_is_its_first_picture_and_the_list_of_formats_is_the_table():
    pictures = encoded(smooth(), "MPO", save_all=True, append_images=[Image.fromarray(smooth(1))], quality=95)
    assert containers.kind_of(pictures, "a") == "JPEG"
    assert set(decoding._OPENERS) == set(containers.FORMATS)
    assert {opened.format for opened in decoding._OPENERS.values()} == set(containers.FORMATS)


# --- files that nobody has written: the short form of benchmarks/fuzz.py ---


@pytest.mark.parametrize("name", fuzz_media.READERS)
@settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_files_are_read_or_refused(name, data):
    target = fuzz_targets.TARGETS[name]
    content = bytearray(data.draw(st.sampled_from(target.seeds())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    target.run(bytes(content))


# --- limits of images ---


def test_limits_are_those_that_were_given_in_every_way_of_reading(tmp_path, monkeypatch):
    """Of pixels and of bytes; a larger image is a skip, and does not make another source of it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.png").write_bytes(GOOD)
    (tmp_path / "a.tar").write_bytes(tar_of([("a.png", GOOD)]))
    monkeypatch.setattr(tfds, "_open", lambda *_: Examples([{"image": GOOD, "text": b"a cat"}]))
    identities = set()
    for limits in (ImageLimits(pixels=WIDTH * HEIGHT - 1), ImageLimits(bytes=len(GOOD) - 1), ImageLimits()):
        of_tfds = tfds.TFDSSource("a", 8, captions=("text",), limits=limits)
        of_files = [open_source(str(tmp_path / name), 8, captions=(), limits=limits) for name in ("a", "a.tar")]
        identities.add(tuple(source.fingerprint for source in of_files))
        for source in (*of_files, of_tfds):
            images, reasons = skips_of(source)
            assert len(images) == (limits == DEFAULT), source.description
            assert all("max_pixels" in reason or "bytes" in reason for reason in reasons.values())
        if limits != DEFAULT:
            with pytest.raises(InputError, match="max_pixels|bytes: at most"):
                open_images(tmp_path / "a", limits=limits)
    assert len(identities) == 1


def test_limits_come_from_flags_and_config(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"a/{name}.png").write_bytes(GOOD)
    image = [str(tmp_path / "a"), "--resolution", "8", "--out"]
    for flag in ("--max-pixels", "--max-bytes"):
        with pytest.raises(InputError, match=r"a\.png: .*(max_pixels|bytes: at most)"):
            prepare.main(["--source", *image, str(tmp_path / "store"), flag, "99"])
        with pytest.raises(InputError, match=r"a\.png: .*(max_pixels|bytes: at most)"):
            evaluate.main(["--images", *image, str(tmp_path / "out"), flag, "99", "--reference", str(tmp_path / "a")])
    assert DataConfig(max_pixels=99).limits == ImageLimits(pixels=99)
    for field in ({"max_pixels": 0}, {"max_bytes": 2**31}):
        with pytest.raises(InputError, match=f"data.{next(iter(field))}="):
            DataConfig(**field)
