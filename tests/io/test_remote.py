"""Stores, runs and evaluations on gs://, whose buckets are here a folder of this machine: see conftest.py."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lpl_jax import autoencoders, denoisers, text
from lpl_jax.data import FolderSource, LatentStore, TFDSSource, batches, write_store
from lpl_jax.data.inspect import verify
from lpl_jax.errors import InputError
from lpl_jax.evaluation import classifier, inception_weights
from lpl_jax.evaluation.cards import read_card
from lpl_jax.evaluation.evaluate import evaluate, make_evaluator, read_spectra
from lpl_jax.evaluation.frechet import read_statistics, statistics, write_statistics
from lpl_jax.evaluation.image_sets import open_images
from lpl_jax.evaluation.prompts import read_prompts
from lpl_jax.evaluation.reference import set_rows
from lpl_jax.evaluation.sweep import write_sweep
from lpl_jax.experiment import build
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.io.atomic import write_bytes, write_text
from lpl_jax.io.copies import local_copy
from lpl_jax.io.npy import write_npz
from lpl_jax.io.paths import files_below, to_path
from lpl_jax.losses import latent_lpips_weights
from lpl_jax.parallel import MeshConfig, make_mesh
from lpl_jax.runs import checkpoints, open_run
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
    source, options, provenance = FolderSource(image_folder, 32), dict(batch_size=8, shard_records=4), []

    def stop(images):
        if images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(STORE, source, autoencoder, on_progress=stop, **options)
    partial = LatentStore(STORE, partial=True)
    assert (len(partial), partial.finished) == (8, False)
    assert len(write_store(STORE, source, autoencoder, on_progress=provenance.append, **options)) == 16
    assert sum(provenance) == 8
    with pytest.raises(InputError, match="gs://bucket/stores/32 already holds another latent store"):
        write_store(STORE, FolderSource(image_folder, 16), autoencoder)


def test_a_run_trains_and_resumes(checkpoint_bucket, tiny_config, tmp_path, capsys, monkeypatch, two_devices):
    """The numbers are those of a run in a local folder, in one go."""
    monkeypatch.chdir(tmp_path)
    c = tiny_config(train__steps=2, train__checkpoint_every=2, train__log_every=1, ema__decays=(0.5,))
    train(build(c), RUN)
    assert f"{RUN} is remote and has no lock: no other process may write there" in capsys.readouterr().out
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
    run = open_run(RUN)
    assert run.experiment == open_run(tmp_path / "run").experiment
    for a, b in zip(jax.tree.leaves(run.params()), jax.tree.leaves(here.emas["0.5"]), strict=True):
        np.testing.assert_array_equal(a, b)
    files = [path for path in (folder / "checkpoints/4/ema_0.5").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=f"{RUN}/checkpoints/4 is damaged: .*; other steps in its folder: 2"):
        run.params()
    assert not list(tmp_path.rglob("gs:*"))


@pytest.fixture
def small_classifier(monkeypatch):
    config = classifier.ClassifierConfig("small", ("a", "b"), side=16, stem=4, widths=(4, 8), blocks=1)
    network = classifier.init(config, jax.random.key(0))
    monkeypatch.setattr(classifier, "load", lambda: network)


def test_images_are_scored(bucket, image_folder, small_classifier, tmp_path, monkeypatch):
    """Images, reference, features and results are remote, and the card is the one that local folders give."""
    shutil.copytree(image_folder / "ant", bucket / "bucket/ant")
    shutil.copytree(image_folder, bucket / "other/reference")
    mesh, found = make_mesh(MeshConfig(), jax.devices()[:1]), {}
    for name, root, images, reference in (
        ("here", str(tmp_path / "out"), str(image_folder / "ant"), str(image_folder)),
        ("there", "gs://bucket/out", "gs://bucket/ant", "s3://other/reference"),
    ):
        options = dict(features="classifier", reference=reference, num_images=8, reference_images=8, batch_size=8)
        settings = EvaluationConfig(**options, k=2, resamples=4)
        evaluator = make_evaluator(settings, source=None, resolution=64, mesh=mesh, folder=f"{root}/features")
        read = set_rows(open_images(images))
        arguments = dict(provenance={"images": "ants"}, resolution=64, out=f"{root}/ants", context={"command": "test"})
        evaluate(evaluator, read, 8, **arguments)
        card, spectra = read_card(f"{root}/ants"), read_spectra(f"{root}/ants")
        found[name] = card.metrics, spectra[0].power.tolist(), sorted(card.provenance.keys() - {"reference.source"})
        write_sweep([({"x": 1}, card), ({"x": 2}, card)], root)
    assert found["here"] == found["there"]
    names = [path.relative_to(bucket / "bucket/out").as_posix() for path in files_below(bucket / "bucket/out")]
    assert {"ants/card.json", "ants/card.md", "ants/grid.png", "ants/spectrum.npz", "ants/spectrum.csv"} <= set(names)
    assert len([name for name in names if name.endswith("/part-000000-000008.npz")]) == 2
    with Image.open(bucket / "bucket/out/ants/grid.png") as picture:
        picture.load()
    # What is there is read, not computed again.
    monkeypatch.setattr("lpl_jax.evaluation.extract.write_part", lambda *_: pytest.fail("computed again"))
    assert evaluate(evaluator, read, 8, **arguments).metrics == card.metrics


def test_arrays_statistics_and_prompts_are_read(bucket, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    write_npz("s3://bucket/set.npz", {"arr_0": images})
    np.testing.assert_array_equal(open_images("s3://bucket/set.npz")[0:5], images)
    write_statistics("gs://bucket/statistics.npz", statistics(images.reshape(5, -1)[:, :3].astype(np.float32)))
    assert read_statistics("gs://bucket/statistics.npz").mean.shape == (3,)
    with pytest.raises(InputError, match="gs://bucket/none.npz cannot be read as a file of arrays"):
        read_statistics("gs://bucket/none.npz")
    write_text("gs://bucket/prompts.txt", "a cat\na dog\n")
    assert read_prompts("gs://bucket/prompts.txt").lines == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("read", "field"),
    [
        (lambda url: FolderSource(url, 32), "a folder of images"),
        (lambda url: TFDSSource("mnist", 32, data_dir=url), "data.data_dir"),
        (autoencoders.load, "autoencoder.source"),
        (text.load, "text.source"),
        (text.load_tokenizer, "text.tokenizer"),
        (denoisers.load, "a denoiser's weights"),
        (inception_weights.load, "evaluation.inception"),
        (latent_lpips_weights.load, "comparison.network"),
    ],
)
def test_what_has_to_be_local_says_so(read, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("gs://bucket/it", Path("gs://bucket/it")):
        with pytest.raises(InputError, match=f"^gs://bucket/it is remote; {field} takes local paths only$"):
            read(url)
    assert not list(tmp_path.iterdir())


def test_copies_are_of_a_state_of_a_file(bucket):
    """What is put in place of a file is copied anew, and nothing twice."""
    url, copies = to_path("gs://bucket/file.bin", remote=True), []
    for time, content in enumerate((b"one", b"two"), 1):
        write_bytes(url, content)
        os.utime(bucket / "bucket/file.bin", ns=(time, time))
        copies.append(local_copy(url))
        assert copies[-1].read_bytes() == content and local_copy(url) == copies[-1]
    assert copies[0] != copies[1]
    with pytest.raises(FileNotFoundError, match="none.bin"):
        local_copy(url.parent / "none.bin")
