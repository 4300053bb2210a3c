"""Generation: images follow from seed, index and label alone; the rounding rule; panels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.diffusion import paradigm
from lpl_jax.errors import InputError
from lpl_jax.evaluation.figures import MARGIN, TITLE, panels, plot_losses
from lpl_jax.experiment import Experiment, SamplingConfig
from lpl_jax.runs.sampling import image_sampler, in_batches, to_uint8

MODEL = denoisers.preset("tiny", hidden=16, depth=1, heads=2, num_classes=3, context_pre_only=False)


@pytest.fixture(scope="module")
def networks():
    """A denoiser whose output layer is not zero, and an autoencoder, both drawn by numpy."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree.map(fill, jax.eval_shape(functools.partial(denoisers.init, MODEL), jax.random.key(0)))
    config = autoencoders.AutoencoderConfig.tiny()
    shapes = jax.eval_shape(functools.partial(autoencoders.init, config), jax.random.key(0))
    return params, jax.tree.map(fill, shapes)


def experiment(name="v", **sampling):
    chosen = SamplingConfig(**dict(steps=2, guidance=1.5) | sampling)
    return Experiment(model=MODEL, paradigm=paradigm(name), resolution=32, sampling=chosen)


def images(networks, labels, name="v", seed=1, batch_size=8, **sampling):
    draw, labels = image_sampler(experiment(name, **sampling), *networks, seed=seed), np.int32(labels)
    return in_batches(lambda rows: draw(rows, labels[rows]), 0, len(labels), batch_size)


def test_images_do_not_depend_on_the_batch_size(networks):
    labels = [0, 1, 2, 1, 0]
    whole = images(networks, labels)
    assert whole.shape == (5, 32, 32, 3) and whole.dtype == np.uint8
    parts = images(networks, labels, batch_size=2)
    # another batch size is another program: float32 rounding may move a value across a step of the 8 bits
    assert np.abs(whole.astype(int) - parts).max() <= 1
    np.testing.assert_array_equal(images(networks, labels), whole)


@pytest.mark.parametrize(
    "config",
    [pytest.param(parallel.MeshConfig(), marks=pytest.mark.slow), parallel.MeshConfig(data=2, fsdp=4)],
    ids=["batch", "batch_and_parameters"],
)
def test_images_do_not_depend_on_the_devices(config, networks):
    """One device against eight that split a batch, and the parameters as well."""
    params, autoencoder = networks
    labels = np.arange(16, dtype=np.int32) % 3
    draw = functools.partial(image_sampler, experiment(), seed=1)
    alone = draw(params, autoencoder)(np.arange(16), labels)
    mesh = parallel.make_mesh(config)
    split = jax.device_put(params, parallel.param_sharding(params, mesh, min_size=1))
    shared = draw(split, autoencoder, mesh=mesh)(np.arange(16), labels)
    assert np.abs(alone.astype(int) - shared).max() <= 1
    assert (alone == shared).mean() > 0.99
    part = draw(params, autoencoder)(np.arange(4, 8), labels[4:8])  # rows, not places in a batch
    assert np.abs(alone[4:8].astype(int) - part).max() <= 1


def test_seed_and_label_matter(networks):
    first = images(networks, [0, 0])
    assert (first[0] != first[1]).any()
    assert (images(networks, [0, 0], seed=2)[0] != first[0]).any()
    assert (images(networks, [1, 0])[0] != first[0]).any()
    assert (images(networks, [0, 0], guidance=4.0)[0] != first[0]).any()


@pytest.mark.parametrize("sampler", ["euler", "rk4"])
def test_flow_samplers(networks, sampler):
    assert images(networks, [0], name="flow", sampler=sampler).shape == (1, 32, 32, 3)


def test_rounding_to_bytes():
    values = jnp.array([-5.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 1.0, 7.0])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 1, 128, 255, 255])  # 127.5 goes to the even 128


def test_panels_hold_every_image():
    black, grey = (np.full((5, 6, 6, 3), value, np.uint8) for value in (0, 128))
    picture = np.asarray(panels({"a": black, "b": grey}, per_row=3))
    assert picture.shape == (TITLE + 2 * (6 + MARGIN) + MARGIN, 2 * (3 * (6 + MARGIN) + MARGIN) + 3 * MARGIN, 3)
    body = picture[TITLE:]
    assert (body == 0).all(-1).sum() == 5 * 36 and (body == 128).all(-1).sum() == 5 * 36
    with pytest.raises(InputError, match="different shapes"):
        panels({"a": black, "b": grey[:4]}, per_row=3)


def test_losses_are_plotted(tmp_path):
    base = [{"step": step, "diffusion_loss": 1 / step} for step in (1, 2, 3)]
    post = [{"step": step, "diffusion_loss": 0.3, "lpl": 0.5, "lpl_share": 0.2} for step in (1, 2)]
    plot_losses([("base", base, 0), ("post", post, 3)], tmp_path / "losses.png")
    from PIL import Image

    assert Image.open(tmp_path / "losses.png").size == (1350, 320)
