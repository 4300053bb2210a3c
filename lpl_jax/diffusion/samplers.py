"""Deterministic samplers, one `lax.scan` over a time grid that is known at trace time.

eps and v: DDIM with eta = 0 (Song et al. 2021). flow: Euler, or the fourth-order Runge-Kutta "3/8 rule", both on
t_k = 1 - k / steps, moved by the paradigm's `schedule_rescale` as training was. z0_hat is never clipped.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int32, Num

from lpl_jax.diffusion import schedules
from lpl_jax.diffusion.paradigms import DiscreteParadigm, FlowParadigm, Paradigm, check_same_shape
from lpl_jax.errors import InputError

SAMPLERS = ("ddim", "euler", "rk4")
SPACINGS = ("trailing", "leading")

Latents: TypeAlias = Float32[Array, "b *latent"]
Trajectory: TypeAlias = Float32[Array, "steps b *latent"]
Denoise: TypeAlias = Callable[[Latents, Num[Array, "b"]], Float[Array, "b *latent"]]


# fmt: off
@overload
def sample(
    denoise: Denoise, noise: Float[Array, "b *latent"], paradigm: Paradigm, *, sampler: str = ..., steps: int = ...,
    spacing: str = ..., offset: int = ..., return_trajectory: Literal[False] = ...,
) -> Latents: ...
@overload
def sample(
    denoise: Denoise, noise: Float[Array, "b *latent"], paradigm: Paradigm, *, sampler: str = ..., steps: int = ...,
    spacing: str = ..., offset: int = ..., return_trajectory: Literal[True],
) -> tuple[Latents, Trajectory]: ...
# fmt: on
def sample(
    denoise: Denoise,
    noise: Float[Array, "b *latent"],
    paradigm: Paradigm,
    *,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "trailing",
    offset: int = 0,
    return_trajectory: bool = False,
) -> Latents | tuple[Latents, Trajectory]:
    """Integrate from noise to latents; jittable, with everything but `noise` static.

    Args:
      denoise: pure function (z (B, ...) float32, t (B,)) -> prediction of z's shape; t is in the paradigm's own unit
        (apply `paradigm.time_input` for the network). Guidance goes inside, see `guided`.
      noise: (B, ...) drawn from N(0, I).
      sampler: "ddim" for eps and v, "euler" or "rk4" for flow.
      steps: steps of the grid. The network is evaluated once a step, by rk4 four times.
      spacing, offset: the grid of ddim, see `ddim_grid`.
      return_trajectory: also return z after every step, (steps, B, ...).

    Returns:
      latents (B, ...) float32, or (latents, trajectory).

    Raises InputError for a sampler, number of steps, spacing or offset that the paradigm does not have.
    """
    check_sampler(paradigm, sampler, steps, spacing, offset)
    if isinstance(paradigm, DiscreteParadigm):
        advance, grid = _ddim(denoise, paradigm, steps, spacing, offset)
    else:
        assert isinstance(paradigm, FlowParadigm)
        advance, grid = _euler(denoise) if sampler == "euler" else _rk4(denoise), _flow_intervals(paradigm, steps)

    def body(z, point):
        z = advance(z, *point)
        return z, z if return_trajectory else None

    latents, trajectory = jax.lax.scan(body, noise.astype(jnp.float32), grid)
    return latents if trajectory is None else (latents, trajectory)


def check_sampler(paradigm: Paradigm, sampler: str, steps: int, spacing: str = "trailing", offset: int = 0) -> None:
    """Raises InputError for a sampler, number of steps, spacing or offset that the paradigm does not have."""
    if sampler not in paradigm.samplers:
        raise InputError(
            f"sampler of paradigm {paradigm.name!r} must be one of {', '.join(paradigm.samplers)}, got {sampler!r}"
        )
    if isinstance(paradigm, DiscreteParadigm):
        ddim_grid(paradigm, steps, spacing, offset)
        return
    if spacing != "trailing" or offset != 0:
        raise InputError(f"spacing and offset belong to ddim; {sampler!r} got spacing={spacing!r}, offset={offset}")
    _check_steps(steps, None)


def ddim_grid(
    paradigm: DiscreteParadigm, steps: int, spacing: str = "trailing", offset: int = 0
) -> Int32[np.ndarray, "{steps}"]:
    """Decreasing int32 indices (steps,) at which the network is evaluated, on the host.

    "trailing" starts at the last index, as zero terminal SNR needs (Lin et al. 2024, Table 2): 999, 979, .., 19 for 50
    of 1000. "leading" ends at `offset` (0, or 1 as Stable Diffusion): 980, 960, .., 0 and misses the noisiest indices.

    Raises InputError for steps, spacing or offset that do not fit the schedule.
    """
    total = paradigm.train_steps
    _check_steps(steps, total)
    if spacing not in SPACINGS:
        raise InputError(f"spacing of ddim must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if spacing == "trailing":
        if offset != 0:
            raise InputError(f"offset belongs to spacing='leading'; spacing='trailing' got offset={offset}")
        return (np.round(np.arange(total, 0, -total / steps)[:steps]) - 1).astype(np.int32)
    if paradigm.zero_terminal_snr:
        raise InputError(
            "spacing='leading' never reaches the last index, so it cannot start from noise with zero terminal SNR: "
            "use spacing='trailing', or zero_terminal_snr=False"
        )
    stride = total // steps
    largest = total - 1 - stride * (steps - 1)
    if not 0 <= offset <= largest:
        raise InputError(f"offset must be between 0 and {largest} for {steps} of {total} steps, got {offset}")
    return (np.arange(steps)[::-1] * stride + offset).astype(np.int32)


def flow_grid(paradigm: FlowParadigm, steps: int) -> Float64[np.ndarray, "{steps}+1"]:
    """Decreasing times (steps + 1,) from exactly 1 to exactly 0, float64 on the host."""
    _check_steps(steps, None)
    return schedules.shift_time(1.0 - np.arange(steps + 1) / steps, paradigm.schedule_rescale)


def _ddim(denoise: Denoise, paradigm: DiscreteParadigm, steps: int, spacing: str, offset: int):
    """DDIM: z <- alpha_next * z0_hat + sigma_next * eps_hat; the point after the last one is clean (alpha 1, sigma 0).

    "Next" is the next point of the grid, so that the network always sees the level that z really has, and the last step
    always ends clean, also where `steps` does not divide the schedule.
    """
    indices = ddim_grid(paradigm, steps, spacing, offset)
    alpha, sigma = paradigm.tables()
    alpha_next = np.append(alpha[indices[1:]], 1.0).astype(np.float32)
    sigma_next = np.append(sigma[indices[1:]], 0.0).astype(np.float32)

    def advance(z, index, alpha_next, sigma_next):
        t = jnp.full(z.shape[0], index, jnp.int32)
        z0_hat, eps_hat = paradigm.estimate(z_t=z, prediction=denoise(z, t), t=t)
        return alpha_next * z0_hat + sigma_next * eps_hat

    return advance, (indices, alpha_next, sigma_next)


def _euler(denoise: Denoise):
    """Euler: z <- z + (t_next - t) * v(z, t); the network is never evaluated at t = 0."""

    def advance(z, t, t_next):
        return z + (t_next - t) * _velocity(denoise, z, t)

    return advance


def _rk4(denoise: Denoise):
    """Kutta's 3/8 rule: nodes 0, 1/3, 2/3, 1 with weights 1/8, 3/8, 3/8, 1/8 (the "rk4" of the torchdiffeq solver)."""

    def advance(z, t, t_next):
        h = t_next - t
        k1 = _velocity(denoise, z, t)
        k2 = _velocity(denoise, z + h * k1 / 3, t + h / 3)
        k3 = _velocity(denoise, z + h * (k2 - k1 / 3), t + 2 * h / 3)
        k4 = _velocity(denoise, z + h * (k1 - k2 + k3), t_next)
        return z + h * (k1 + 3 * (k2 + k3) + k4) / 8

    return advance


def _velocity(denoise: Denoise, z: Latents, t: Float32[Array, ""]) -> Latents:
    prediction = denoise(z, jnp.full(z.shape[0], t, jnp.float32))
    check_same_shape(z_t=z, prediction=prediction)
    return prediction.astype(jnp.float32)


def _flow_intervals(paradigm: FlowParadigm, steps: int) -> tuple[np.ndarray, np.ndarray]:
    times = flow_grid(paradigm, steps).astype(np.float32)
    return times[:-1], times[1:]


def _check_steps(steps: int, most: int | None) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1 or (most is not None and steps > most):
        possible = "an integer of at least 1" if most is None else f"an integer between 1 and {most}"
        raise InputError(f"steps must be {possible}, got {steps!r}")
