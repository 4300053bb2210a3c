import hashlib
import json
import pickle
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from lpl_jax.data import FolderSource, LatentStore, Subset, check_autoencoder, write_store, writer
from lpl_jax.data.encode import encode, encode_flips
from lpl_jax.data.examples import work_units
from lpl_jax.data.reading import load_units
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint


@pytest.fixture
def damaged(store, tmp_path):
    """A copy of the store, to be spoilt."""
    return shutil.copytree(store.path, tmp_path / "copy")


def encoded(source, autoencoder, batch_size, records=100):
    loaded = load_units(enumerate(work_units(source, records)), threads=2, ahead=4)
    return list(encode(loaded, autoencoder, batch_size=batch_size, dtype="float32"))


@pytest.fixture(scope="module")
def direct(image_folder, autoencoder):
    """The moments (11, 2, 2, 3, 3, 4) of the 11 images and their mirror images, straight from `encode`."""
    source = FolderSource(image_folder, 24)
    images = np.stack([source[i].image for i in range(11)])
    both = np.concatenate([images, images[:, :, ::-1]]).astype(np.float32) / 127.5 - 1
    mean, logvar = jax.jit(lambda model, x: model.encode(x))(autoencoder, both)
    return np.stack([mean, logvar], axis=1).reshape(2, 11, 2, 3, 3, 4).swapaxes(0, 1)


def test_store_holds_what_the_autoencoder_gives(store, image_folder, direct):
    source = FolderSource(image_folder, 24)
    assert len(store) == len(source) == 11
    for i in range(11):
        record, example = store[i], source[i]
        assert (record.label, record.key) == (example.label, example.key)
        assert record.mean.shape == record.logvar.shape == (2, 3, 3, 4) and record.mean.dtype == np.float16
        # float16 rounds to 11 significant bits: half a unit in the last place is 2^-12 to 2^-11 of the value. The 1e-5
        # is for float32 sums in another order.
        np.testing.assert_allclose(record.mean, direct[i, :, 0], rtol=2**-11, atol=1e-5)
        np.testing.assert_allclose(record.logvar, direct[i, :, 1], rtol=2**-11, atol=1e-5)
        assert record.control.shape == (2, 4) and record.control.dtype == np.int32
        np.testing.assert_array_equal(record.control, example.control)
    # bee/00.png: 41 x 30 pixels, resized to 33 x 24, of which 24 are kept
    assert store[5].control.tolist() == [[30, 41, 0, 4], [30, 41, 0, 5]]
    spread = np.abs(direct[:, 0] - direct[:, 1]).max()
    assert spread > 0.01, "the mirror image is another image, so a swap of the two would have been seen"


def test_float32_store_is_exact(tmp_path, image_folder, autoencoder, direct):
    source = FolderSource(image_folder, 24)
    store = write_store(tmp_path / "exact", source, autoencoder, batch_size=8, dtype="float32")
    stored = np.stack([[store[i].mean, store[i].logvar] for i in range(11)]).swapaxes(1, 2)
    assert stored.dtype == np.float32
    batches = encoded(source, autoencoder, batch_size=8)
    np.testing.assert_array_equal(stored, np.concatenate([batch.moments for batch in batches]))
    np.testing.assert_allclose(stored, direct, atol=1e-5)


def test_padding_and_batch_size_change_nothing(image_folder, autoencoder, direct):
    """A batch size that the eight devices do not divide is rounded up; the last batch comes out unpadded."""
    source = FolderSource(image_folder, 24)
    parts = encoded(source, autoencoder, batch_size=5)
    assert [len(part.examples) for part in parts] == [8, 3] == [len(part.moments) for part in parts]
    np.testing.assert_allclose(np.concatenate([part.moments for part in parts]), direct, atol=1e-5)


def test_batches_are_filled_across_units(image_folder, autoencoder):
    """Four units of three images: one full batch and three images, each unit's end behind its last image."""
    parts = encoded(FolderSource(image_folder, 24), autoencoder, batch_size=8, records=3)
    assert [len(part.examples) for part in parts] == [8, 3]
    order = [(unit, what is None) for part in parts for unit, what in part.loaded]
    assert order == [(unit, last) for unit in range(4) for last in [False] * (3 if unit < 3 else 2) + [True]]


def test_manifest_says_what_was_done(store, autoencoder):
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert manifest["autoencoder"] == "tiny" and manifest["weights_hash"] == fingerprint(autoencoder.params)
    assert (manifest["scaling_factor"], manifest["shift_factor"]) == (0.5, 0.0)
    assert (manifest["latent_channels"], manifest["downsample"]) == (4, 8)
    assert (manifest["resolution"], manifest["crop"]) == (24, "resize_center_crop")
    assert manifest["flips"] is True and manifest["dtype"] == "float16"
    assert manifest["num_records"] == 11 and manifest["num_classes"] == 2
    assert manifest["class_names"] == ["ant", "bee"] and "11 images of 2 classes" in manifest["source"]
    assert [shard["records"] for shard in manifest["shards"]] == [4, 4, 3]
    files = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    assert list(files)[1] == "latents-00001-of-00003.array_record"
    on_disk = {file.name: file.stat().st_size for file in store.path.glob("latents-*")}
    assert [shard["sha256"] for shard in manifest["shards"]] == [
        hashlib.sha256((store.path / name).read_bytes()).hexdigest() for name in files
    ]
    assert files == on_disk and manifest["num_bytes"] == sum(files.values())
    assert store.manifest.latent_shape == (3, 3, 4)


def test_store_can_be_pickled(store):
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy[9].mean, store[9].mean)
    with pytest.raises(IndexError, match="record 11 of a store of 11"):
        copy[11]


def test_writing_the_same_store_again_opens_it(store, image_folder, autoencoder):
    before = {file.name: file.stat().st_mtime_ns for file in store.path.iterdir()}
    source = FolderSource(image_folder, 24)
    again = write_store(store.path, source, autoencoder, on_progress=lambda n: pytest.fail("encoded again"))
    assert len(again) == 11
    assert {file.name: file.stat().st_mtime_ns for file in store.path.iterdir()} == before


def test_another_store_is_never_written_over(store, image_folder, autoencoder, other_autoencoder):
    before = (store.path / "manifest.json").read_bytes()
    source = FolderSource(image_folder, 24)
    for args, message in [
        ((source, other_autoencoder), "another latent store .autoencoder tiny, not other"),
        ((FolderSource(image_folder, 16), autoencoder), "resolution 24, not 16"),
        ((FolderSource(image_folder, 24, crop="center_crop"), autoencoder), "crop resize_center_crop, not center_crop"),
        ((Subset(source, 5), autoencoder), "source folder .*not 5 of folder"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            write_store(store.path, *args)
        assert str(store.path) in str(caught.value)
    assert (store.path / "manifest.json").read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(tmp_path, image_folder, autoencoder):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="other files .thesis.tex"):
        write_store(tmp_path, FolderSource(image_folder, 24), autoencoder)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


class Damaged(FolderSource):
    """Its ninth image cannot be read."""

    def __getitem__(self, index):
        if index == 8:
            raise InputError("bee/08.png: image cannot be read (cut short)")
        return super().__getitem__(index)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_write_that_fails_keeps_what_is_finished(tmp_path, image_folder, autoencoder, store):
    """The ninth image is in the third of four shards: two are kept, and are not made again."""
    progress = []
    options = dict(batch_size=8, shard_records=3, on_progress=progress.append)
    with pytest.raises(InputError, match="bee/08.png"):
        write_store(tmp_path, Damaged(image_folder, 24), autoencoder, **options)
    kept = ["latents-00000-of-00004", "latents-00001-of-00004"]
    assert names(tmp_path) == [f"{name}.{end}" for name in kept for end in ("array_record", "json")] + ["plan.json"]
    progress.clear()
    finished = write_store(tmp_path, FolderSource(image_folder, 24), autoencoder, **options)
    assert progress == [0, 5] and names(tmp_path) == sorted(
        [*(shard.file for shard in finished.manifest.shards), "manifest.json", "report.json"]
    )
    assert_same_records(finished, store)


def test_a_write_that_finishes_nothing_leaves_no_file(tmp_path, image_folder, autoencoder):
    with pytest.raises(InputError, match="bee/08.png"):
        write_store(tmp_path, Damaged(image_folder, 24), autoencoder, batch_size=8)
    assert names(tmp_path) == []


def test_an_interrupted_write_removes_only_its_partial_file(tmp_path, image_folder, autoencoder):
    """Ctrl-C when 8 of 11 images are written: the first shard is full, the second has two."""
    found = []

    def interrupt(images):
        if images == 8:
            found.extend(names(tmp_path))
            raise KeyboardInterrupt

    source = FolderSource(image_folder, 24)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, source, autoencoder, batch_size=8, shard_records=6, on_progress=interrupt)
    kept = ["latents-00000-of-00002.array_record", "latents-00000-of-00002.json", "plan.json"]
    assert found == [".lock", *kept[:2], "latents-00001-of-00002.array_record.0.partial", kept[2]]
    assert names(tmp_path) == kept


def test_what_a_kill_has_left_behind_the_manifest_is_removed_by_the_next_call(
    tmp_path, image_folder, autoencoder, monkeypatch
):
    options = dict(batch_size=8, shard_records=6)
    source = FolderSource(image_folder, 24)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_remove_plan", lambda folder: None)
        write_store(tmp_path, source, autoencoder, **options)
    assert "plan.json" in names(tmp_path)
    write_store(tmp_path, source, autoencoder, **options)
    assert [name for name in names(tmp_path) if name.endswith("json")] == ["manifest.json", "report.json"]


def test_a_store_can_be_read_while_it_grows(tmp_path, image_folder, autoencoder, store):
    seen = []

    def look(images):
        if images:
            seen.append(len(LatentStore(tmp_path, partial=True)))
            with pytest.raises(InputError, match="is not finished, . of its 4 parts.*no manifest.json"):
                LatentStore(tmp_path)

    source = FolderSource(image_folder, 24)
    finished = write_store(tmp_path, source, autoencoder, batch_size=8, shard_records=3, on_progress=look)
    assert seen == [6, 11] and finished.finished
    assert LatentStore(tmp_path, partial=True).finished


def test_two_hosts_write_what_one_writes(tmp_path, image_folder, autoencoder, store):
    source, options = FolderSource(image_folder, 24), dict(batch_size=8, shard_records=3, host_count=2)
    first = write_store(tmp_path, source, autoencoder, host_index=0, **options)
    assert not first.finished and [record.label for record in first] == [0, 0, 0, 1, 1, 1]
    second = write_store(tmp_path, source, autoencoder, host_index=1, **options)
    assert second.finished
    assert_same_records(second, store)
    with pytest.raises(InputError, match="host_index=2 of host_count=2"):
        write_store(tmp_path, source, autoencoder, host_index=2, **options)


def test_a_store_that_was_begun_otherwise_is_not_gone_on_with(tmp_path, image_folder, autoencoder, other_autoencoder):
    source = FolderSource(image_folder, 24)
    write_store(tmp_path, source, autoencoder, batch_size=8, shard_records=3, host_count=2)
    with pytest.raises(InputError, match="begun with 4 parts, not these 3"):
        write_store(tmp_path, source, autoencoder, batch_size=8, shard_records=4)
    with pytest.raises(InputError, match="another latent store .autoencoder tiny, not other"):
        write_store(tmp_path, source, other_autoencoder, batch_size=8, shard_records=3)


def assert_same_records(left, right):
    """Same images, labels and keys in the same order; moments up to the last bit of float16 (batches differ)."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.key, a.label, a.captions) == (b.key, b.label, b.captions)
        np.testing.assert_array_equal(a.control, b.control)
        np.testing.assert_allclose(a.mean, b.mean, rtol=2**-10, atol=1e-5)
        np.testing.assert_allclose(a.logvar, b.logvar, rtol=2**-10, atol=1e-5)


def test_what_a_killed_write_left_is_no_store_and_is_replaced(tmp_path, image_folder, autoencoder, store):
    for name in ("latents-00000-of-00002.array_record", "latents-00001-of-00002.array_record.partial"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(InputError, match="no manifest.json"):
        LatentStore(tmp_path)
    repeated = write_store(tmp_path, FolderSource(image_folder, 24), autoencoder, batch_size=8, shard_records=4)
    assert names(repeated.path) == names(store.path)
    np.testing.assert_array_equal(repeated[10].mean, store[10].mean)


def test_impossible_requests_are_named(tmp_path, image_folder, autoencoder):
    source = FolderSource(image_folder, 24)
    for options, message in [
        ({"source": FolderSource(image_folder, 20)}, "resolution=20: .*tiny needs a multiple of 8"),
        ({"dtype": "bfloat16"}, "bfloat16.*float16, float32"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_records": 0}, "shard_records=0"),
    ]:
        with pytest.raises(InputError, match=message):
            write_store(tmp_path / "s", **{"source": source, "autoencoder": autoencoder, **options})
    assert not (tmp_path / "s").exists()


def test_latents_out_of_range_are_named(tmp_path, image_folder, autoencoder):
    """Weights that blow up: means beyond 65504 do not fit in float16, and are not stored as infinity."""
    params = jax.tree.map(lambda leaf: leaf, autoencoder.params)
    params["encoder"]["quant_conv"] = jax.tree.map(lambda leaf: leaf * 1e7, params["encoder"]["quant_conv"])
    loud = autoencoder.replace(params=params)
    with pytest.raises(InputError, match="ant/01.png: its latent is not finite in float16; possible: dtype float32"):
        write_store(tmp_path / "s", FolderSource(image_folder, 24), loud, batch_size=8)


def test_check_autoencoder_names_both(store, autoencoder, other_autoencoder):
    check_autoencoder(store, autoencoder)
    renamed = autoencoder.replace(config=replace(autoencoder.config, name="moved elsewhere"))
    check_autoencoder(store, renamed)
    with pytest.raises(InputError, match="made with autoencoder tiny .* not with other") as caught:
        check_autoencoder(store, other_autoencoder)
    for each in (autoencoder, other_autoencoder):
        assert fingerprint(each.params)[:12] in str(caught.value)
    rescaled = autoencoder.replace(config=replace(autoencoder.config, name="rescaled", scaling_factor=0.25))
    with pytest.raises(InputError, match="scaling_factor=0.5 of autoencoder tiny, but rescaled now has .*0.25"):
        check_autoencoder(store, rescaled)


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        LatentStore(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no manifest.json"):
        LatentStore(tmp_path)


def test_damaged_shards_are_named(damaged):
    shard = damaged / "latents-00001-of-00003.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=f"{shard.name} has {len(whole) - 100} bytes instead of {len(whole)}"):
        LatentStore(damaged)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        LatentStore(damaged)


def test_changed_bytes_are_seen_when_read(damaged):
    shard = damaged / "latents-00000-of-00003.array_record"
    content = bytearray(shard.read_bytes())
    payload = LatentStore(damaged)[2].mean.tobytes()  # mean of the image, then of its mirror image
    place = content.index(payload[: len(payload) // 2])
    content[place] ^= 1
    shard.write_bytes(content)
    spoilt = LatentStore(damaged)
    spoilt[1]
    with pytest.raises(InputError, match="record 2 cannot be read"):
        spoilt[2]


def change_manifest(store, change, *, checksum):
    path = store / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    if not checksum:  # as of a store that an earlier version wrote
        del fields["checksum"]
    path.write_text(json.dumps(fields))


CONTRADICTIONS = [
    (dict(format=2), "store format 2, this version has format 3: prepare it again"),
    (dict(extra=1), "manifest.json: 'extra' not known"),
    (dict(num_records=12), "num_records=12, but its other fields give 11"),
    (dict(dtype="int8"), "dtype='int8' is not possible: it must be one of float16, float32"),
    (dict(scaling_factor=-0.5), "scaling_factor=-0.5 is not possible: it must be above 0, up to 1e+30"),
    (dict(shift_factor="0"), "shift_factor='0' is not possible: it must be a number"),
    (dict(latents_mean=[0.0] * 4), "latents_mean without latents_std"),
    (dict(latents_mean=[0.0], latents_std=[1.0]), "latents_mean has 1 numbers for 4 channels"),
    (dict(downsample=7), "resolution=24 is no multiple of downsample=7"),
    (dict(latent_channels=4096), "too few for 4 records of"),
    (dict(latent_channels=4096, resolution=65536), "at most 1,073,741,824 are possible"),
    (dict(class_names="ant"), "class_names='ant' is not possible: it must be a list"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_a_manifest_that_contradicts_itself_is_refused(damaged, change, message):
    change_manifest(damaged, lambda fields: fields.update(change), checksum=False)
    with pytest.raises(InputError, match=re.escape(message)):
        LatentStore(damaged)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scaling_factor", 0.25), ("crop", "random"), ("class_names", ["bee", "ant"]), ("skipped", 1)],
)
def test_what_a_manifest_says_is_covered_by_its_checksum(damaged, name, value):
    change_manifest(damaged, lambda fields: fields.update({name: value}), checksum=True)
    with pytest.raises(InputError, match=r"manifest.json: was changed since it was written"):
        LatentStore(damaged)


def test_a_manifest_without_a_checksum_is_of_an_earlier_version(damaged):
    before = LatentStore(damaged).manifest
    change_manifest(damaged, lambda fields: None, checksum=False)
    assert LatentStore(damaged).manifest == before


OUTSIDE = ["../stolen.array_record", "/etc/passwd", "C:\\x", "a/b", "a\\b", "..", "", "manifest.json", "x\0", ".lock"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_no_file_outside_its_folder(damaged, name):
    """Though there is one: it is never followed."""
    whole = next(damaged.glob("*.array_record")).read_bytes()
    (damaged.parent / "stolen.array_record").write_bytes(whole)
    change_manifest(damaged, lambda fields: fields["shards"][0].update(file=name), checksum=False)
    with pytest.raises(InputError, match=r"manifest.json: (shards\[0\]: file=|a shard is named twice)"):
        LatentStore(damaged)


def test_a_shard_is_named_once(damaged):
    def twice(fields):
        fields["shards"][1] = fields["shards"][0]

    change_manifest(damaged, twice, checksum=False)
    with pytest.raises(InputError, match="a shard is named twice"):
        LatentStore(damaged)


def test_a_shard_has_the_records_that_the_manifest_says(damaged):
    def fewer(fields):
        fields["shards"][0]["records"] -= 1
        fields["num_records"] -= 1

    change_manifest(damaged, fewer, checksum=False)
    with pytest.raises(InputError, match="has 4 records, not the 3 that the store says"):
        LatentStore(damaged)[0]


def test_encode_flips_mirrors_columns(autoencoder):
    """Flip 1 of an image is flip 0 of its mirror image."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    moments = np.asarray(encode_flips(autoencoder, images))
    mirrored = np.asarray(encode_flips(autoencoder, images[:, :, ::-1]))
    assert moments.shape == (8, 2, 2, 2, 2, 4)
    np.testing.assert_array_equal(moments[:, 0], mirrored[:, 1])
    np.testing.assert_array_equal(moments[:, 1], mirrored[:, 0])
    assert np.abs(moments[:, 0] - moments[:, 1]).max() > 0.01
