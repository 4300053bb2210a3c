"""Sampler trajectories against diffusers' schedulers, the same small network written in JAX and in PyTorch."""

import numpy as np
import pytest
import torch

from lpl_jax.diffusion import paradigm
from lpl_jax.tools.parity.samplers import DDIM, ddim, ddim_scheduler, diffusers_euler, example, flow_trajectory

# Latents stay of O(1), every step rounds about ten times (6e-8 each) and the trajectory is at most 50 steps long; the
# float32 tables of diffusers (a running product over the schedule) are the larger part. Together below 1e-5.
TOLERANCE = 1e-5


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize(("name", "spacing", "offset"), DDIM.values())
def test_ddim_trajectory_equals_diffusers(name, spacing, offset, steps):
    grids, ours, theirs = ddim(name, spacing, offset, steps)
    np.testing.assert_array_equal(*grids)
    scale = max(1.0, np.abs(theirs).max())
    assert scale < 6
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * scale)


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_flow_euler_trajectory_equals_diffusers(shift, steps):
    noise, weight = example(seed=0)
    ours, theirs = flow_trajectory(noise, weight, "euler", shift, steps), diffusers_euler(noise, weight, shift, steps)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_add_noise_and_velocity_equal_diffusers():
    scheduler, p = ddim_scheduler("v"), paradigm("v")
    noise, z0, t = example(seed=0)[0], example(seed=1)[0], np.array([3, 999])
    arguments = torch.tensor(z0), torch.tensor(noise), torch.tensor(t)
    np.testing.assert_allclose(p.add_noise(z0=z0, noise=noise, t=t), scheduler.add_noise(*arguments), atol=TOLERANCE)
    np.testing.assert_allclose(p.target(z0=z0, noise=noise, t=t), scheduler.get_velocity(*arguments), atol=TOLERANCE)
