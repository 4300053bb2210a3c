"""A run is resumed on other meshes than it was saved on, and goes on as it would have."""

import jax
import numpy as np
import pytest

from lpl_jax import parallel
from lpl_jax.experiment import build
from lpl_jax.runs import open_run
from lpl_jax.training import train
from lpl_jax.training.logging import read_metrics

# (data, fsdp, tensor) of each part of two steps; the next one resumes from what it saved.
CHAIN = [(4, 2, 1), (1, 2, 2), (2, 1, 1), (1, 1, 1), (2, 2, 2), (1, 8, 1)]
STEPS = 2 * len(CHAIN)


def part(config, mesh, workdir, monkeypatch, steps):
    """Trains up to a step on the first devices, as many as the mesh has."""
    data, fsdp, tensor = mesh
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
    config.train.steps = steps
    make, devices = parallel.make_mesh, jax.devices()[: data * fsdp * tensor]
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "make_mesh", lambda settings, _=None: make(settings, devices))
        return train(build(config), workdir)


@pytest.mark.slow
def test_a_run_over_many_meshes_has_the_losses_and_samples_of_one_device(tiny_config, with_lpl, tmp_path, monkeypatch):
    """Each device sums its own rows, and matrices are summed in parts, so float32 rounds otherwise: 2^-24 a sum. The
    masks of LPL's outliers are the one step in it where rounding could decide more than a last digit."""
    changes = dict(train__log_every=1, train__checkpoint_every=2, **with_lpl)
    walked, still = tmp_path / "walked", tmp_path / "still"
    for number, mesh in enumerate(CHAIN, 1):
        part(tiny_config(**changes), mesh, walked, monkeypatch, 2 * number)
    part(tiny_config(**changes), (1, 1, 1), still, monkeypatch, STEPS)
    found, expected = ({row["step"]: row["loss"] for row in read_metrics(run)} for run in (walked, still))
    assert list(found) == list(range(1, STEPS + 1))
    off = max(abs(found[step] / expected[step] - 1) for step in expected)
    print(f"losses off by at most {off:.2g}")
    assert off < 1e-5
    images = [open_run(run).sampler(steps=2, seed=1)([0, 1, 1]) for run in (walked, still)]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
