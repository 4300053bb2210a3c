"""Sampler trajectories against diffusers' schedulers, the same small network written in JAX and in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from lpl_jax.diffusion import ddim_grid, paradigm, sample

RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 4, 4, 4)).astype(np.float32)
WEIGHT = (0.5 * RNG.standard_normal((4, 4))).astype(np.float32)

# Latents stay of O(1), every step rounds about ten times (6e-8 each) and the trajectory is at most 50 steps long; the
# float32 tables of diffusers (a running product over the schedule) are the larger part. Together below 1e-5.
TOLERANCE = 1e-5


def network(xp, z, weight, time, gain):
    """gain * z is the best prediction for N(0, 1) data; the tanh makes it depend on everything."""
    return gain * z + 0.1 * xp.tanh(z @ weight + time)


def ddim_scheduler(**options):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        **options,
    )


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize(
    ("name", "spacing", "offset"),
    [("eps", "trailing", 0), ("eps", "leading", 0), ("eps", "leading", 1), ("v", "trailing", 0)],
)
def test_ddim_trajectory_equals_diffusers(name, spacing, offset, steps):
    p = paradigm(name)
    scheduler = ddim_scheduler(
        prediction_type="epsilon" if name == "eps" else "v_prediction",
        rescale_betas_zero_snr=name == "v",
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(ddim_grid(p, steps, spacing, offset), scheduler.timesteps)

    z, expected = torch.tensor(NOISE), []
    for t in scheduler.timesteps:
        gain = (1 - scheduler.alphas_cumprod[t]).sqrt() if name == "eps" else 0.0
        z = scheduler.step(network(torch, z, torch.tensor(WEIGHT), t / 1000, gain), t, z).prev_sample
        expected.append(z.numpy())

    def denoise(z, t):
        t = t[:, None, None, None]
        return network(jnp, z, WEIGHT, t / 1000, p.alpha_sigma(t)[1] if name == "eps" else 0.0)

    latents, trajectory = jax.jit(
        lambda noise: sample(denoise, noise, p, steps=steps, spacing=spacing, offset=offset, return_trajectory=True)
    )(NOISE)
    scale = max(1.0, np.abs(expected).max())
    assert scale < 6
    np.testing.assert_allclose(trajectory, np.stack(expected), atol=TOLERANCE * scale)
    np.testing.assert_array_equal(latents, trajectory[-1])


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_flow_euler_trajectory_equals_diffusers(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    z, expected = torch.tensor(NOISE), []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        z = scheduler.step(network(torch, z, torch.tensor(WEIGHT), sigma, 2 * sigma - 1), t, z).prev_sample
        expected.append(z.numpy())

    def denoise(z, t):
        t = t[:, None, None, None]
        return network(jnp, z, WEIGHT, t, 2 * t - 1)

    _, trajectory = jax.jit(
        lambda noise: sample(
            denoise,
            noise,
            paradigm("flow", schedule_rescale=shift),
            sampler="euler",
            steps=steps,
            return_trajectory=True,
        )
    )(NOISE)
    np.testing.assert_allclose(trajectory, np.stack(expected), atol=TOLERANCE)


def test_add_noise_and_velocity_equal_diffusers():
    scheduler = ddim_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    z0, t = RNG.standard_normal(NOISE.shape).astype(np.float32), np.array([3, 999])
    arguments = torch.tensor(z0), torch.tensor(NOISE), torch.tensor(t)
    p = paradigm("v")
    np.testing.assert_allclose(p.add_noise(z0=z0, noise=NOISE, t=t), scheduler.add_noise(*arguments), atol=TOLERANCE)
    np.testing.assert_allclose(p.target(z0=z0, noise=NOISE, t=t), scheduler.get_velocity(*arguments), atol=TOLERANCE)
