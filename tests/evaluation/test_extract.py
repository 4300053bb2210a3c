"""Features of a set of images: the same on any mesh and in any batches, kept, and gone on with after a stop."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.evaluation import extract as module
from lpl_jax.evaluation.extract import extract
from lpl_jax.evaluation.networks import Networks
from lpl_jax.evaluation.spectrum import SpectrumSum
from lpl_jax.parallel import MeshConfig, make_mesh

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
MADE = {"images": "random"}


@flax.struct.dataclass
class Means:
    """A network whose features are the mean colours, times its weight."""

    weight: jax.Array

    def features(self, images):
        return {"pool": images.astype(jnp.float32).mean((1, 2)) * self.weight}


NETWORKS = Networks(Means(jnp.float32(2)))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART", 8)


def counted(calls, images=IMAGES):
    def read(rows):
        calls.append(rows)
        return images[rows]

    return read


def run(calls, folder=None, devices=1, batch_size=4, count=21, images=IMAGES, provenance=MADE):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return extract(
        counted(calls, images), count, NETWORKS, mesh=mesh, batch_size=batch_size, folder=folder, provenance=provenance
    )


@pytest.mark.parametrize("devices, batch_size", [(1, 4), (1, 5), (1, 100), (8, 4), (4, 8)])
def test_features_do_not_depend_on_batches_and_devices(devices, batch_size):
    found = run([], devices=devices, batch_size=batch_size)
    np.testing.assert_allclose(found.arrays["pool"], 2 * IMAGES.mean((1, 2)), rtol=1e-6)
    expected = SpectrumSum.of_images(IMAGES)
    assert found.spectrum.count == len(found) == 21
    np.testing.assert_allclose(found.spectrum.profiles, expected.profiles, rtol=1e-4)
    np.testing.assert_allclose(found.spectrum.power, expected.power, rtol=1e-4)


def test_images_that_are_not_square_have_no_spectrum():
    found = run([], images=IMAGES[:, :, :8])
    assert found.spectrum is None and set(found.arrays) == {"pool"}


def test_what_was_computed_is_not_computed_again(tmp_path):
    def stop(rows):
        if rows[0] >= 12:
            raise KeyboardInterrupt
        return IMAGES[rows]

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(KeyboardInterrupt):
        extract(stop, 21, NETWORKS, mesh=mesh, batch_size=4, folder=tmp_path, provenance=MADE)
    calls = []
    whole = run(calls, tmp_path, batch_size=8)
    assert min(rows[0] for rows in calls) == 12  # the first part was there, and half of the second
    calls.clear()
    again = run(calls, tmp_path)
    assert calls == []
    fresh = run([])
    for found in (whole, again):
        np.testing.assert_array_equal(found.arrays["pool"], fresh.arrays["pool"])
        np.testing.assert_allclose(found.spectrum.total, fresh.spectrum.total, rtol=1e-6)


def test_more_images_go_on_from_those_that_are_there(tmp_path):
    run([], tmp_path, count=16)
    calls = []
    assert len(run(calls, tmp_path, count=21)) == 21
    assert min(rows[0] for rows in calls) == 16


def test_other_images_are_other_features(tmp_path):
    run([], tmp_path)
    calls = []
    run(calls, tmp_path, provenance={"images": "others"})
    assert calls and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-30] + bytes(30)])
def test_a_damaged_part_is_made_again(tmp_path, damage):
    expected = run([], tmp_path).arrays["pool"]
    (path,) = tmp_path.glob("*/part-000008-000016.npz")
    path.write_bytes(damage(path.read_bytes()))
    calls = []
    np.testing.assert_array_equal(run(calls, tmp_path).arrays["pool"], expected)
    assert sorted({int(rows[0]) // 8 for rows in calls}) == [1]
    assert not list(tmp_path.glob("*/*.partial"))
