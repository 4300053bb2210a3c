"""The compiled train step over meshes: what each device holds, what is moved, what is donated. Nothing is run."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.experiment import build, resolve
from lpl_jax.training import Frozen, abstract_state, make_objective, make_step
from lpl_jax.training.optimizer import make_optimizer

BATCH, SIDE, WIDTH = 32, 16, 128
MESHES = [
    (2, 2, 2),
    pytest.param((1, 8, 1), marks=pytest.mark.slow),
    pytest.param((2, 4, 1), marks=pytest.mark.slow),
    pytest.param((8, 1, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 8), marks=pytest.mark.slow),
]


def experiment_of(tiny_config, autoencoder, **changes):
    """paper796 in small: wide enough for every kernel to be split, and with more tokens than kernels have rows."""
    resolution = SIDE * autoencoder.config.downsample
    config = tiny_config(model__preset="small", train__batch_size=BATCH, ema__decays=(0.9,), **changes)
    config.model.hidden, config.model.depth, config.model.heads = WIDTH, 4, 8
    config.resolution = resolution
    return resolve(build(config), autoencoder.config)


def compile_step(experiment, autoencoder, sizes):
    """The compiled step on a mesh, with the state that it was compiled for."""
    mesh = parallel.make_mesh(parallel.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    optimizer, _ = make_optimizer(experiment.optimizer)
    init = functools.partial(denoisers.init, experiment.model)
    state = abstract_state(init, optimizer, experiment.ema.decays, mesh, jax.random.key(0))

    def given(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    latents = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, autoencoder.config.latent_channels), jnp.float32)
    batch = {"mean": latents, "logvar": latents, "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}
    batch = jax.tree.map(lambda leaf: given(leaf, parallel.batch_sharding(mesh)), batch)
    key = given(jax.eval_shape(jax.random.key, 0), parallel.replicated(mesh))
    frozen = jax.tree.map(lambda leaf: given(leaf, parallel.replicated(mesh)), autoencoder)
    with jax.set_mesh(mesh):
        step = make_step(make_objective(experiment), optimizer, state, mesh)
        return step.lower(state, batch, key, Frozen(frozen)).compile(), state


def bytes_of(state):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def bytes_of_one_device(state):
    leaves = jax.tree.leaves(state)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def in_use(compiled):
    plan = compiled.memory_analysis()
    return plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes


@pytest.fixture(scope="module")
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_device_holds_the_whole(sizes, tiny_config, autoencoder, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled, state = compile_step(experiment_of(tiny_config, autoencoder), autoencoder, sizes)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert not [warning for warning in caught if "onat" in str(warning.message)]  # donated buffers were not usable
    # Parameters, averages and moments: all but what is small; the modulation of a block lies on `fsdp` alone.
    if sizes[1] > 1:
        assert bytes_of_one_device(state) < (1 / (sizes[1] * sizes[2]) + 0.15) * bytes_of(state)
    plan = compiled.memory_analysis()
    # The new state takes the memory of the old one.
    assert plan.alias_size_in_bytes >= bytes_of_one_device(state)
    stacked = {leaf.shape for leaf in jax.tree.leaves(state.params["blocks"]) if leaf.size >= 2**14}
    gathered = {
        tuple(int(size) for size in shape.split(","))
        for line in compiled.as_text().splitlines()
        if re.search(r"= .*\ball-gather(-start)?\(", line)
        for shape in re.findall(r"\[([\d,]+)\]", re.search(r"= (.*?) all-gather", line)[1])
    }
    assert stacked and not stacked & gathered
    if sizes[1] > 1:
        assert gathered  # one layer at a time: the search finds what there is


@pytest.mark.slow
def test_the_plan_of_eight_devices_against_that_of_one(tiny_config, autoencoder):
    """Arguments, outputs and temporaries: an eighth, and what is whole on each (small leaves, one gathered layer)."""
    experiment = experiment_of(tiny_config, autoencoder)
    one, eight = (in_use(compile_step(experiment, autoencoder, sizes)[0]) for sizes in ((1, 1, 1), (1, 8, 1)))
    assert eight < 0.3 * one


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("changes", [dict(), dict(train__accumulate=4)], ids=["", "accumulate"])
def test_with_the_perceptual_loss(sizes, changes, tiny_config, with_lpl, autoencoder, capfd):
    changes = changes | with_lpl | dict(lpl__taps=2, lpl__weight=1.0)
    compiled, state = compile_step(experiment_of(tiny_config, autoencoder, **changes), autoencoder, sizes)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of_one_device(state)


@pytest.mark.slow
def test_accumulation_takes_the_memory_of_a_part(tiny_config, autoencoder):
    """Activations for the backward pass of 8 of 32 images, and a gradient (a fifth of the state) more."""
    whole, state = compile_step(experiment_of(tiny_config, autoencoder), autoencoder, (1, 1, 1))
    parts, _ = compile_step(experiment_of(tiny_config, autoencoder, train__accumulate=4), autoencoder, (1, 1, 1))
    temp = [compiled.memory_analysis().temp_size_in_bytes for compiled in (whole, parts)]
    assert temp[1] < temp[0] / 2 + bytes_of(state.params)
