"""Runs with random states, made without training."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import denoisers
from lpl_jax.experiment import to_dict
from lpl_jax.parallel import MeshConfig, make_mesh
from lpl_jax.runs import checkpoints
from lpl_jax.training import abstract_state
from lpl_jax.training.optimizer import make_optimizer


@pytest.fixture(scope="session")
def target_of():
    """function(experiment) -> what its checkpoints are restored into."""
    return _target_of


@pytest.fixture(scope="session")
def write_run():
    """function(folder, experiment, steps): leaves there what training would, with random states at these steps."""
    return _write_run


def _target_of(experiment):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer, _ = make_optimizer(experiment.optimizer)
    init = functools.partial(denoisers.init, experiment.model)
    return abstract_state(init, optimizer, experiment.ema.decays, mesh, jax.random.key(0))


def _write_run(folder, experiment, steps):
    target, rng = _target_of(experiment), np.random.default_rng(0)
    with checkpoints.Checkpointer(folder / "checkpoints") as checkpointer:
        for step in steps:
            values = [jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(target)]
            state = jax.tree.unflatten(jax.tree.structure(target), values)
            checkpointer.save(state.replace(step=jnp.int32(step)))
    (folder / "config.json").write_text(json.dumps(to_dict(experiment)))
