"""Stores with values that are not finite."""

import itertools
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lpl_jax.data import FolderSource, LatentStore, write_store
from lpl_jax.data.finite import _chunks, check_finite
from lpl_jax.errors import InputError


def spoil(store, folder, index, change):
    """A copy of a store whose record `index` is changed: change(its fixed part)."""
    shutil.copytree(store.path, folder)
    records, dtype, start = store.read(range(len(store))), store.manifest.record_dtype, 0
    fixed = np.frombuffer(records[index], dtype, 1).copy()
    change(fixed)
    records[index] = fixed.tobytes() + records[index][dtype.itemsize :]
    for shard in store.manifest.shards:
        writer = ArrayRecordWriter(str(folder / shard.file), "group_size:1,uncompressed")
        for record in records[start : start + shard.records]:
            writer.write(record)
        writer.close()
        start += shard.records
    return LatentStore(folder, partial=True)


def put(value):
    return lambda fixed: fixed["moments"].reshape(-1).__setitem__(-1, value)


def test_a_good_store_passes(store, text_store):
    check_finite(store)
    check_finite(text_store)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_and_named(store, tmp_path, value):
    spoilt = spoil(store, tmp_path / "spoilt", 6, put(value))
    with pytest.raises(InputError) as caught:
        check_finite(spoilt)
    assert str(caught.value) == (
        f"latent store {spoilt.path}: 1 of 11 records have values that are not finite: {store[6].key} (record 6 in "
        "latents-00001-of-00003.array_record); lpl store verify lists all: prepare it again"
    )


def test_the_largest_number_is_finite(store, tmp_path):
    check_finite(spoil(store, tmp_path / "large", 6, put(-np.finfo(np.float16).max)))


def test_float32_is_looked_at_too(image_folder, autoencoder, tmp_path):
    whole = write_store(tmp_path / "float32", FolderSource(image_folder, 24), autoencoder, dtype="float32")
    check_finite(whole)
    with pytest.raises(InputError, match="1 of 11 records"):
        check_finite(spoil(whole, tmp_path / "spoilt", 10, put(np.nan)))


def test_many_are_named_by_the_first_few(store, tmp_path):
    spoilt = store
    for index in range(8):
        spoilt = spoil(spoilt, tmp_path / f"spoilt-{index}", index, put(np.nan))
    with pytest.raises(InputError, match=r"at least \d+ of 11 records .*record 0 in .*record 5 in [^,]*; lpl store"):
        check_finite(spoilt)


def test_processes_share_the_records():
    """Each record is looked at by one; of too many, chunks at equal distances from the first to the last."""
    for count, parts in ((11, 3), (1000, 7), (0, 2)):
        seen = [
            record for part in range(parts) for chunk in _chunks(count, 1, (part, parts), 2**40) for record in chunk
        ]
        assert seen == list(range(count))
    few = list(_chunks(10**6, 1000, (1, 2), 64 * 1000 * 10))
    assert len(few) == 10 and few[0].start == 500_000
    assert {b.start - a.start for a, b in itertools.pairwise(few)} <= {49_984, 50_048}


def test_a_damaged_record_is_found_on_the_way(store, tmp_path):
    folder = shutil.copytree(store.path, tmp_path / "damaged")
    shard = folder / store.manifest.shards[1].file
    content = bytearray(shard.read_bytes())
    content[content.index(store[6].mean[0].tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="record 6 cannot be read"):
        check_finite(LatentStore(folder))
