import itertools
import json
import pickle

import fsspec
import numpy as np
import pytest

from lpl_jax import text
from lpl_jax.data import LatentStore, TextOptions, WebDatasetSource, batches, open_source, write_store
from lpl_jax.data.examples import Skipped
from lpl_jax.data.webdataset import expand
from lpl_jax.errors import InputError


def load(source):
    """The examples of a source, and the reasons for those that it does not give."""
    found, refused = [], []
    for unit in source.units():
        for item in unit.items():
            if isinstance(item, Skipped):
                refused.append((unit.name, item.key, item.reason))
                continue
            try:
                found.append(item.load())
            except InputError as error:
                refused.append((unit.name, item.key, str(error)))
    return found, refused


def folder_of(path, **tars):
    for name, content in tars.items():
        (path / f"{name}.tar").write_bytes(content)
    return path


def test_images_and_captions_come_in_the_order_of_the_shards(shards):
    source = WebDatasetSource(str(shards), 24, captions=("txt", "caption", "recaptions.0"))
    examples, refused = load(source)
    assert not refused and [unit.name for unit in source.units()] == ["00000.tar", "00001.tar", "00002.tar"]
    keys = [f"{shard:05d}{i:04d}" for shard in range(3) for i in range(4)]
    assert [example.key for example in examples] == [f"{key[:5]}/{key}" for key in keys]
    assert [e.captions for e in examples] == [(f"photo {k}", f"photo {k}", f"a long text on {k}") for k in keys]
    assert all(e.image.shape == (24, 24, 3) and e.label == 0 for e in examples)
    assert examples[0].control.tolist() == [[30, 40, 0, 4]] * 2
    assert source.class_names == ("all",) and "3 tar files, captions txt, caption, recaptions.0" in source.description
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(load(copy)[0][5].image, examples[5].image)


def test_places(shards, tmp_path, monkeypatch):
    """A file, a pattern, a range, a folder: paths and URLs."""
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{0..1}/{0..1}.tar") == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]
    memory = fsspec.filesystem("memory")
    for tar in shards.iterdir():
        memory.pipe(f"/bucket/cc/{tar.name}", tar.read_bytes())
    for spec, count in [
        (f"{shards}/00001.tar", 1),
        (f"{shards}/*.tar", 3),
        (f"{shards}/{{00001..00002}}.tar", 2),
        ("memory://bucket/cc", 3),
        ("memory://bucket/cc/*2.tar", 1),
        ("memory://bucket/cc/{00000..00001}.tar", 2),
        (f"file://{shards}/{{00000..00002}}.tar", 3),
    ]:
        source = open_source(spec, 24)
        assert isinstance(source, WebDatasetSource) and len(source.urls) == count
        assert len(load(source)[0]) == 4 * count, spec
    places = str(shards), "memory://bucket/cc", f"{shards}/*.tar"
    prints = [open_source(spec, 24, identity="content").fingerprint for spec in places]
    assert len(set(prints)) == 1, "the same files elsewhere are the same source"


def test_tar_files_of_one_name_keep_their_images_apart(tmp_path, tars):
    for part in ("train", "more"):
        (tmp_path / part).mkdir()
        folder_of(tmp_path / part, **{"00000": tars.of(tars.sample("0"))})
    source = WebDatasetSource(f"{tmp_path}/*/00000.tar", 24)
    assert [example.key for example in load(source)[0]] == ["more/00000/0", "train/00000/0"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{shards}/{{00001..00003}}.tar", "00003.tar is missing"),
        ("{shards}/nothing-*.tar", "no tar file there"),
        ("memory://bucket/none", "no tar file there"),
        ("{shards}/{{3..1}}.tar", "counts down"),
        ("nonsense://x/1.tar", r"nonsense.*lpl_jax\[remote\]"),
    ],
)
def test_places_where_nothing_is(shards, spec, message):
    with pytest.raises(InputError, match=message):
        open_source(spec.format(shards=shards), 24)


def test_fingerprints_tell_sources_apart(shards):
    others = [{}, {"captions": ()}, {"captions": ("caption",)}, {"crop": "random_crop"}, {"limit": 3}]
    prints = [WebDatasetSource(str(shards), 24, **options).fingerprint for options in others]
    prints += [
        WebDatasetSource(str(shards), 16).fingerprint,
        WebDatasetSource(f"{shards}/0000[01].tar", 24).fingerprint,
    ]
    assert len(set(prints)) == 7


def test_limit_takes_the_first_of_every_shard(shards):
    examples, _ = load(WebDatasetSource(str(shards), 24, limit=5))
    assert [e.key[-9:] for e in examples] == ["000000000", "000000001", "000010000", "000010001", "000020000"]
    with pytest.raises(InputError, match="limit=0"):
        WebDatasetSource(str(shards), 24, limit=0)


def test_random_crops_follow_the_key_alone(shards):
    whole = load(WebDatasetSource(str(shards), 16, crop="random_crop"))[0]
    alone = load(WebDatasetSource(f"{shards}/00002.tar", 16, crop="random_crop"))[0]
    for a, b in zip(whole[8:], alone, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    assert len({tuple(e.control[0]) for e in whole}) > 6


def test_what_cannot_be_used_says_why(tmp_path, tars):
    bad = tars.sample("4")
    members = [
        *tars.sample("0"),
        ("1.jpg", b"no image"), ("1.txt", b"text"),
        ("2.txt", b"no image at all"),
        *tars.sample("3", caption=" \n"),
        *bad[:2],  # without its text
        ("5.jpg", bad[0][1][:300]), ("5.txt", b"cut short"),
        ("__MACOSX/notes", b""), ("README.md", b"passed over"),
        *tars.sample("6"),
    ]  # fmt: skip
    found, refused = load(WebDatasetSource(str(folder_of(tmp_path, a=tars.of(members))), 24))
    assert [e.key for e in found] == ["a/0", "a/6"]
    reasons = {key: reason for _, key, reason in refused}
    assert list(reasons) == ["a/1", "a/2", "a/3", "a/4", "a/5"]
    for key, part in zip(
        reasons,
        ("not an image", "has no image", "caption 'txt' is empty", "no caption 'txt'", "cannot be read"),
        strict=True,
    ):
        assert part in reasons[key] and key in reasons[key]
    broken = tars.of([("0.jpg", bad[0][1]), ("0.json", b"{")])
    source = WebDatasetSource(str(folder_of(tmp_path, a=broken)), 24, captions=("caption",))
    assert "json cannot be read" in load(source)[1][0][2]


@pytest.mark.parametrize("damage", ["in an image", "in a header", "between files", "a changed header"])
def test_a_tar_cut_short_is_said_after_its_images(tmp_path, tars, damage):
    whole = [m for i in range(3) for m in tars.sample(str(i), seed=i)]
    content = tars.of(whole, end=False)
    third = content.index(whole[6][1])  # the third image; a header of 512 bytes stands in front of it
    if damage == "a changed header":
        content = content[: third - 400] + b"\xff" + content[third - 399 :]
    else:
        end = {"in an image": third + 100, "in a header": third - 100, "between files": len(content)}[damage]
        content = content[:end]
    found, refused = load(WebDatasetSource(str(folder_of(tmp_path, a=content)), 24))
    assert [e.key for e in found] == [f"a/{i}" for i in range(3 if damage == "between files" else 2)]
    assert [(unit, key) for unit, key, _ in refused] == [("a.tar", "a.tar")]
    assert f"cut short after {len(found)} images" in refused[0][2]


def test_an_error_of_the_network_is_no_damage(shards, monkeypatch):
    """It must not end up in a report as images that do not exist."""

    class Flaky:
        def __init__(self, file):
            self._file, self._left = file, 1

        def read(self, size):
            self._left -= 1
            if self._left < 0:
                raise OSError("connection reset")
            return self._file.read(size)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    source = WebDatasetSource(f"file://{shards}/*.tar", 24)
    monkeypatch.setattr("lpl_jax.data.webdataset._open", lambda url: Flaky(fsspec.open(url, "rb").open()))
    with pytest.raises(OSError, match="connection reset"):
        load(source)


def test_a_store_of_captions(text_store, shards):
    source = WebDatasetSource(str(shards), 24, captions=("txt", "recaptions.0"))
    info = text_store.manifest.text
    assert (info.tokenizer, info.length, info.columns) == ("bundled", 9, ("txt", "recaptions.0"))
    tokenizer = text.load_tokenizer("bundled")
    assert info.fingerprint == tokenizer.fingerprint and info.vocab_size == tokenizer.vocab_size
    assert [shard.records for shard in text_store.manifest.shards] == [4, 4, 4], "a file of each tar"
    for record, example in zip(text_store, load(source)[0], strict=True):
        assert record.key == example.key and record.captions == example.captions
        assert record.tokens.shape == (2, 9) and record.tokens.dtype == np.int32
        np.testing.assert_array_equal(record.tokens, tokenizer(example.captions, 9))
    assert LatentStore(text_store.path).manifest == text_store.manifest


def spoilt(path, tars):
    """Two tar files: one image does not decode, one caption is missing, and the second file is cut short."""
    first = [*tars.sample("0"), ("1.jpg", b"no image"), ("1.txt", b"text"), *tars.sample("2")]
    second = tars.of([*tars.sample("3", seed=3), *tars.sample("4"), *tars.sample("5")])
    return folder_of(path, a=tars.of(first), b=second[: len(second) // 2])


def test_skipped_images_are_reported(tmp_path, tars, autoencoder):
    (tmp_path / "tars").mkdir()
    source = WebDatasetSource(str(spoilt(tmp_path / "tars", tars)), 24)
    told = []
    options = dict(batch_size=8, max_skipped=2, on_skipped=told.append)
    store = write_store(tmp_path / "store", source, autoencoder, **options)
    assert [record.key for record in store] == ["a/0", "a/2", "b/3", "b/4"]
    report = json.loads((tmp_path / "store/report.json").read_text())
    assert (report["records"], report["skipped"], store.manifest.skipped) == (4, 2, 2)
    listed = report["skipped_images"]
    assert [(entry["key"], entry["unit"]) for entry in listed] == [("a/1", "a.tar"), ("b.tar", "b.tar")]
    assert "not an image" in listed[0]["reason"] and "cut short after" in listed[1]["reason"]
    assert [entry.key for entry in told] == ["a/1", "b.tar"]
    assert report["shards"] == [shard._asdict() for shard in store.manifest.shards]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, "a/1: not an image that can be read as .*max_skipped"),
        (1, "2 of . images cannot be used, more than max_skipped=1.*b.tar: .*cut short"),
        (0.1, "2 of 6 images cannot be used, more than max_skipped=0.1"),
        (None, "2 of 6 images cannot be used, more than max_skipped=0.01"),
    ],
)
def test_too_many_skipped_images_end_the_write(tmp_path, tars, autoencoder, limit, message):
    (tmp_path / "tars").mkdir()
    source = WebDatasetSource(str(spoilt(tmp_path / "tars", tars)), 24)
    with pytest.raises(InputError, match=message):
        write_store(tmp_path / "store", source, autoencoder, batch_size=8, max_skipped=limit)
    with pytest.raises(InputError):
        LatentStore(tmp_path / "store")


def test_a_shard_without_a_usable_image(tmp_path, tars, autoencoder):
    (tmp_path / "tars").mkdir()
    content = {"a": tars.of(tars.sample("0")), "b": tars.of([("1.txt", b"text")]), "c": tars.of(tars.sample("2"))}
    source = WebDatasetSource(str(folder_of(tmp_path / "tars", **content)), 24)
    store = write_store(tmp_path / "store", source, autoencoder, batch_size=8, max_skipped=1)
    assert [record.key for record in store] == ["a/0", "c/2"] and len(store.manifest.shards) == 2
    only = WebDatasetSource(str(tmp_path / "tars/b.tar"), 24)
    with pytest.raises(InputError, match="nothing to encode, 1 images were skipped; 1 has no image.*, such as b/1"):
        write_store(tmp_path / "empty", only, autoencoder, batch_size=8, max_skipped=1)
    assert not (tmp_path / "empty").exists()  # a corrected call finds nothing in its way


@pytest.mark.shared
def test_the_captioned_photographs(shared):
    source = WebDatasetSource(f"{shared}/data/captions/{{00000..00001}}.tar", 64, captions=("txt", "captions.1"))
    for unit in source.units():
        for item in itertools.islice(unit.items(), 3):
            example = item.load()
            assert example.image.std() > 5 and len(set(example.captions)) == 2
    assert sum(1 for unit in source.units() for _ in unit.items()) == 320


def test_outputs_of_a_text_tower_can_be_kept(tmp_path, shards, autoencoder):
    source = WebDatasetSource(f"{shards}/00000.tar", 24, captions=("txt", "recaptions.0"))
    clip, tokenizer = text.load("bundled", tower="text"), text.load_tokenizer("bundled")
    options = TextOptions(length=9, encoder="bundled", layer="penultimate")
    store = write_store(tmp_path / "store", source, autoencoder, batch_size=8, text=options)
    info = store.manifest.text
    assert (info.encoder, info.layer, info.hidden_dim, info.pooled_dim) == ("bundled", "penultimate", 128, 128)
    captions = [caption for record in store for caption in record.captions]
    features = clip.encode_text(tokenizer(captions, 9))
    hidden = np.stack([record.text_hidden for record in store]).reshape(-1, 9, 128)
    pooled = np.stack([record.text_pooled for record in store]).reshape(-1, 128)
    assert hidden.dtype == pooled.dtype == np.float16
    np.testing.assert_allclose(hidden, features.penultimate, rtol=2**-10, atol=1e-4)
    np.testing.assert_allclose(pooled, features.pooled, rtol=2**-10, atol=1e-4)
    batch = next(batches(store, batch_size=4, seed=0, text=True, second_caption=1.0, with_index=True))
    assert batch["text_hidden"].shape == (4, 9, 128) and batch["text_hidden"].dtype == np.float16
    for row, index in enumerate(batch["index"]):
        np.testing.assert_array_equal(batch["text_hidden"][row], store[index].text_hidden[1])
        np.testing.assert_array_equal(batch["text_pooled"][row], store[index].text_pooled[1])
    with pytest.raises(InputError, match="another latent store .text"):
        write_store(store.path, source, autoencoder, text=TextOptions(length=9, encoder="bundled"))
    with pytest.raises(InputError, match="takes 77 tokens"):
        write_store(tmp_path / "long", source, autoencoder, text=TextOptions(length=78, encoder="bundled"))
    with pytest.raises(InputError, match="layer='first': possible are last, penultimate"):
        TextOptions(layer="first")
