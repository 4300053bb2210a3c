"""Which files of a folder are images, which are classes, and what metadata says of them."""

import json
import os

import pytest
from PIL import Image

from lpl_jax.data import FolderSource, open_source
from lpl_jax.data import listing as module
from lpl_jax.data.examples import Note, work_units
from lpl_jax.data.listing import list_files, name_text, natural
from lpl_jax.errors import InputError
from lpl_jax.evaluation.image_sets import open_images


def fill(folder, *names, **contents):
    """Images of these names; texts by name, __ for a dot."""
    for name in (*names, *contents):
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in contents:
            path.write_text(contents[name])
        else:
            Image.new("RGB", (8, 8)).save(path, "PNG")
    return folder


def notes(source):
    return [item.text for unit in work_units(source, 100) for item in unit.items() if isinstance(item, Note)]


def test_endings_decide(tmp_path):
    for ending in ("jpg", "JPEG", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "TIFF", "avif"):
        (tmp_path / f"x.{ending}").write_bytes(b"")
    for name in ("x.heic", "x", "x.svg", "a.tar.gz", "b.TAR", "x.txt", "x.cls", "LICENSE", "Thumbs.db", "._x.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/x.png").write_bytes(b"")
    found = list_files(tmp_path)
    assert len(found.images) == 11 and found.tars == ["a.tar.gz", "b.TAR"]
    assert found.sides == ["LICENSE", "x.cls", "x.txt"]
    assert found.others == {
        "x": "a name without an ending is no ending of an image that is read",
        "x.heic": ".heic is no ending of an image that is read",
        "x.svg": ".svg is no ending of an image that is read",
    }


def test_stores_and_evaluation_read_the_same_files(tmp_path):
    fill(tmp_path, "b/2.png", "b/10.PNG", "a/x.gif", "a/y.txt.png", "a/.hidden.png", a__csv="", a__md="")
    names = list(open_images(tmp_path).names)
    source = FolderSource(tmp_path, 8)
    assert (
        names
        == [source.key(index) for index in range(len(source))]
        == ["a/x.gif", "a/y.txt.png", "b/2.png", "b/10.PNG"]
    )


def test_links_are_followed_and_loops_are_said(tmp_path):
    root = fill(tmp_path / "root", "cat/1.png", "dog/1.png")
    fill(tmp_path / "disk", "2.png")
    for link, target in (("cat/disk", tmp_path / "disk"), ("bird", tmp_path / "disk"), ("dog/up", root), ("all", root)):
        (root / link).symlink_to(target)
    source = FolderSource(root, 8)
    assert source.class_names == ("bird", "cat", "dog")
    assert [source.key(index) for index in range(4)] == ["bird/2.png", "cat/1.png", "cat/disk/2.png", "dog/1.png"]
    assert [text.partition(": ")[2] for text in notes(source)] == [
        "folders in class folders are no classes: images in cat/disk are of class cat",
        "all, dog/up leads back to a folder that it lies in: not followed",
        "cat/disk is read in two places: its images are there twice",
    ]
    with pytest.raises(InputError, match="is a symbolic link to a folder that is read already"):
        open_images(root)


def test_links_that_lead_nowhere_and_pipes_are_no_images(tmp_path):
    fill(tmp_path, "1.png")
    (tmp_path / "2.png").symlink_to("nowhere")
    (tmp_path / "3.png").symlink_to("3.png")
    os.mkfifo(tmp_path / "4.png")
    source = FolderSource(tmp_path, 8)
    assert len(source) == 1
    assert [key for key, _ in source.unusable] == ["2.png", "3.png", "4.png"]
    assert "a symbolic link to nothing that can be read" in source.unusable[0][1]
    with pytest.raises(InputError, match=r"2.png \(and 2 more\) is no image"):
        open_images(tmp_path)


def test_links_to_links_do_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_AGAIN", 20)
    for number in range(10):
        fill(tmp_path / str(number), "1.png")
        for name in "ab":
            (tmp_path / str(number) / name).symlink_to(tmp_path / str(number + 1))
    with pytest.raises(InputError, match="more than 20 folders are read several times"):
        list_files(tmp_path / "0")


def test_names_become_text():
    assert name_text("caf\udce9\n\0\u2028.png") == "caf\\xe9\\n\\x00\\u2028.png"
    assert name_text("ñ 日本 😀 a\u200db.png") == "ñ 日本 😀 a\u200db.png"
    assert sorted(["10", "2", "b10", "b2", "01", "1"], key=natural) == ["01", "1", "2", "10", "b2", "b10"]


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["train/a/1.png", "val/a/1.png"], "train"),
        (["train/1.png", "val/1.png"], "train"),
        (["TRAIN/a/1.png"], "TRAIN"),
        (["Test/1.png", "x/1.png", "Validation/1.png"], "Test"),
        (["train2017/1.png", "val2017/1.png"], "train2017"),
        (["trainA/1.png", "testB/1.png"], "trainA"),
        (["test_set/1.png", "training-set/1.png"], "training-set"),
        (["train/a/1.png", "other/1.png"], "train"),
        (["ILSVRC2012_img_val/a/1.png", "ILSVRC2012_img_train/a/1.png"], "ILSVRC2012_img_train"),
        (["fold_train/1.png", "fold_test/1.png"], "fold_train"),
        (["data/train/a/1.png", "data/test/a/1.png"], "data/train"),
    ],
)
def test_splits_are_no_classes(tmp_path, names, meant):
    with pytest.raises(InputError, match=f"splits, and no classes: did you mean {tmp_path / meant}\\?"):
        FolderSource(fill(tmp_path, *names), 8)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    assert FolderSource(fill(tmp_path / "a", "aeroplane/1.png", "train/1.png"), 8).class_names == ("aeroplane", "train")
    names = ("crash_test", "freight_train", "steam_train/old")
    source = FolderSource(fill(tmp_path / "b", *(f"{name}/1.png" for name in names)), 8)
    assert source.class_names == ("crash_test", "freight_train", "steam_train")


def test_classes_come_in_natural_order(tmp_path):
    for number in range(12):
        fill(tmp_path, f"plain/{number}/1.png", f"padded/{number:02d}/1.png", f"named/c{number}/1.png")
    plain, padded, named = (FolderSource(tmp_path / kind, 8).class_names for kind in ("plain", "padded", "named"))
    assert list(map(int, plain)) == list(map(int, padded)) == [int(name[1:]) for name in named] == list(range(12))


def test_folders_of_folders_are_said(tmp_path):
    (text,) = notes(FolderSource(fill(tmp_path, "images/cat/1.png", "images/dog/1.png"), 8))
    assert f"are of class images (did you mean {tmp_path / 'images'}?)" in text


def test_tar_files_and_images_do_not_mix(tmp_path):
    fill(tmp_path, "a/1.png", z__tar="")
    for make in (lambda: open_source(str(tmp_path), 8), lambda: FolderSource(tmp_path, 8)):
        with pytest.raises(InputError, match="images .a/1.png.|tar files .z.tar."):
            make()


def rows(*found):
    return "".join(json.dumps(row) + "\n" for row in found)


def test_metadata_gives_labels_and_captions(tmp_path):
    lines = rows(
        {"file_name": "1.png", "text": "one", "label": "dog"},
        {"file_name": "sub/2.png", "text": "two", "label": "cat"},
        {"file_name": "gone.png", "text": "three", "label": "cat"},
        {"file_name": "1.png", "text": "again", "label": "cat"},
        {"file_name": "4.png", "text": "four"},
    )
    fill(tmp_path, "1.png", "sub/2.png", "3.png", "4.png", metadata__jsonl="\ufeff" + lines + "junk\n")
    source = FolderSource(tmp_path, 8, captions=("text",))
    assert source.class_names == ("cat", "dog")
    assert [(e.key, e.label, e.captions) for e in map(source.__getitem__, range(len(source)))] == [
        ("1.png", 1, ("one",)),
        ("sub/2.png", 0, ("two",)),
    ]
    assert [(key, reason.partition(": ")[2]) for key, reason in source.unusable] == [
        ("metadata.jsonl, line 3", "gone.png is not there, or no image"),
        ("metadata.jsonl, line 4", "1.png is named twice; the first row is taken"),
        ("metadata.jsonl, line 6", "is no row with a file_name"),
        ("3.png", "metadata.jsonl does not name it"),
        ("4.png", "its row of metadata has no label, as others have"),
    ]


def test_metadata_in_csv_with_numbers_as_labels(tmp_path):
    table = 'file_name,label,text\n1.png,10,"a, b"\n2.png,2,c\n'
    source = FolderSource(fill(tmp_path, "1.png", "2.png", metadata__csv=table), 8, captions=("text",))
    assert source.class_names == tuple(map(str, range(11)))
    assert [(source[i].label, source[i].captions) for i in range(2)] == [(10, ("a, b",)), (2, ("c",))]


def test_metadata_without_labels_has_one_class(tmp_path):
    lines = rows(*({"file_name": f"{kind}/1.png", "text": kind} for kind in ("cat", "dog")))
    source = FolderSource(fill(tmp_path, "cat/1.png", "dog/1.png", metadata__jsonl=lines), 8, captions=("text",))
    assert source.class_names == ("all",) and source[1].captions == ("dog",)
    assert "no column label: all images are of one class" in notes(source)[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata__csv": "a,b\n1,2\n"}, "has no column file_name: it has a, b"),
        ({"metadata__csv": "file_name\n", "metadata__jsonl": ""}, "there is another one of"),
        ({"metadata__parquet": ""}, "metadata.parquet is not read: possible: metadata.jsonl or metadata.csv"),
        ({"metadata__jsonl": ""}, "its metadata names no image that is there"),
    ],
)
def test_metadata_that_is_none(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        FolderSource(fill(tmp_path, "1.png", **files), 8)
