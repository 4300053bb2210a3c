import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from lpl_jax.data import FolderSource, PhotoSource, Subset, TFDSSource, open_source
from lpl_jax.data.sources import PHOTOS
from lpl_jax.errors import InputError


def test_folder_labels_follow_the_sorted_class_names(image_folder):
    source = FolderSource(image_folder, 16)
    assert source.class_names == ("ant", "bee") and len(source) == 11
    examples = [source[i] for i in range(11)]
    assert [e.key for e in examples[:6]] == [
        "ant/01.png",
        "ant/03.png",
        "ant/05.png",
        "ant/07.png",
        "ant/09.png",
        "bee/00.png",
    ]
    assert [e.label for e in examples] == [0] * 5 + [1] * 6
    assert all(e.image.shape == (16, 16, 3) and e.image.dtype == np.uint8 for e in examples)
    with pytest.raises(IndexError):
        source[11]
    # ant/01.png has 30 x 50 pixels, resized to 16 x 27; bee/00.png 41 x 30, resized to 22 x 16
    assert examples[0].control.tolist() == [[50, 30, 5, 0]] * 2
    assert examples[5].control.tolist() == [[30, 41, 0, 3]] * 2


def test_folder_passes_over_other_files_and_takes_subfolders(tmp_path):
    for name in ("a/one.JPEG", "a/deep/two.jpg", "a/.hidden.jpg", ".cache/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("")
    (tmp_path / "classes.txt").write_text("")
    source = FolderSource(tmp_path, 8)
    assert [source[i].key for i in range(len(source))] == ["a/deep/two.jpg", "a/one.JPEG"]


def test_images_in_the_folder_itself_are_one_class(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("no image")
    source = FolderSource(tmp_path, 8)
    assert source.class_names == ("all",) and [source[i].key for i in range(len(source))] == ["a.JPG", "b.png"]
    assert source[0].label == source[1].label == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "notes/c.png")
    with pytest.raises(InputError, match="holds images .a.JPG. and folders of images .notes."):
        FolderSource(tmp_path, 8)


def test_captions_lie_beside_the_images(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(" a cat on a mat \n")
    (tmp_path / "a.json").write_text('{"texts": ["one", {"long": "two"}]}')
    (tmp_path / "b.txt").write_text(" ")
    source = FolderSource(tmp_path, 8, captions=("txt", "texts.0", "texts.1.long"))
    assert source[0].captions == ("a cat on a mat", "one", "two")
    assert FolderSource(tmp_path, 8)[1].captions == ()
    plain = FolderSource(tmp_path, 8, captions=("txt",))
    for index, message in [(1, "b.png: its caption 'txt' is empty"), (2, "c.png: has no caption 'txt'")]:
        with pytest.raises(InputError, match=message):
            plain[index]
    assert len({FolderSource(tmp_path, 8, captions=c).fingerprint for c in [(), ("txt",), ("x",)]}) == 3
    with pytest.raises(InputError, match="give each its own name"):
        FolderSource(tmp_path, 8, captions=("txt", "txt"))


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        FolderSource(tmp_path / "nowhere", 8)
    with pytest.raises(InputError, match="no class folders and no images"):
        FolderSource(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: has no images"):
        FolderSource(tmp_path, 8)
    (tmp_path / "empty/broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="empty/broken.jpg"):
        FolderSource(tmp_path, 8)[0]


def test_fingerprints_tell_sources_apart(image_folder):
    def same():
        return FolderSource(image_folder, 16)

    others = [
        FolderSource(image_folder, 24),
        FolderSource(image_folder, 16, crop="center_crop"),
        Subset(same(), 5, 0),
        Subset(same(), 5, 1),
        PhotoSource(16, crops=2),
        PhotoSource(16, crops=3),
        PhotoSource(16, crops=2, seed=1),
    ]
    prints = [source.fingerprint for source in [same(), *others]]
    assert len(set(prints)) == len(prints) and same().fingerprint == prints[0]


def test_photos_are_crops_of_eight_different_photographs():
    source = PhotoSource(32, crops=3)
    assert len(source) == 24 and source.class_names == tuple(PHOTOS)
    examples = [source[i] for i in range(len(source))]
    assert [e.label for e in examples] == list(range(8)) * 3
    assert len({e.key for e in examples}) == 24
    pixels = np.stack([e.image for e in examples]).astype(float)
    assert pixels.shape == (24, 32, 32, 3) and pixels.std(axis=(1, 2)).min() > 3, "no crop is one flat colour"
    colours = pixels.reshape(3, 8, -1, 3).mean(axis=2)
    between, within = colours.mean(axis=0).std(axis=0), colours.std(axis=0).mean(axis=0)
    assert (between > 3 * within).all(), "a photograph stays recognisable by its colours"
    with pytest.raises(IndexError):
        source[24]


def test_photos_are_a_function_of_seed_and_index():
    first, again, other = PhotoSource(32, crops=2), PhotoSource(32, crops=4), PhotoSource(32, crops=2, seed=1)
    for i in (3, 11):
        np.testing.assert_array_equal(first[i].image, again[i].image)
        assert (first[i].image != other[i].image).any()
    assert (first[3].image != first[11].image).any()
    cat, again = first[1].control, first[9].control
    assert cat[:, :2].tolist() == again[:, :2].tolist() == [[300, 451]] * 2
    assert (cat[:, 2:] != again[:, 2:]).any(), "another crop of the same photograph lies elsewhere"


def test_sources_can_be_pickled(image_folder):
    for source in (FolderSource(image_folder, 16), PhotoSource(16, crops=1)):
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(copy[4].image, source[4].image)


def test_subset_draws_without_repetition(image_folder):
    source = FolderSource(image_folder, 16)
    part = Subset(source, 6, seed=3)
    keys = [part[i].key for i in range(len(part))]
    assert len(set(keys)) == 6 and keys == sorted(keys)
    assert keys != [source[i].key for i in range(6)], "drawn from the whole source, not its first images"
    assert len(Subset(source, 100)) == 11
    with pytest.raises(InputError, match="limit=0"):
        Subset(source, 0)


def test_open_source_by_name(image_folder):
    assert isinstance(open_source("photos", 16, crops=2), PhotoSource)
    assert len(open_source("photos", 16, crops=2)) == 16
    assert len(open_source(str(image_folder), 16, limit=3)) == 3
    assert open_source(str(image_folder), 8, crop="center_crop").crop.rule == "center_crop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "photos", "split": "train"}, "split=train with source photos: only source tfds:NAME"),
        ({"spec": "photos", "crop": "center_crop"}, "possible is random_crop"),
        ({"spec": "photos", "crops": 0}, "crops=0"),
        ({"spec": "some/folder", "crops": 4}, "crops=4 with source some/folder: only source photos"),
        ({"spec": "tfds:mnist", "crops": 4}, "crops=4"),
    ],
)
def test_open_source_refuses_contradictions(options, message):
    with pytest.raises(InputError, match=message):
        open_source(resolution=16, **options)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Data sets as `tfds build --file_format=array_record` leaves them, written without TensorFlow: one with labels,
    one with a caption, and one with a list of captions."""
    tfds = pytest.importorskip("tensorflow_datasets")
    kinds = tfds.features
    root = tmp_path_factory.mktemp("tfds")
    labels = kinds.ClassLabel(names=["cat", "dog"])
    write_tfds(root, "mini_photos", kinds.FeaturesDict({"image": kinds.Image(), "label": labels}), label=[0, 1, 0])
    captions = [[b"a cat"], [b"a dog "], [b" "]]
    write_tfds(root, "mini_captions", kinds.FeaturesDict({"image": kinds.Image(), "text": kinds.Text()}), text=captions)
    several = kinds.FeaturesDict({"image": kinds.Image(), "texts": kinds.Sequence(kinds.Text())})
    write_tfds(root, "mini_lists", several, texts=[[b"one", b"two"], [b"three"], []])
    return root


def write_tfds(root, name, features, **values):
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    features.save_config(str(folder))
    writer = ArrayRecordWriter(str(folder / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    ((key, rows),) = values.items()
    for i in range(3):
        encoded = io.BytesIO()
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(encoded, "PNG")
        writer.write(tf_example(image=[encoded.getvalue()], **{key: rows[i]}))
    writer.close()
    split = {"name": "train", "shardLengths": ["3"], "numBytes": "1000"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def tf_example(**features) -> bytes:
    """A serialised tf.train.Example of lists of bytes and of integers, in protocol buffer wire format."""

    def varint(value):
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    def field(number, payload):
        return bytes([number << 3 | 2]) + varint(len(payload)) + payload

    def feature(value):
        if isinstance(value, int):
            return field(3, field(1, varint(value)))
        return field(1, b"".join(field(1, item) for item in value))

    entries = (field(1, field(1, name.encode()) + field(2, feature(value))) for name, value in features.items())
    return field(1, b"".join(entries))


@pytest.mark.parametrize("identity", ["times", "content"])
def test_a_tfds_data_set_is_its_content(tfds_folder, tmp_path, identity):
    shutil.copytree(tfds_folder, tmp_path / "copy", copy_function=shutil.copy2)

    def seen(root):
        return TFDSSource("mini_photos", 16, data_dir=root, identity=identity).fingerprint

    assert seen(tmp_path / "copy") == seen(tfds_folder), "a copy that keeps times"
    (shard,) = (tmp_path / "copy/mini_photos/1.0.0").glob("*-00000-of-00001")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert seen(tmp_path / "copy") != seen(tfds_folder)


def test_tfds_is_read_without_tensorflow(tfds_folder):
    had_tensorflow = "tensorflow" in sys.modules
    source = TFDSSource("mini_photos", 16, data_dir=tfds_folder)
    assert len(source) == 3 and source.class_names == ("cat", "dog")
    examples = [source[i] for i in range(3)]
    assert [e.label for e in examples] == [0, 1, 0]
    assert [int(e.image[0, 0, 0]) for e in examples] == [0, 40, 80] and examples[0].image.shape == (16, 16, 3)
    assert examples[2].key == "mini_photos/train/2"
    assert examples[2].control.tolist() == [[20, 30, 0, 4]] * 2, "20 x 30 pixels, resized to 16 x 24"
    assert ("tensorflow" in sys.modules) == had_tensorflow
    assert len(open_source("tfds:mini_photos", 16, data_dir=str(tfds_folder), split="train[:2]")) == 2


def test_tfds_captions(tfds_folder):
    options = dict(data_dir=str(tfds_folder))
    source = open_source("tfds:mini_captions", 16, captions=("text",), **options)
    assert source.class_names == ("all",) and [source[i].captions for i in range(2)] == [("a cat",), ("a dog",)]
    with pytest.raises(InputError, match="mini_captions/train/2: its caption 'text' is empty"):
        source[2]
    lists = open_source("tfds:mini_lists", 16, captions=("texts",), **options)
    assert [lists[i].captions for i in range(2)] == [("one",), ("three",)]
    with pytest.raises(InputError, match="mini_lists/train/2: feature 'texts' holds no text"):
        lists[2]
    labelled = open_source("tfds:mini_photos", 16, **options)
    assert labelled.class_names == ("cat", "dog") and labelled.caption_columns == ()
    with pytest.raises(InputError, match="no feature 'words'; possible: .*text"):
        open_source("tfds:mini_captions", 16, captions=("words",), **options)
    with pytest.raises(InputError, match="no feature 'label'"):
        open_source("tfds:mini_captions", 16, **options)


def test_tfds_mistakes_are_named(tfds_folder):
    with pytest.raises(InputError, match="'nothing_here'.*tfds build nothing_here"):
        TFDSSource("nothing_here", 16, data_dir=tfds_folder)
    with pytest.raises(InputError, match="'mini_photos', split 'test'"):
        TFDSSource("mini_photos", 16, split="test", data_dir=tfds_folder)
    with pytest.raises(InputError, match="no feature 'picture'; possible: .*image"):
        TFDSSource("mini_photos", 16, image_key="picture", data_dir=tfds_folder)
    with pytest.raises(InputError, match="'image' is not a class label"):
        TFDSSource("mini_photos", 16, label_key="image", data_dir=tfds_folder)


def test_missing_tfds_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"lpl_jax\[tfds\]"):
        TFDSSource("mini_photos", 16)


@pytest.mark.shared
def test_imagenet_sample(shared):
    folder = shared / "data/imagenet1k-sample/train"
    source = FolderSource(folder, 256)
    assert len(source) == 1000 and source.class_names[217] == "n02102040"
    part = Subset(source, 20)
    for i in range(20):
        example = part[i]
        assert example.image.shape == (256, 256, 3) and example.image.std() > 5
        assert example.key.split("/")[0] == source.class_names[example.label]
