"""Stores, runs and evaluations on gs://, whose buckets are here a folder of this machine: see conftest.py."""

import json

import jax
import numpy as np
import pytest

from lpl_jax import autoencoders
from lpl_jax.data import FolderSource, LatentStore, batches, write_store
from lpl_jax.data.inspect import verify
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.runs import checkpoints, load_run
from lpl_jax.training import train
from lpl_jax.training.logging import read_metrics

STORE, RUN = "gs://bucket/stores/32", "gs://bucket/runs/one"


@pytest.fixture
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


def test_a_store_is_written_and_read(bucket, stores, image_folder, autoencoder, monkeypatch):
    local = LatentStore(stores[32])
    store = write_store(STORE, FolderSource(image_folder, 32), autoencoder, batch_size=16, shard_records=6)
    assert (str(store.path), len(store), len(store.manifest.shards)) == (STORE, 16, 3)
    names = sorted(path.name for path in (bucket / "bucket/stores/32").iterdir())
    assert names == [*(f"latents-0000{i}-of-00003.array_record" for i in range(3)), "manifest.json", "report.json"]
    for record, wanted in zip(store, local, strict=True):
        assert record.key == wanted.key
        np.testing.assert_array_equal(record.mean, wanted.mean)
    ours, theirs = (batches(each, batch_size=8, seed=3) for each in (store, local))
    for _ in range(4):
        np.testing.assert_array_equal(next(ours)["mean"], next(theirs)["mean"])
    assert not verify(LatentStore(STORE)).counts


def test_shards_are_copied_when_they_are_wanted(bucket, image_folder, autoencoder, tmp_path):
    write_store(STORE, FolderSource(image_folder, 32), autoencoder, batch_size=16, shard_records=6)
    store, copies = LatentStore(STORE), tmp_path / "cache/lpl_jax/remote"
    assert not copies.exists()
    store[7]
    assert [path.name for path in copies.rglob("*.array_record")] == ["latents-00001-of-00003.array_record"]
    store.fetch()
    assert len(list(copies.rglob("*.array_record"))) == 3


def test_a_store_that_was_begun_is_gone_on_with(bucket, image_folder, autoencoder):
    """A write that is stopped keeps the units that were done; the same call makes the others."""
    source, options, made = FolderSource(image_folder, 32), dict(batch_size=8, shard_records=4), []

    def stop(images):
        if images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(STORE, source, autoencoder, on_progress=stop, **options)
    partial = LatentStore(STORE, partial=True)
    assert (len(partial), partial.finished) == (8, False)
    assert len(write_store(STORE, source, autoencoder, on_progress=made.append, **options)) == 16
    assert sum(made) == 8
    with pytest.raises(InputError, match="gs://bucket/stores/32 already holds another latent store"):
        write_store(STORE, FolderSource(image_folder, 16), autoencoder)


def test_a_run_trains_and_resumes(checkpoint_bucket, tiny_config, tmp_path, capsys):
    """Its latent store is made beside it; the numbers are those of a run in a local folder."""
    c = tiny_config(train__steps=2, train__checkpoint_every=2, train__log_every=1, ema__decays=(0.5,))
    here = train(build(c), tmp_path / "run").state
    train(build(c), RUN)
    assert f"{RUN} is remote and has no lock: no other process may train there" in capsys.readouterr().out
    c.train.steps = 4
    here = train(build(c), tmp_path / "run").state
    there = train(build(c), RUN).state
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["loss"] for line in read_metrics(RUN)] == [line["loss"] for line in read_metrics(tmp_path / "run")]
    folder = checkpoint_bucket / "bucket/runs/one"
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 4
    assert len((folder / "startup.jsonl").read_text().splitlines()) == 2
    assert len(list(folder.glob("events.out.tfevents*"))) == 2
    assert checkpoints.steps(f"{RUN}/checkpoints") == [2, 4]
    experiment, params = load_run(RUN)
    assert experiment == load_run(tmp_path / "run")[0]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(here.emas["0.5"]), strict=True):
        np.testing.assert_array_equal(a, b)
    files = [path for path in (folder / "checkpoints/4/ema_0.5").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=f"{RUN}/checkpoints/4 is damaged: .*; other steps in its folder: 2"):
        load_run(RUN)
    assert not list(tmp_path.parent.rglob("gs:*"))
