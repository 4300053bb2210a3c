"""Image sets from folders and arrays: what is read, in which order, and what is refused, with real damaged files."""

import io
import itertools
import os
import struct
import threading
import time
import zipfile

import image_kinds
import numpy as np
import pytest
from peak_memory import peak_growth
from PIL import Image

from lpl_jax.data import decoding
from lpl_jax.data.decoding import read_rgb
from lpl_jax.data.images import Crop
from lpl_jax.errors import InputError
from lpl_jax.evaluation.image_sets import open_images


def pixels(count=5, height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def write(folder, **contents):
    """Files by name; __ stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        content = content if isinstance(content, bytes) else encoded(content)
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path):
    """0.png to 11.png."""
    for index, image in enumerate(pixels(12)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    return tmp_path


def test_folder_is_read_in_natural_order(folder):
    images = open_images(folder)
    assert list(images.names) == [f"{index}.png" for index in range(12)]  # and not 0, 1, 10, 11, 2
    assert (len(images), images.shape) == (12, (6, 8))
    np.testing.assert_array_equal(images[:], pixels(12))
    np.testing.assert_array_equal(images[3:5], pixels(12)[3:5])
    np.testing.assert_array_equal(images[-1:], pixels(12)[-1:])
    assert images[7:7].shape == (0, 6, 8, 3)
    assert "12 images of 8x6 pixels" in images.description and str(folder) in images.description
    with pytest.raises(TypeError, match=r"\[start:stop\]"):
        images[3]


def test_batches(folder):
    images = open_images(str(folder))
    batches = list(images.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 2] and batches[0].dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(batches), pixels(12))
    np.testing.assert_array_equal(np.concatenate(list(images.batches(4, start=5, stop=11))), pixels(12)[5:11])
    assert list(images.batches(4, start=12)) == []
    with pytest.raises(InputError, match="batch_size=0"):
        next(images.batches(0))


def test_names_of_subfolders_letters_and_bytes(tmp_path):
    names = [
        "a/2.png",
        "a/10.PNG",
        "a 3/1.png",
        "ä 日本 😀.png",
        "new\nline.png",
        os.fsdecode(b"\xff bytes.png"),
        "01.png",
        "1.png",
    ]
    for name, image in zip(names, pixels(len(names)), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(image))
    images = open_images(tmp_path)
    assert set(images.names) == set(names) and len(images.fingerprint) == 64
    order = [name for name in images.names if name[:1] in "a01"]
    assert order == ["01.png", "1.png", "a/2.png", "a/10.PNG", "a 3/1.png"]
    for name, image in zip(images.names, images[:], strict=True):
        np.testing.assert_array_equal(image, pixels(len(names))[names.index(name)])
    (tmp_path / "new\nline.png").write_bytes(b"no image")
    (tmp_path / os.fsdecode(b"\xff bytes.png")).write_bytes(b"no image")
    for row, shown in ((images.names.index("new\nline.png"), r"new\nline.png"), (-1, r"\udcff bytes.png")):
        with pytest.raises(InputError) as caught:
            images[row : row + 1 or None]
        assert shown in str(caught.value) and str(caught.value).isprintable()


def test_kinds_of_files(tmp_path):
    image = pixels(1)[0]
    lossy = {"b__jpg": encoded(image, "JPEG"), "c__jpeg": encoded(image, "JPEG"), "d__webp": encoded(image, "WEBP")}
    images = open_images(write(tmp_path, a__png=image, **lossy))
    np.testing.assert_array_equal(images[:1][0], image)
    for row, content in enumerate(lossy.values(), 1):
        np.testing.assert_array_equal(
            images[row : row + 1][0], np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        )


def test_modes_that_are_converted(tmp_path):
    """Grey, palette, black and white, and opaque alpha channels; the right pixels are made by hand."""
    grey, colour = pixels(1)[0, ..., 0], pixels(1, seed=1)[0]
    white = np.full_like(grey, 255)
    indices, palette = (grey % 7).astype(np.uint8), np.random.default_rng(2).integers(0, 256, (7, 3), dtype=np.uint8)
    with_palette = Image.fromarray(indices, "P")
    with_palette.putpalette(palette.tobytes())
    cases = {
        "1": (Image.fromarray(grey > 99), np.where(grey > 99, 255, 0)[..., None].repeat(3, axis=-1)),
        "L": (Image.fromarray(grey), grey[..., None].repeat(3, axis=-1)),
        "LA": (Image.fromarray(np.stack([grey, white], -1), "LA"), grey[..., None].repeat(3, axis=-1)),
        "P": (with_palette, palette[indices]),
        "RGBA": (Image.fromarray(np.concatenate([colour, white[..., None]], -1), "RGBA"), colour),
    }
    for mode, (image, expected) in cases.items():
        assert Image.open(io.BytesIO(encoded(image))).mode == mode
        np.testing.assert_array_equal(open_images(write(tmp_path / mode, a__png=encoded(image)))[:][0], expected)


@pytest.mark.parametrize("kind", image_kinds.damaged())
def test_images_that_are_refused(tmp_path, kind):
    content, message = image_kinds.damaged()[kind]
    images = open_images(write(tmp_path, a__png=pixels(1)[0], b__png=content))
    with pytest.raises(InputError, match=rf"b\.png: .*{message}"):
        images[:]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=rf"b\.png: .*{message}"):  # the first image is looked at on opening
        open_images(tmp_path)


def test_images_of_any_kind_stand_beside_each_other_as_they_are(tmp_path):
    found = {name: content for name, (content, *_) in image_kinds.kinds().items()}
    for name, content in found.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    images = open_images(tmp_path)
    for name, image in zip(images.names, images[:], strict=True):
        np.testing.assert_array_equal(image, read_rgb(found[name.removesuffix(".png")], name))


@pytest.mark.parametrize(("width", "height"), [(1, 17), (17, 1), (5000, 4000)])
def test_huge_and_long_images_need_a_resolution(tmp_path, width, height):
    write(tmp_path, a__png=encoded(Image.new("RGB", (width, height))))
    with pytest.raises(InputError, match=rf"a\.png: {width}x{height} pixels: give a resolution"):
        open_images(tmp_path)
    assert open_images(tmp_path, resolution=4)[:].shape == (1, 4, 4, 3)


@pytest.mark.parametrize("resolution", [None, 4])
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})]
)
def test_files_that_are_cut_short_are_refused_wherever_they_are_cut(tmp_path, kind, options, resolution):
    content = encoded(pixels(1, 16, 16)[0], kind, **options)
    write(tmp_path, a__png=pixels(1, 16, 16)[0])
    for missing in (1, 2, 4, 8, 12, 16, 30, len(content) // 2, len(content) - 30):
        (tmp_path / "b.png").write_bytes(content[:-missing])
        with pytest.raises(InputError, match=r"b\.png: "):
            open_images(tmp_path, resolution=resolution)[:]
    (tmp_path / "b.png").write_bytes(content)
    assert len(open_images(tmp_path, resolution=resolution)[:]) == 2


def test_every_changed_byte_of_a_png_is_noticed(tmp_path):
    """In a smooth image, where Pillow alone decodes many of them to other pixels."""
    image = (np.indices((16, 16, 3)).sum(axis=0) * 5).astype(np.uint8)
    content = encoded(image)
    for place in range(len(content)):
        write(tmp_path, a__png=content[:place] + bytes([content[place] ^ 65]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"a\.png: "):
            open_images(tmp_path)


def test_sizes_that_differ(tmp_path):
    first, other, odd = pixels(1, 6, 8)[0], pixels(1, 9, 7)[0], pixels(1, 5, 4)[0]
    images = open_images(write(tmp_path, a__png=first, b__png=first, c__png=other, d__png=odd))
    np.testing.assert_array_equal(images[:2], np.stack([first, first]))
    with pytest.raises(InputError, match=r"c\.png: 7x9 pixels, but .*a\.png has 8x6: give a resolution"):
        list(images.batches(4))
    images = open_images(tmp_path, resolution=5)
    assert images.shape == (5, 5) and "shorter side resized" in images.description
    expected = [Crop(5)(Image.fromarray(image), 0, "") for image in (first, first, other, odd)]
    np.testing.assert_array_equal(images[:], np.stack(expected))
    with pytest.raises(InputError, match="resolution=0"):
        open_images(tmp_path, resolution=0)


def test_odd_sizes_are_as_good_as_others(tmp_path):
    image = pixels(1, 7, 5)[0]
    np.testing.assert_array_equal(open_images(write(tmp_path, a__png=image, b__png=image))[:], np.stack([image, image]))


def test_files_that_are_no_images(folder):
    write(folder, labels__csv=b"1,2", README__txt=b"x", meta__JSON=b"{}", __hidden=b"x")
    write(folder / ".cache", a__bmp=b"x")
    assert (folder / ".hidden").exists() and len(open_images(folder)) == 12
    write(folder / "more", x10__heic=b"x")
    reason = r"\.heic is no ending of an image that is read"
    with pytest.raises(InputError, match=rf"x10\.heic is no image \({reason}\): possible: \.jpg, .*files, \.txt"):
        open_images(folder)
    write(folder / "more", x9__svg=b"x")
    with pytest.raises(InputError, match=r"more/x9\.svg \(and 1 more\) is no image"):
        open_images(folder)


def test_too_few_and_nothing(folder, tmp_path_factory):
    assert len(open_images(folder, minimum=12)) == 12
    with pytest.raises(InputError, match="has 12 images: needed: at least 13"):
        open_images(folder, minimum=13)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="has 0 images: needed: at least 1"):
        open_images(empty)
    with pytest.raises(InputError, match="nowhere does not exist: possible: a folder of images, an .npz or an .npy"):
        open_images(empty / "nowhere")
    with pytest.raises(InputError, match=r"0\.png is not one: possible: a folder"):
        open_images(folder / "0.png")
    np.save(empty / "a.npy", pixels(0))
    with pytest.raises(InputError, match="a.npy has 0 images"):
        open_images(empty / "a.npy")


def test_links_are_followed_but_not_twice(folder, tmp_path_factory):
    linking = tmp_path_factory.mktemp("links")
    (linking / "set").symlink_to(folder)
    assert list(open_images(linking).names)[:2] == ["set/0.png", "set/1.png"]
    (folder / "loop").symlink_to(folder)
    with pytest.raises(InputError, match="loop is a symbolic link to a folder that is read already"):
        open_images(folder)


def test_a_file_that_vanishes_is_named(folder):
    images = open_images(folder)
    (folder / "7.png").unlink()
    with pytest.raises(InputError, match=r"7\.png cannot be read: No such file"):
        list(images.batches(5))
    with pytest.raises(InputError, match=r"7\.png cannot be read"):
        _ = images.fingerprint


ARRAYS = {
    "npy": lambda path, array: np.save(path, array),
    "npz": lambda path, array: np.savez(path, array),
    "compressed npz": lambda path, array: np.savez_compressed(path, array),
    "npz with labels": lambda path, array: np.savez(path, array, np.arange(len(array))),  # as ADM's sampler writes it
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(tmp_path, kind):
    path = tmp_path / f"samples.{kind.split()[0] if kind == 'npy' else 'npz'}"
    ARRAYS[kind](path, pixels(12))
    images = open_images(path)
    assert list(images.names) == [str(index) for index in range(12)] and images.shape == (6, 8)
    np.testing.assert_array_equal(np.concatenate(list(images.batches(5))), pixels(12))
    np.testing.assert_array_equal(images[4:9], pixels(12)[4:9])
    np.testing.assert_array_equal(np.concatenate(list(images.batches(3, start=7))), pixels(12)[7:])
    resized = open_images(path, resolution=4)[:]
    np.testing.assert_array_equal(resized, [Crop(4)(Image.fromarray(image), 0, "") for image in pixels(12)])


def test_slices_of_an_npz_read_it_once(tmp_path, monkeypatch):
    """Its bytes come in order only, so slice after slice must go on where the one before ended."""
    np.savez_compressed(tmp_path / "a.npz", pixels(64))
    images = open_images(tmp_path / "a.npz")
    inflated, original = [], zipfile.ZipExtFile._read1

    def counting(self, size):
        content = original(self, size)
        inflated.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "_read1", counting)
    np.testing.assert_array_equal(np.concatenate([images[row : row + 1] for row in range(64)]), pixels(64))
    assert sum(inflated) <= 2 * pixels(64).nbytes  # the first image was looked at before: one step back
    np.testing.assert_array_equal(images[3:5], pixels(64)[3:5])
    one, other = images.batches(8), images.batches(8, start=32)
    for start in range(0, 32, 8):  # two readers at a time
        np.testing.assert_array_equal(next(one), pixels(64)[start : start + 8])
        np.testing.assert_array_equal(next(other), pixels(64)[start + 32 : start + 40])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels(2).astype(np.float32), r"\(2, 6, 8, 3\), float32: needed: \(N, H, W, 3\), uint8"),
        (pixels(2).transpose(0, 3, 1, 2).copy(), r"\(2, 3, 6, 8\), uint8: needed"),
        (pixels(2)[..., 0], r"\(2, 6, 8\), uint8"),
        (np.array([{"a": 1}], object), "object: needed"),
        (np.asfortranarray(pixels(2)), "Fortran order: needed: C order"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_refused(tmp_path, array, message, suffix):
    path = tmp_path / f"samples.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, array)
    with pytest.raises(InputError, match=f"samples.{suffix} .*{message}"):
        open_images(path)


def test_npz_without_images(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match=r"the arrays mu, sigma \(statistics, no images\): needed: arr_0"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=pixels(2))
    with pytest.raises(InputError, match="the arrays images: needed: arr_0"):
        open_images(tmp_path / "b.npz")


@pytest.mark.parametrize("kind", ARRAYS)
def test_damaged_arrays(tmp_path, kind):
    path = tmp_path / f"samples.{'npy' if kind == 'npy' else 'npz'}"
    ARRAYS[kind](path, pixels(12))
    content = path.read_bytes()
    for missing in (1, 50, 300, len(content) - 40, len(content)):
        path.write_bytes(content[:-missing])
        with pytest.raises(InputError, match=f"{path.name} "):
            open_images(path)[:]
    if kind == "npy":
        path.write_bytes(content + b"\0")
        with pytest.raises(InputError, match="bytes where its header says"):
            open_images(path)
        return
    for place in (300, len(content) // 2):  # within the images: a checksum, which is checked with the last of them
        path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        with pytest.raises(InputError, match=f"{path.name} cannot be read as an array of images"):
            list(open_images(path).batches(5))
        with pytest.raises(InputError, match=f"{path.name} cannot be read as an array of images"):
            _ = open_images(path).fingerprint


def test_npz_whose_header_lies(tmp_path):
    stream = io.BytesIO()
    np.save(stream, pixels(4))
    for content in (stream.getvalue()[:-1], stream.getvalue() + b"\0", b"no array", b""):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
        with pytest.raises(InputError, match="a.npz cannot be read as an array of images"):
            open_images(tmp_path / "a.npz")


def npy(shape, header=b""):
    """An .npy that has no data, or no more than the beginning of a header of 3 GB."""
    if header:
        return b"\x93NUMPY\x02\0" + struct.pack("<I", 3 * 2**30) + header
    fields = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(fields)) + fields


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (npy((10**12, 1, 1, 3)), None, "a.npz cannot be read as an array of images"),
        (npy((1, 60_000, 60_000, 3)), 60_000**2 * 3, "possible: images of up to 89,478,485 pixels"),
        (npy((4, -4, -4, 3)), 4 * 16 * 3, "an array of shape .4, -4, -4, 3."),
        (npy((), b"{" * 99), 3 * 2**30, "a header of 3,221,225,472 bytes"),
    ],
)
def test_arrays_that_claim_to_be_huge_take_no_memory(tmp_path, content, size, message):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content)
    if size is not None:
        with (tmp_path / "a.npy").open("wb") as file:  # sparse
            file.write(content)
            file.truncate(len(content) + size)
    for name in ("a.npz", *(["a.npy"] if size is not None else [])):

        def read(name=name):
            with pytest.raises(InputError, match=message.replace("a.npz", name)):
                open_images(tmp_path / name)[:]

        assert peak_growth(read) < 2**24


def test_names_of_the_rows_of_an_array_are_not_written_out(tmp_path):
    """A zip file's directory may claim any number of rows."""
    with (tmp_path / "a.npy").open("wb") as file:
        content = npy((10**9, 1, 1, 3))
        file.write(content)
        file.truncate(len(content) + 3 * 10**9)
    found = []
    assert peak_growth(lambda: found.append(open_images(tmp_path / "a.npy"))) < 2**24
    (images,) = found
    assert len(images) == 10**9 and images.names[-1] == "999999999" and list(images.names[3:5]) == ["3", "4"]


def test_fingerprint_follows_names_bytes_and_resolution(folder, tmp_path_factory):
    before = open_images(folder).fingerprint
    assert before == open_images(folder).fingerprint == open_images(str(folder) + "/").fingerprint
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "notes.txt").write_text("ignored")
    seen = {before, open_images(copy).fingerprint}
    assert len(seen) == 1
    seen.add(open_images(copy, resolution=6).fingerprint)
    (copy / "3.png").write_bytes(encoded(pixels(12)[3], compress_level=1))  # the same pixels
    seen.add(open_images(copy).fingerprint)
    (copy / "3.png").rename(copy / "33.png")
    seen.add(open_images(copy).fingerprint)
    (copy / "33.png").unlink()
    seen.add(open_images(copy).fingerprint)
    for count in (11, 12):
        np.save(copy / "a.npy", pixels(count))
        seen.add(open_images(copy / "a.npy").fingerprint)
    np.save(copy / "a.npy", pixels(12).reshape(12, 8, 6, 3))
    seen.add(open_images(copy / "a.npy").fingerprint)
    assert len(seen) == 8
    np.savez_compressed(copy / "b.npz", pixels(12).reshape(12, 8, 6, 3))
    assert open_images(copy / "b.npz").fingerprint in seen  # the array is what counts


def test_reading_ahead_is_bounded(monkeypatch, folder):
    """A consumer that stops has no more than two batches read behind its own, and the threads end with it."""
    read, original = itertools.count(), decoding.decode
    taken = []

    def counting(*arguments):
        taken.append(next(read))
        return original(*arguments)

    images = open_images(folder)
    monkeypatch.setattr(decoding, "decode", counting)
    threads = threading.active_count()
    batches = images.batches(2)
    next(batches)
    time.sleep(0.1)
    assert 2 <= len(taken) <= 2 + 4
    batches.close()
    assert threading.active_count() == threads
