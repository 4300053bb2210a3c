"""Small evaluations while a run trains, without the training."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.data import FolderSource
from lpl_jax.evaluation import classifier
from lpl_jax.experiment import EvaluationConfig, Experiment, SamplingConfig
from lpl_jax.training import Frozen
from lpl_jax.training.periodic import make_evaluation

MODEL = denoisers.preset("tiny", hidden=16, depth=1, heads=2, num_classes=2)


@pytest.fixture
def periodic(tiny_folder, image_folder, tmp_path, monkeypatch):
    """function(source) -> the evaluation of a run at 32 px, with a classifier that costs little."""
    config = classifier.ClassifierConfig("small", ("a", "b"), side=16, stem=4, widths=(4, 8), blocks=1)
    network = classifier.init(config, jax.random.key(0))
    monkeypatch.setattr(classifier, "load", lambda: network)

    def make(source):
        experiment = Experiment(
            model=MODEL,
            resolution=32,
            sampling=SamplingConfig(steps=2),
            evaluation=EvaluationConfig(every=1, every_images=8, batch_size=8),
        )
        mesh = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
        frozen, folder = Frozen(autoencoders.load(tiny_folder)), tmp_path / "training"
        return make_evaluation(experiment, frozen, source, np.arange(2), mesh=mesh, folder=folder)

    return lambda with_source: make(FolderSource(image_folder, 32) if with_source else None)


def test_metrics_and_a_picture_of_each_step(periodic, tmp_path):
    params = jax.jit(functools.partial(denoisers.init, MODEL))(jax.random.key(0))
    other = jax.tree.map(lambda leaf: leaf + 0.1, params)
    evaluate = periodic(True)
    (metrics, picture), (changed, _) = evaluate(2, params), evaluate(4, other)
    assert {"evaluation/cfd", "evaluation/precision", "evaluation/spectrum_high"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["evaluation/cfd"] != changed["evaluation/cfd"]
    with Image.open(tmp_path / "training" / "step0000002.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), picture)
    assert (tmp_path / "training" / "step0000004.png").is_file()
    assert evaluate(2, params)[0] == metrics


def test_pictures_alone_without_a_reference(periodic, tmp_path):
    params = jax.jit(functools.partial(denoisers.init, MODEL))(jax.random.key(0))
    metrics, picture = periodic(False)(3, params)
    assert metrics == {} and picture.std() > 0
    assert (tmp_path / "training" / "step0000003.png").is_file()
