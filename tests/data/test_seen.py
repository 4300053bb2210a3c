"""Whatever a source sees is encoded or listed as skipped; what was written verifies. Nasty inputs of all kinds."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from lpl_jax.data import FolderSource, PhotoSource, Subset, WebDatasetSource, prepare, write_store
from lpl_jax.data.examples import Example
from lpl_jax.data.inspect import verify
from lpl_jax.errors import InputError

SIZE = 24


def picture(kind="PNG", level=90):
    encoded = io.BytesIO()
    Image.new("RGB", (30, 26), (level, 120, 30)).save(encoded, kind)
    return encoded.getvalue()


GOOD = picture()
STEMS = [b"a", b"a.b", b"a.b.c", b"v1.0_cat", b"caf\xe9", "caf\u00e9".encode(), b"caf\\xe9", b"x\ny", b"01", b"1"]
STEMS += [b"...", "\U0001f600".encode(), b"a b", b"-", b"a.txt"]
ENDINGS = [b".png", b".png", b".PNG", b".jpg", b".gif", b".heic", b"", b".txt", b".json", b".seg.png", b".npy", b".cls"]
CONTENTS = [GOOD, GOOD, GOOD, GOOD, b"", b"no image", GOOD[:60]]
IMAGES = (b".png", b".jpg", b".gif")
SIDES = (b".txt", b".json", b".cls")


def names(rng, folders, count=30):
    found = {}
    for _ in range(count):
        folder, stem, ending = (each[rng.integers(len(each))] for each in (folders, STEMS, ENDINGS))
        content = CONTENTS[rng.integers(len(CONTENTS))]
        found[folder + stem + ending] = b"0" if ending == b".cls" else b'{"a": "b"}' if ending == b".json" else content
    return found


def is_hidden(name):
    return any(part.startswith(b".") for part in name.split(b"/"))


def folder_source(rng, path):
    """Names of all kinds in two class folders, one of them linked, and links that lead nowhere and back."""
    files = names(rng, [b"ant/", b"bee/", b"bee/deep/", b"caf\xe9/"])
    files |= {folder + b"1.png": GOOD for folder in (b"ant/", b"bee/", b"caf\xe9/")}
    for name, content in files.items():
        file = os.path.join(os.fsencode(path), name)  # noqa: PTH118, a name in bytes
        os.makedirs(os.path.dirname(file), exist_ok=True)  # noqa: PTH103, PTH120
        with open(file, "wb") as opened:  # noqa: PTH123
            opened.write(content)
    (path / "wasp").symlink_to(path / "ant")
    (path / "ant/back").symlink_to(path)
    (path / "bee/gone.png").symlink_to(path / "nowhere")
    shown = [name for name in files if not is_hidden(name) and not name.lower().endswith(SIDES)]
    return FolderSource(path, SIZE), len(shown) + sum(name.startswith(b"ant/") for name in shown) + 1


def tar_of(files):
    encoded = io.BytesIO()
    with tarfile.open(fileobj=encoded, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return encoded.getvalue()


def tar_source(rng, path):
    """The same names in tar files: sorted or not, behind each other, compressed, in subfolders."""
    images = 0
    for number in range(3):
        parts = [list(names(rng, [b"", b"x/", b"./"], 15).items()) for _ in range(2)]
        parts = [sorted(part) if number % 2 else part for part in parts]
        images += sum(name.lower().endswith(IMAGES) and not is_hidden(name.removeprefix(b"./"))
                      for part in parts for name, _ in part)  # fmt: skip
        content = b"".join(map(tar_of, parts))
        place = path / ("more" if number == 2 else "")
        place.mkdir(exist_ok=True)
        (place / f"{number}.tar{'.gz' * (number == 1)}").write_bytes(gzip.compress(content) if number == 1 else content)
    return WebDatasetSource(str(path), SIZE, captions=()), images


@pytest.mark.parametrize("make", [folder_source, tar_source])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_and_all_is_in_order(tmp_path, autoencoder, make, seed):
    (tmp_path / "data").mkdir()
    source, seen = make(np.random.default_rng(seed), tmp_path / "data")
    store = write_store(tmp_path / "store", source, autoencoder, batch_size=8, max_skipped=1.0, shard_records=9)
    assert verify(store).counts == {}
    report = json.loads((tmp_path / "store/report.json").read_text())
    assert report["records"] == len(store) and report["seen"] == len(store) + report["skipped"]
    skipped = report["skipped_images"]
    assert len(skipped) == report["skipped"] and all(entry["reason"] and entry["unit"] for entry in skipped)
    if make is folder_source:
        assert report["seen"] == seen
    else:  # a sample without an image is listed, too
        assert len(store) + sum("has no image" not in entry["reason"] for entry in skipped) == seen
    for text in [*(record.key for record in store), *(entry["key"] for entry in skipped), *store.class_names]:
        assert text.encode() and "\n" not in text


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_a_limit_counts_what_was_drawn(tmp_path, autoencoder, limit):
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(GOOD if number % 3 else b"damaged")
        (tmp_path / f"{number}.heic").write_bytes(b"")
    source = Subset(FolderSource(tmp_path, SIZE), limit)
    drawn = len(source) + len(source.unusable)
    assert drawn == min(limit, 20)
    if limit > 1:
        store = write_store(tmp_path / "store", source, autoencoder, batch_size=8, max_skipped=1.0)
        assert len(store) + store.manifest.skipped == drawn


def test_files_that_are_no_images_end_the_call_before_it_begins(tmp_path, autoencoder):
    for name in ("1.png", "2.HEIC", "3.HEIC", "4", "notes.txt", "._1.png"):
        (tmp_path / name).write_bytes(GOOD)
    source = FolderSource(tmp_path, SIZE)
    with pytest.raises(InputError, match=r"3 of 4 files cannot be used.*max_skipped=0 .*: 2 .HEIC is no.*; 1 a"):
        write_store(tmp_path / "store", source, autoencoder)
    assert not (tmp_path / "store").exists()
    assert len(write_store(tmp_path / "store", source, autoencoder, batch_size=8, max_skipped=3)) == 1


def test_kinds_of_skipped_images_are_said(tmp_path, autoencoder, capsys):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(GOOD if number < 2 else b"damaged")
    (tmp_path / "x.psd").write_bytes(b"")
    prepare(FolderSource(tmp_path, SIZE), autoencoder, tmp_path / "store", batch_size=8, max_skipped=1.0)
    out = capsys.readouterr().out
    assert "2 images of 6 seen of 1 class" in out and "4 skipped, listed in report.json" in out
    assert "skipped: 3 not an image that can be read as JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF, such as 2.png" in out
    assert "skipped: 1 .psd is no ending of an image that is read, such as x.psd" in out


class Nasty(PhotoSource):
    """Examples that no source of ours gives."""

    changes = ({}, {"label": -1}, {"label": 8}, {"key": "twice"}, {"key": "twice"}, {"key": ""}, {"captions": ("a",)},
               {"key": "a\0b\n\udce9"})  # fmt: skip

    def __init__(self):
        super().__init__(SIZE, crops=1)

    def __getitem__(self, index: int) -> Example:
        return super().__getitem__(index)._replace(**self.changes[index])


def test_what_verify_would_refuse_is_not_written(tmp_path, autoencoder):
    store = write_store(tmp_path / "store", Nasty(), autoencoder, batch_size=8, max_skipped=1.0)
    assert [record.key for record in store] == ["astronaut-00000", "twice", "a\\x00b\\n\\xe9"]
    assert verify(store).counts == {}
    reasons = [entry["reason"] for entry in json.loads((tmp_path / "store/report.json").read_text())["skipped_images"]]
    assert [reason.partition(": ")[2][:8] for reason in reasons] == [
        "label -1",
        "label 8 ",
        "another ",
        "its key ",
        "1 captio",
    ]


def test_classes_of_tar_files_are_counted(tmp_path, autoencoder, tars):
    labelled = [("0.png", GOOD), ("0.cls", b"2"), ("1.png", GOOD), ("2.png", GOOD), ("2.cls", b"cat")]
    labelled += [("3.png", GOOD), ("3.cls", b"\xef\xbb\xbf1")]  # with a byte order mark
    (tmp_path / "a.tar").write_bytes(tars.of(labelled))
    (tmp_path / "b.tar").write_bytes(tars.of([("0.png", GOOD), ("0.cls", b" 4\n")]))
    source = WebDatasetSource(str(tmp_path), SIZE, captions=())
    store = write_store(tmp_path / "store", source, autoencoder, batch_size=8, max_skipped=2)
    assert [record.label for record in store] == [2, 1, 4] and store.class_names == ("0", "1", "2", "3", "4")
    assert verify(store).counts == {}
    reasons = [entry["reason"] for entry in json.loads((tmp_path / "store/report.json").read_text())["skipped_images"]]
    assert ["has no label" in reasons[0], "b'cat' is no number" in reasons[1]] == [True, True]
