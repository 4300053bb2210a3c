"""The rk4 sampler against torchdiffeq's fixed-grid solver of that name."""

import numpy as np
import pytest

from lpl_jax.tools.parity.samplers import example, flow_trajectory, torchdiffeq_rk4


@pytest.mark.parametrize("steps", [1, 25])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_trajectory_equals_torchdiffeq(shift, steps):
    noise, weight = example(seed=3)
    ours, theirs = flow_trajectory(noise, weight, "rk4", shift, steps), torchdiffeq_rk4(noise, weight, shift, steps)
    assert ours.shape == theirs.shape == (steps, *noise.shape)
    # float32 rounds at 6e-8, a step some thirty times
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    # the comparison would see another solver: Euler's is further away by four orders of magnitude
    euler = flow_trajectory(noise, weight, "euler", shift, steps)
    assert np.abs(euler - theirs).max() > 1e-3
