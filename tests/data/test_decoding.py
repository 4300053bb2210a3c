"""One reader of image files: what it makes of every kind, what it refuses, and how much memory it takes."""

import io
import re
import struct
import tarfile
import threading
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import image_kinds
import numpy as np
import pytest
from image_kinds import HEIGHT, WIDTH, encoded, png, smooth
from peak_memory import peak_growth
from PIL import Image

from lpl_jax.data import FolderSource, WebDatasetSource, containers, decoding, tfds
from lpl_jax.data.decoding import decode, read_rgb
from lpl_jax.data.examples import work_units
from lpl_jax.data.images import IMAGE_SUFFIXES, Crop
from lpl_jax.errors import InputError
from lpl_jax.evaluation import image_sets, reference
from lpl_jax.io.image_limits import DEFAULT, ImageLimits

ENOUGH = 2**25  # bytes that no small file may need more than


@pytest.mark.parametrize("kind", image_kinds.kinds())
def test_every_kind_of_image_is_read_as_a_viewer_shows_it_on_white(kind):
    content, expected, tolerance = image_kinds.kinds()[kind]
    image = read_rgb(content, kind)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image, int), expected, atol=tolerance)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp", "jpeg"])
def test_rgb_comes_out_bit_for_bit_as_pillow_decodes_it(kind):
    content = image_kinds.kinds()[kind][0]
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(read_rgb(content, kind)), np.asarray(image.convert("RGB")))


RAW_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\3\0\0\0\0\0\0"  # orientation 3
TURNS = {  # EXIF orientation -> what is stored of an upright image
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_exif_rotation_is_applied(kind, orientation):
    upright, exif = smooth(), Image.Exif()
    exif[0x112] = orientation
    stored = np.ascontiguousarray(TURNS[orientation](upright))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 95}}.get(kind, {})
    image = read_rgb(encoded(stored, kind, exif=exif, **options), kind)
    np.testing.assert_allclose(np.asarray(image, int), upright, atol=20 if kind in ("JPEG", "AVIF") else 0)


@pytest.mark.parametrize(
    "text",
    [
        (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'),
        (
            b"zTXt",
            b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  32\n" + RAW_EXIF.hex().encode()),
        ),
    ],
)
def test_rotation_in_the_texts_of_a_png_is_applied(text):
    rows = b"".join(b"\0" + row.tobytes() for row in np.rot90(smooth(), 2))
    image = read_rgb(png((WIDTH, HEIGHT), 8, 2, rows, text), "a")
    np.testing.assert_array_equal(np.asarray(image), smooth())


def test_exif_that_cannot_be_read_turns_nothing():
    plain = encoded(smooth(), "JPEG")
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"):
        content = plain[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + plain[2:]
        np.testing.assert_array_equal(np.asarray(read_rgb(content, "a")), np.asarray(read_rgb(plain, "a")))


def taken(image):
    """The pixels, or the reason that there are none."""
    try:
        return image()
    except InputError as error:
        return str(error)


def of_source(source):
    """Pixels or reason by name, as prepare gets them."""
    items = [item for unit in work_units(source, 100) for item in unit.items()]
    return {item.key.split("/")[-1].removesuffix(".png"): taken(lambda i=item: i.load().image) for item in items}


class Examples(list):
    """What tensorflow-datasets gives of a data set."""

    dataset_info = types.SimpleNamespace(features={"image": None, "text": None}, full_name="examples")


def everywhere(folder, monkeypatch, contents, side):
    """way -> name -> pixels or reason, for all the ways in which image files are read.

    All names end in .png: what a file holds tells what it is.
    """
    for place in ("images", *contents):
        (folder / place).mkdir()
    with tarfile.open(folder / "all.tar", "w") as tar:
        for name, content in contents.items():
            (folder / "images" / f"{name}.png").write_bytes(content)
            (folder / name / "a.png").write_bytes(content)
            for ending, part in (("png", content), ("txt", b"a photo")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    monkeypatch.setattr(tfds, "_open", lambda *_: Examples({"image": each, "text": b""} for each in contents.values()))
    monkeypatch.setattr(tfds, "_caption", lambda *_: "a photo")
    folder_source = FolderSource(folder / "images", side)
    images = [f"{name}.png" for name in contents]
    rows = sorted(range(len(folder_source)), key=lambda row: images.index(folder_source.key(row)))
    of_set = {name: lambda name=name: image_sets.open_images(folder / name, resolution=side) for name in contents}
    own, first = reference.source_rows(folder_source), np.array([0])
    return {
        "folder": of_source(folder_source),
        "tar": of_source(WebDatasetSource(str(folder / "all.tar"), side)),
        "tfds": dict(zip(contents, of_source(tfds.TFDSSource("a", side, captions=("text",))).values(), strict=True)),
        "image set": {name: taken(lambda s=opened: s()[:][0]) for name, opened in of_set.items()},
        "reference": {
            name: taken(lambda s=opened: reference.set_rows(s())(first)[0]) for name, opened in of_set.items()
        },
        "run's data": {n: taken(lambda r=row: own(first + r)[0]) for n, row in zip(contents, rows, strict=True)},
    }


def test_the_same_bytes_are_the_same_pixels_wherever_they_are_read(tmp_path, monkeypatch):
    contents = {name: content for name, (content, *_) in image_kinds.kinds().items()}
    found = everywhere(tmp_path, monkeypatch, contents, 16)
    for name, content in contents.items():
        expected = Crop(16)(read_rgb(content, name), 0, name)
        for way, images in found.items():
            np.testing.assert_array_equal(images[name], expected, err_msg=f"{name} from {way}")


def test_what_is_refused_is_refused_everywhere_for_the_same_reason(tmp_path, monkeypatch):
    contents = {name: content for name, (content, _) in image_kinds.damaged().items()}
    reasons = {name: reason for name, (_, reason) in image_kinds.damaged().items()}
    contents |= {f"{name}-bomb": content for name, content in image_kinds.bombs().items()}
    found = {}
    growth = peak_growth(lambda: found.update(everywhere(tmp_path, monkeypatch, contents, 16)))
    assert growth < ENOUGH, f"{growth:,} bytes for images of up to {max(map(len, contents.values())):,} bytes"
    for name in contents:
        texts = {way: images[name] for way, images in found.items()}
        assert all(isinstance(text, str) for text in texts.values()), (name, texts)
        said = {re.sub(r"^.*?: ", "", text) for text in texts.values()}
        assert len(said) == 1 and reasons.get(name, "") in said.pop(), texts


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
    ],
)
def test_files_that_are_cut_short_are_refused(kind, options):
    """Wherever they are cut; a GIF whose last bytes are missing has its first picture as a whole."""
    content = encoded(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8), kind, **options)
    for missing in (*((1, 2) if kind != "GIF" else ()), 4, 8, 16, 30, len(content) // 2, len(content) - 30):
        with pytest.raises(InputError, match="^cut: "):
            read_rgb(content[:-missing], "cut")


def test_a_line_of_pixels_is_cut_before_it_is_enlarged():
    """Files of 100 bytes that would be 512 x 15,360,000 pixels."""
    for size in ((1, 30_000), (30_000, 1), (1, 65_535)):
        content = encoded(Image.new("RGB", size, (200, 10, 10)))
        growth = peak_growth(lambda content=content: Crop(512).read(content, 0, "line"))
        assert growth < ENOUGH, f"{growth:,} bytes for {size}"
        np.testing.assert_array_equal(Crop(512).read(content, 0, "line")[0][::100, ::100], [[[200, 10, 10]] * 6] * 6)


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (20, 401), (501, 30), (130, 2200), (4001, 200), (1, 4000)])
def test_cutting_first_gives_what_resizing_first_gives(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    pixels, control = Crop(64).with_control(image, 0, "line")
    scale = 64 / min(size)
    resized = np.asarray(image.resize([round(side * scale) for side in size], Image.Resampling.LANCZOS), int)
    top, left = ((side - 64) // 2 for side in resized.shape[:2])
    np.testing.assert_allclose(pixels, resized[top : top + 64, left : left + 64], atol=1)
    assert control.tolist() == [
        [*size[::-1], top, left],
        [*size[::-1], top, resized.shape[1] - 64 - left],
    ]


def test_images_of_up_to_sixteen_to_one_are_resized_as_a_whole():
    """Stores and numbers that were made before depend on it."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (320, 20, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((64, 1024), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(Crop(64)(image, 0, "image"), resized[480 : 480 + 64])


def test_bounds_of_size():
    sides = png((decoding.MAX_SIDE + 1, 1), 1, 0, bytes(decoding.MAX_SIDE // 8 + 2))
    pixels = r"possible: 89,478,485 pixels \(max_pixels\), 65,535 on a side"
    with pytest.raises(InputError, match=f"wide: 65536x1 pixels: {pixels}"):
        read_rgb(sides, "wide")
    with pytest.raises(InputError, match=f"large: 10000x9000 pixels: {pixels}"):
        read_rgb(png((10_000, 9_000), 8, 2, b""), "large")
    with pytest.raises(InputError, match=r"long: more than 268,435,456 bytes \(max_bytes\)"):
        read_rgb(bytes(DEFAULT.bytes + 1), "long")
    for limits in (ImageLimits(pixels=HEIGHT * WIDTH - 1), ImageLimits(bytes=99)):
        with pytest.raises(InputError, match=r"\(max_"):
            read_rgb(encoded(smooth()), "small", limits)
    for wrong in ({"pixels": 0}, {"pixels": 178_956_971}, {"bytes": 2**31}):
        with pytest.raises(InputError, match=f"max_{next(iter(wrong))}="):
            ImageLimits(**wrong)


def test_large_images_are_decoded_and_used_one_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", WIDTH * HEIGHT)
    at_once, most = 0, []
    content = {"small": encoded(smooth()), "large": encoded(np.zeros((HEIGHT + 1, WIDTH, 3), np.uint8))}
    together = threading.Barrier(2)

    def use(image):
        nonlocal at_once
        at_once += 1
        most.append(at_once)
        if image.height == HEIGHT:
            together.wait(10)  # would break if small ones were used one at a time, too
        at_once -= 1

    for kind in ("large", "small"):
        most.clear()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _, kind=kind: decode(content[kind], kind, use), range(4 if kind == "large" else 2)))
        assert max(most) == (1 if kind == "large" else 2)


def test_every_ending_of_an_image_is_of_a_format_that_is_read():
    Image.init()
    known = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in containers.FORMATS}
    assert {known[suffix] for suffix in IMAGE_SUFFIXES} == set(containers.FORMATS)


def test_the_measure_of_memory_sees_what_is_taken():
    assert peak_growth(lambda: np.ones(2**24)) > 2**27 - 2**20
    inflated = peak_growth(lambda: zlib.decompress(zlib.compress(bytes(2**26))))
    assert inflated > 2**26 > ENOUGH
