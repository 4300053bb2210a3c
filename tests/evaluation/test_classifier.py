"""The small feature network: its bundled weights, its PyTorch twin, its resize, and what it refuses."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from lpl_jax.errors import InputError
from lpl_jax.evaluation import classifier
from lpl_jax.io.fingerprints import fingerprint

ROOT = Path(__file__).parents[2]
SMALL = classifier.ClassifierConfig(name="small", classes=("a", "b", "c"), side=16, stem=4, widths=(5, 6), blocks=2)
HASH = "5d336320cd65b41a497a023ec5e949f58eb0a992cf890fbef0325a65f881da30"


@pytest.fixture(scope="module")
def script():
    """scripts/fit_classifier.py, which holds the network in PyTorch."""
    spec = importlib.util.spec_from_file_location("fit_classifier", ROOT / "scripts/fit_classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundled():
    return classifier.load()


@pytest.fixture(scope="module")
def small():
    return classifier.init(SMALL, jax.random.key(0))


@jax.jit
def features(network, images):
    return network.features(images)


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def validation_images(shared, per_class):
    """(images, labels) of the first of every class."""
    folders = sorted((shared / "data/imagenette128/val").iterdir())
    files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())[:per_class]]
    return np.stack([np.asarray(Image.open(file)) for file, _ in files]), np.array([label for _, label in files])


def test_the_bundled_weights_are_these(bundled):
    assert fingerprint(bundled.params) == HASH
    assert bundled.config.name == "bundled" and len(bundled.config.classes) == 10
    assert sum(file.stat().st_size for file in classifier.BUNDLED.iterdir()) < 3e6


@pytest.mark.parametrize("size", [(128, 128), (200, 150), (64, 96)])
def test_features_equal_the_pytorch_network_end_to_end(bundled, script, size):
    twin = script.Network(bundled.config, folded=True)
    tensors = load_file(classifier.BUNDLED / classifier.WEIGHTS)
    twin.load_state_dict({name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()})
    images = random_images(4, *size, 3)
    images[2:] = images[2:] // 4 + np.linspace(0, 190, size[1], dtype=np.uint8)[:, None]  # smooth ones too
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (128, 128), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        pool, logits = twin(x / 127.5 - 1)
    ours = features(bundled, images)
    assert ours["pool"].shape == (4, 256) and ours["pool"].dtype == jnp.float32
    assert ours["logits"].shape == (4, 10) and ours["logits"].dtype == jnp.float32
    for name, theirs in (("pool", pool.numpy()), ("logits", logits.numpy())):
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_folding_keeps_what_the_trained_network_computes(script):
    torch.manual_seed(0)
    network = script.Network(SMALL)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            for value in (*module.parameters(), module.running_mean, module.running_var):
                torch.nn.init.uniform_(value, 0.5, 1.5)
    images = random_images(3, 16, 16, 3)
    with torch.no_grad():
        pool, logits = network.eval()(script.to_tensor(images))
    ours = features(script.to_flax(script.fold(network, SMALL), SMALL), images)
    for name, theirs in (("pool", pool.numpy()), ("logits", logits.numpy())):
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_other_sizes_are_resized_and_the_own_size_is_not(small):
    own = random_images(2, 16, 16, 3)
    doubled = own.repeat(2, axis=1).repeat(2, axis=2)
    reduced = np.asarray(jax.image.resize(doubled.astype(np.float32), own.shape, "linear"))
    expected, _ = classifier.Network(SMALL).apply({"params": small.params}, reduced / 127.5 - 1)
    np.testing.assert_allclose(features(small, doubled)["pool"], expected, rtol=0, atol=1e-5)
    assert not np.allclose(features(small, own)["pool"], expected, atol=1e-3)  # antialiased: not every second pixel
    kept, _ = classifier.Network(SMALL).apply({"params": small.params}, own.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(features(small, own)["pool"], kept, rtol=0, atol=1e-5)
    grey = [features(small, np.full((1, *size, 3), 77, np.uint8))["pool"] for size in ((16, 16), (9, 40))]
    np.testing.assert_allclose(*grey, rtol=0, atol=1e-5)


def test_an_image_has_the_same_features_in_any_batch(small):
    images = random_images(4, 16, 16, 3)
    together = features(small, images)["pool"]
    alone = np.concatenate([features(small, image[None])["pool"] for image in images])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 8, 8, 3), np.float32), ((1, 8, 8, 4), np.uint8), ((1, 8, 8, 1), np.uint8), ((8, 8, 3), np.uint8)],
)
def test_other_images_are_refused(small, shape, dtype):
    with pytest.raises(InputError) as raised:
        small.features(np.zeros(shape, dtype))
    assert str(raised.value) == f"images of type {np.dtype(dtype)} and shape {shape}: uint8 (B, H, W, 3) are needed"


def test_what_is_saved_is_loaded_again(small, tmp_path):
    classifier.save(small, tmp_path)
    again = classifier.load(tmp_path)
    assert again.config == small.config
    assert fingerprint(again.params) == fingerprint(small.params)


def test_missing_and_surplus_tensors_are_named(small, tmp_path):
    classifier.save(small, tmp_path)
    tensors = load_file(tmp_path / classifier.WEIGHTS)
    tensors["neck.weight"] = tensors.pop("head.weight")
    save_file(tensors, tmp_path / classifier.WEIGHTS)
    with pytest.raises(InputError, match="surplus neck.weight.*missing head/kernel"):
        classifier.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stem=0), "stem=0 is not possible: it must be in .1, 16384."),
        (dict(widths=[4, "x"]), r"widths\[1\]='x' is not possible"),
        (dict(widths=[]), "widths=.*not empty"),
        (dict(classes=[1]), r"classes\[0\]=1 is not possible: it must be text"),
        (dict(depth=3), "'depth' not known; possible: name"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(small, tmp_path, change, message):
    classifier.save(small, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(SMALL) | change))
    with pytest.raises(InputError, match=message):
        classifier.load(tmp_path)


def test_folders_without_a_classifier_are_refused(small, tmp_path):
    with pytest.raises(InputError, match="nowhere is no folder; possible: 'bundled'"):
        classifier.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no classifier.safetensors"):
        classifier.load(tmp_path)
    classifier.save(small, tmp_path)
    (tmp_path / classifier.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged, cut short or not a file of weights"):
        classifier.load(tmp_path)


def test_it_needs_neither_pytorch_nor_a_network(tmp_path):
    """In a process of its own, where importing torch fails and so does every connection."""
    code = """
import socket, sys
sys.modules["torch"] = None
def refuse(*args, **kwargs): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lpl_jax.evaluation import classifier
from lpl_jax.io.fingerprints import fingerprint
print(fingerprint(classifier.load().params))
"""
    shutil.copytree(ROOT / "lpl_jax", tmp_path / "lpl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == HASH, result.stderr


@pytest.mark.shared
def test_accuracy_and_distance_on_photographs(bundled, script, shared):
    """On 50 of the validation images, which were not trained on; all 500 are in docs/classifier.md."""
    from lpl_jax.evaluation.frechet import frechet_distance, statistics

    images, labels = validation_images(shared, per_class=5)
    original = features(bundled, images)
    assert (original["logits"].argmax(-1) == labels).mean() >= 0.7
    altered = dict(script.altered_sets(images, labels, bundled.config.classes))
    distances = [
        frechet_distance(statistics(np.asarray(pool)), statistics(np.asarray(original["pool"])))
        for pool in (
            original["pool"],
            *(features(bundled, altered[f"Gaussian blur, sigma {sigma} px"])["pool"] for sigma in (0.5, 1, 2)),
        )
    ]
    assert distances[0] == pytest.approx(0, abs=1e-3) and np.all(np.diff(distances) > 0.1)
