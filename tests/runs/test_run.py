"""A run as an object: what it opens, what it draws, and what it refuses."""

import chex
import jax
import numpy as np
import pytest

import lpl_jax
from lpl_jax import denoisers, parallel
from lpl_jax.autoencoders import load
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, resolve
from lpl_jax.runs import checkpoints
from lpl_jax.runs.workdir import write_config
from lpl_jax.training import create_state, make_optimizer


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_config, tiny_folder):
    """Checkpoints of steps 1 and 2, whose averages are not the parameters."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    experiment = resolve(build(tiny_config(sampling__steps=2)), load(tiny_folder).config)
    mesh = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
    rng = np.random.default_rng(0)

    shapes = jax.eval_shape(lambda: denoisers.init(experiment.model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) * 0.3, shapes)
    optimizer, _ = make_optimizer(experiment.optimizer)
    state = create_state(lambda given: given, optimizer, experiment.ema.decays, mesh, params)
    state = state.replace(emas=jax.tree.map(lambda leaf: 0.5 * leaf, state.emas)).with_weight(0.0)
    write_config(experiment, folder)
    with checkpoints.Checkpointer(folder / "checkpoints") as checkpointer:
        for _ in (1, 2):
            state = state.replace(step=state.step + 1, params=jax.tree.map(lambda leaf: leaf + 0.01, state.params))
            checkpointer.save(state)
            checkpointer.wait()
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return lpl_jax.open_run(workdir)


def test_three_lines_draw_images(workdir):
    run = lpl_jax.open_run(str(workdir))
    sample = run.sampler(guidance=1.5)
    images = sample([0, 1, 1])
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8


def test_what_it_was_is_there(run, tiny_folder):
    assert (run.steps, run.step(), run.step(1)) == ([1, 2], 2, 1)
    assert run.experiment.resolution == 32
    assert run.autoencoder.config == load(tiny_folder).config
    assert (run.text, run.tokenizer) == (None, None)
    assert len(run.source) > 0


def test_parameters_by_step_name_and_mesh(run):
    first, newest, average = (
        run.params(step=step, weights=name) for step, name in ((1, "params"), (None, "params"), (2, None))
    )
    chex.assert_trees_all_close(newest, jax.tree.map(lambda leaf: leaf + np.float32(0.01), first), atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(newest, average)
    kernels = [tree["patch_embed"]["kernel"] for tree in (newest, average)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, fsdp=4))
    on_devices = run.params(weights="params", mesh=mesh)
    chex.assert_trees_all_equal(jax.device_get(on_devices), newest)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(on_devices))


def test_an_image_follows_from_its_row_its_label_and_the_seed(run):
    sample = run.sampler(weights="params", batch_size=2)
    images = sample([0, 1, 0])
    assert (images[0] != images[2]).any()
    # The last one alone, by the number of its noise; another batch is another program, which may round otherwise.
    assert np.abs(images[2].astype(int) - sample([0], rows=[2])[0]).max() <= 1
    assert (run.sampler(weights="params", seed=1)([0])[0] != images[0]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.step(5), "has no checkpoint of step 5; there are 1, 2"),
        (lambda run: run.params(weights="0.1"), "weights '0.1' are not in .*; possible: params, 0.5, 0.9"),
        (lambda run: run.sampler(sampler="euler"), "sampling.sampler='euler' with paradigm 'eps'; possible: ddim"),
        (lambda run: run.sampler(guidence=2.0), r"sampling.guidence is not known \(did you mean guidance\?\)"),
        (lambda run: run.condition([]), "nothing to draw"),
        (lambda run: run.condition(["a cat"]), "is a run on classes: give labels, 0 to 1"),
        (lambda run: run.condition([-1]), "labels must be 0 to 1, or 2 for no class"),
        (lambda run: run.condition([3]), "labels must be 0 to 1, or 2 for no class"),
    ],
)
def test_what_is_not_there_is_named(run, call, message):
    with pytest.raises(InputError, match=message):
        call(run)


def test_rows_are_one_for_each_image(run):
    with pytest.raises(InputError, match=r"rows of shape \(1,\) given for 2 images"):
        run.sampler()([0, 1], rows=[3])


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file; is .* the folder of a run\?"):
        lpl_jax.open_run(tmp_path)
