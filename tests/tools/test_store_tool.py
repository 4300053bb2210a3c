"""`lpl store` on stores that are whole, damaged, or still being made."""

import dataclasses
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from lpl_jax import autoencoders
from lpl_jax.data import FolderSource, LatentStore, TextOptions, write_store
from lpl_jax.data.inspect import statistics, verify
from lpl_jax.errors import InputError
from lpl_jax.tools import cli
from lpl_jax.tools.store import main, sheet


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, image_folder, tiny_folder):
    """The 16 images of two classes with captions, in two shards."""
    root = tmp_path_factory.mktemp("captioned")
    shutil.copytree(image_folder, root / "images")
    for number, path in enumerate(sorted((root / "images").rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"caption {number}" + " and more" * (number % 3))
    source = FolderSource(root / "images", 32, captions=("txt",))
    options = dict(batch_size=16, shard_records=10, text=TextOptions(length=7))
    return write_store(root / "store", source, autoencoders.load(tiny_folder), **options)


@pytest.fixture
def rewritten(captioned, tmp_path):
    """function(change) -> the store with its records changed: change(list of record bytes) -> list."""

    def make(change):
        folder = shutil.copytree(captioned.path, tmp_path / "copy")
        store = LatentStore(folder)
        records = change(store.read(range(len(store))))
        manifest = store.manifest
        start = 0
        for shard in manifest.shards:
            writer = ArrayRecordWriter(str(folder / shard.file), "group_size:1,uncompressed")
            for record in records[start : start + shard.records]:
                writer.write(record)
            writer.close()
            start += shard.records
        return folder

    return make


def test_a_whole_store(captioned, capsys):
    assert main(["verify", str(captioned.path)]) == 0
    assert "16 records in 2 shards, all in order" in capsys.readouterr().out
    assert not verify(captioned).counts


def change_field(name, value):
    def change(store, records):
        dtype = store.manifest.record_dtype
        fixed = np.frombuffer(records[3], dtype, count=1).copy()
        fixed[name].reshape(-1)[0] = value
        return [*records[:3], fixed.tobytes() + records[3][dtype.itemsize :], *records[4:]]

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("not finite", change_field("moments", np.nan)),
        ("label", change_field("label", 2)),
        ("tokens", change_field("tokens", 2**15)),
        ("duplicate key", lambda store, records: [*records[:5], records[4], *records[6:]]),
        ("captions", lambda store, records: [records[0].rpartition(b"\0")[0], *records[1:]]),
        ("text", lambda store, records: [records[0] + b"\xff", *records[1:]]),
    ],
)
def test_a_damaged_record_is_found(captioned, rewritten, capsys, kind, change):
    folder = rewritten(lambda records: change(captioned, records))
    # Another length of a record is a fault of the file's size, which is found on opening.
    manifest = captioned.manifest
    sizes = [(folder / shard.file).stat().st_size for shard in manifest.shards]
    shards = [shard._replace(bytes=size) for shard, size in zip(manifest.shards, sizes, strict=True)]
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, shards=tuple(shards)).to_json())
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"{kind}: record" in out and "checksum: latents-00000-of-00002" in out
    assert f"2 faults (checksum 1, {kind} 1)" in out


def test_bytes_changed_on_the_disk_are_found(captioned, tmp_path, capsys):
    folder = shutil.copytree(captioned.path, tmp_path / "copy")
    shard = folder / captioned.manifest.shards[1].file
    content = bytearray(shard.read_bytes())
    content[content.index(captioned[12].mean[0].tobytes())] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "unreadable: " in out and "record 12 cannot be read" in out
    assert "2 faults (checksum 1, unreadable 1)" in out


def test_stats(captioned, capsys):
    assert main(["stats", str(captioned.path)]) == 0
    out = capsys.readouterr().out
    assert "class 0        8 ant" in out and "class 1        8 bee" in out
    assert "txt: words 2 / 4 / 6, tokens 4 / 6 / 7 of 7" in out and "bundled (" in out
    found = statistics(captioned)
    means = np.stack([record.mean[0] for record in captioned]).astype(float)
    variances = np.exp(np.stack([record.logvar[0] for record in captioned]).astype(float))
    scale, shift = captioned.manifest.scaling_factor, captioned.manifest.shift_factor
    np.testing.assert_allclose(found["latent_mean"], ((means - shift) * scale).mean((0, 1, 2)))
    wanted = np.sqrt((((means - shift) * scale).var((0, 1, 2))) + (variances * scale**2).mean((0, 1, 2)))
    np.testing.assert_allclose(found["latent_std"], wanted)
    assert found["txt"]["truncated"] == np.mean(
        [n % 3 == 2 or n in (10, 13) for n in range(16)]
    )  # two of them just fit
    assert statistics(captioned, records=5)["looked_at"] == 5


def test_show(captioned, tiny_folder, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    argv = ["show", str(captioned.path), "--out", str(out), "--count", "3", "--columns", "2"]
    assert main([*argv, "--autoencoder", str(tiny_folder)]) == 0
    assert f"{out}: records " in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width == 6 + 2 * (128 + 6)  # 32 pixels enlarged four times
        assert np.asarray(image).std() > 5
    with pytest.raises(InputError, match="was made with autoencoder"):
        main(argv)
    with pytest.raises(InputError, match="--count 0"):
        main([*argv, "--count", "0"])


def test_a_sheet_keeps_its_images_in_order():
    images = [np.full((128, 128, 3), 60 * i, np.uint8) for i in range(3)]
    page = np.asarray(sheet(images, ["a", "b", "a long title " * 9], 2))
    assert [page[10 + row, 10 + column, 0] for row, column in ((0, 0), (0, 140))] == [0, 60]
    assert (page[len(page) // 2 + 10, 10] == 120).all(), "the third one begins a row"


def test_an_unfinished_store(image_folder, tiny_folder, tmp_path, capsys):
    source, autoencoder = FolderSource(image_folder, 32), autoencoders.load(tiny_folder)
    write_store(tmp_path / "s", source, autoencoder, batch_size=16, shard_records=5, host_count=2)
    with pytest.raises(InputError, match="not finished, 2 of its 4 parts"):
        main(["verify", str(tmp_path / "s")])
    assert main(["verify", str(tmp_path / "s"), "--unfinished"]) == 0
    assert "10 records in 2 shards" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.run_main(main, ["stats", str(tmp_path / "none")])
    assert end.value.code == 2
