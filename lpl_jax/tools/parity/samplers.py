"""Sampler trajectories against diffusers' schedulers and torchdiffeq, the same small network in JAX and in PyTorch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchdiffeq
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from lpl_jax.diffusion import ddim_grid, flow_grid, paradigm, sample
from lpl_jax.diffusion.paradigms import DiscreteParadigm, FlowParadigm
from lpl_jax.tools.parity.comparison import TRAJECTORY, Comparison, Group, Settings, close, equal

STEPS = 50
DDIM = {
    "DDIM, eps, trailing": ("eps", "trailing", 0),
    "DDIM, eps, leading": ("eps", "leading", 0),
    "DDIM, eps, leading from 1": ("eps", "leading", 1),
    "DDIM, v with zero terminal SNR, trailing": ("v", "trailing", 0),
}


def groups(settings: Settings) -> list[Group]:
    """What is compared: trajectories of all samplers, and the schedules."""
    rows = [Group(name, partial(_ddim, *options, settings.seed)) for name, options in DDIM.items()]
    rows += [Group(f"flow, Euler, shift {shift:g}", partial(_euler, shift, settings.seed)) for shift in (1.0, 2.0, 3.0)]
    rows += [Group(f"flow, RK4, shift {shift:g}", partial(_rk4, shift, settings.seed)) for shift in (1.0, 2.0)]
    return [*rows, Group("schedules", partial(_schedule, settings.seed))]


def network(xp, z, weight, time, gain):
    """gain * z is the best prediction for data from N(0, 1); the tanh makes it depend on everything."""
    return gain * z + 0.1 * xp.tanh(z @ weight + time)


def example(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise (2, 4, 4, 4) and the network's weight (4, 4)."""
    rng = np.random.default_rng(seed)
    noise, weight = rng.standard_normal((2, 4, 4, 4)), 0.5 * rng.standard_normal((4, 4))
    return noise.astype(np.float32), weight.astype(np.float32)


def ddim_scheduler(name: str, spacing: Any = "trailing", offset: int = 0) -> Any:
    """diffusers' scheduler of our paradigm `eps` or `v`."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="epsilon" if name == "eps" else "v_prediction",
        rescale_betas_zero_snr=name == "v",
        timestep_spacing=spacing,
        steps_offset=offset,
    )


def _ddim(name: str, spacing: str, offset: int, seed: int) -> Iterator[Comparison]:
    grids, ours, theirs = ddim(name, spacing, offset, STEPS, seed)
    yield equal("timesteps", *grids)
    yield close(f"trajectory of {STEPS} steps", ours, theirs, TRAJECTORY)


def ddim(name: str, spacing: str, offset: int, steps: int, seed: int = 0) -> tuple[tuple, np.ndarray, np.ndarray]:
    """Of our DDIM sampler and of diffusers' scheduler: grids of timesteps, and z after every step, (steps, B, ...)."""
    noise, weight = example(seed)
    p, scheduler = paradigm(name), ddim_scheduler(name, spacing, offset)
    scheduler.set_timesteps(steps)
    z, expected = torch.tensor(noise), []
    for t in scheduler.timesteps:
        gain = (1 - scheduler.alphas_cumprod[t]).sqrt() if name == "eps" else 0.0
        z = scheduler.step(network(torch, z, torch.tensor(weight), t / 1000, gain), t, z).prev_sample
        expected.append(z.numpy())

    def denoise(z, t):
        t = t[:, None, None, None]
        return network(jnp, z, weight, t / 1000, p.alpha_sigma(t)[1] if name == "eps" else 0.0)

    ours = _trajectory(denoise, noise, p, steps=steps, spacing=spacing, offset=offset)
    assert isinstance(p, DiscreteParadigm)
    return (ddim_grid(p, steps, spacing, offset), scheduler.timesteps), ours, np.stack(expected)


def _euler(shift: float, seed: int) -> Iterator[Comparison]:
    noise, weight = example(seed)
    ours = flow_trajectory(noise, weight, "euler", shift, STEPS)
    yield close(f"trajectory of {STEPS} steps", ours, diffusers_euler(noise, weight, shift, STEPS), TRAJECTORY)


def diffusers_euler(noise: np.ndarray, weight: np.ndarray, shift: float, steps: int) -> np.ndarray:
    """z after every step of diffusers' Euler scheduler of flow matching, (steps, B, ...)."""
    scheduler = _euler_scheduler(shift, steps)
    z, expected = torch.tensor(noise), []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):  # the sigmas end with a 0
        z = scheduler.step(network(torch, z, torch.tensor(weight), sigma, 2 * sigma - 1), t, z).prev_sample
        expected.append(z.numpy())
    return np.stack(expected)


def _euler_scheduler(shift: float, steps: int) -> Any:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    return scheduler


def _rk4(shift: float, seed: int) -> Iterator[Comparison]:
    noise, weight = example(seed)
    ours = flow_trajectory(noise, weight, "rk4", shift, STEPS)
    yield close(f"trajectory of {STEPS} steps", ours, torchdiffeq_rk4(noise, weight, shift, STEPS), TRAJECTORY)


def flow_trajectory(noise: np.ndarray, weight: np.ndarray, sampler: str, shift: float, steps: int) -> np.ndarray:
    """z after every step of our sampler, (steps, B, ...)."""

    def denoise(z, t):
        t = t[:, None, None, None]
        return network(jnp, z, weight, t, 2 * t - 1)

    return _trajectory(denoise, noise, paradigm("flow", schedule_rescale=shift), sampler=sampler, steps=steps)


def torchdiffeq_rk4(noise: np.ndarray, weight: np.ndarray, shift: float, steps: int) -> np.ndarray:
    """z after every step of torchdiffeq's fixed-grid "rk4" on the shifted grid, (steps, B, ...).

    Its grid is the times at which an answer is wanted, where no step size is given.
    """
    times = np.linspace(1.0, 0.0, steps + 1)
    times = torch.tensor(shift * times / (1 + (shift - 1) * times), dtype=torch.float32)
    with torch.no_grad():
        trajectory: Any = torchdiffeq.odeint(
            lambda t, z: network(torch, z, torch.tensor(weight), t, 2 * t - 1), torch.tensor(noise), times, method="rk4"
        )
    return trajectory[1:].numpy()


def _trajectory(denoise, noise, p, **options) -> np.ndarray:
    run = jax.jit(lambda z: sample(denoise, z, p, return_trajectory=True, **options)[1])
    return np.asarray(run(noise))


def _schedule(seed: int) -> Iterator[Comparison]:
    noise, _ = example(seed)
    clean, _ = example(seed + 1)
    t, p, scheduler = np.array([3, 999]), paradigm("v"), ddim_scheduler("v")
    arguments = torch.tensor(clean), torch.tensor(noise), torch.tensor(t)
    ours = {"noise": jnp.asarray(noise), "t": jnp.asarray(t)}
    yield close(
        "noisy latents, v with zero terminal SNR",
        p.add_noise(z0=jnp.asarray(clean), **ours),
        scheduler.add_noise(*arguments),
        TRAJECTORY,
    )
    yield close(
        "velocity, v with zero terminal SNR",
        p.target(z0=jnp.asarray(clean), **ours),
        scheduler.get_velocity(*arguments),
        TRAJECTORY,
    )
    ours = flow_grid(FlowParadigm(schedule_rescale=3.0), STEPS)
    yield close("flow times, shift 3", ours, _euler_scheduler(3.0, STEPS).sigmas, TRAJECTORY)
