"""The three training paradigms (eps, v, flow) under one contract.

The forward process is always z_t = alpha * z0 + sigma * noise, and the network always regresses a known linear
combination of the two, D = p * noise - q * z0. Inverting this pair of equations gives both estimates at once:

    z0_hat  = (p * z_t - sigma * D) / det
    eps_hat = (q * z_t + alpha * D) / det        with det = alpha * p + sigma * q

| name | alpha, sigma          | p, q         | det   | z0_hat (Table 1)          | eps_hat               |
|------|-----------------------|--------------|-------|---------------------------|-----------------------|
| eps  | discrete schedule     | 1, 0         | alpha | (z_t - sigma*D) / alpha   | D                     |
| v    | discrete, zero SNR    | alpha, sigma | 1     | alpha*z_t - sigma*D       | sigma*z_t + alpha*D   |
| flow | 1 - t, t              | 1, 1         | 1     | z_t - t*D                 | z_t + (1-t)*D         |

A paradigm is a frozen, hashable configuration without arrays: pass it to `jax.jit` as a static argument. Times `t` have
shape (B,) (or any leading part of the latents' shape, down to a scalar): int32 indices for eps and v, float32 in [0, 1]
for flow. Everything returned is float32, whatever the dtype of the network: alpha gets down to 0.03, and dividing a
bfloat16 difference by it would leave nothing of z0_hat.

Arrays go by keyword, `paradigm.estimate(z_t=z_t, prediction=prediction, t=t)`: latents and predictions have one shape,
so that nothing else would tell when they are exchanged.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num, PRNGKeyArray
from typing_extensions import override

from lpl_jax.diffusion import schedules, timesteps
from lpl_jax.errors import InputError, nearest
from lpl_jax.fields import Part, between, check_names, field, one_of, whole
from lpl_jax.limits import NOISE_LEVEL

Times: TypeAlias = Num[Array, "*batch"]
PerTime: TypeAlias = Float32[Array, "*batch"]  # a coefficient for each time
Coefficients: TypeAlias = tuple[PerTime, PerTime]
Latents: TypeAlias = Float[Array, "*latents"]  # also noise and predictions, which have the shape of latents
Latents32: TypeAlias = Float32[Array, "*latents"]

FLOW_TIME_SCALE = 1000.0  # flow's t in [0, 1] is fed to the network on the scale of the discrete indices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paradigm(Part, abc.ABC, section="paradigm"):
    """What all paradigms share. `schedule_rescale` is the image side over that of the schedule (512 / 256 -> 2)."""

    name: ClassVar[str]
    samplers: ClassVar[tuple[str, ...]]

    schedule_rescale: float = field(
        1.0, "image side over that of the schedule: 2.0 for 512 px with the 256 px schedule", between(0.001, 1000)
    )

    @abc.abstractmethod
    def alpha_sigma(self, t: Times) -> Coefficients:
        """(alpha, sigma) at t, float32 of t's shape. An index outside the schedule gives NaN."""

    @abc.abstractmethod
    def sample_t(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Times:
        """Draw training times."""

    @abc.abstractmethod
    def time_of(self, u: PerTime) -> Times:
        """The training times of uniform numbers u in [0, 1): distributed as those that are drawn, and monotone in u."""

    @abc.abstractmethod
    def time_input(self, t: Times) -> PerTime:
        """What the network is fed for t: float32 of about 0 to 1000."""

    @abc.abstractmethod
    def active_fraction(self, tau: float) -> float:
        """Share of drawn training times with noise_level(t) <= tau (host float; exact, not sampled)."""

    @abc.abstractmethod
    def combination(self, *, alpha: PerTime, sigma: PerTime) -> Coefficients:
        """(p, q) of the regression target p * noise - q * z0."""

    def noise_level(self, t: Times) -> PerTime:
        """Noise level sigma / alpha, which the perceptual gate is compared with; inf where alpha is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha

    def add_noise(self, *, z0: Latents, noise: Latents, t: Times) -> Latents32:
        """z_t = alpha * z0 + sigma * noise, float32."""
        check_same_shape(z0=z0, noise=noise)
        alpha, sigma = _broadcast(self.alpha_sigma(t), z0)
        return alpha * z0 + sigma * noise

    def target(self, *, z0: Latents, noise: Latents, t: Times) -> Latents32:
        """What the network regresses, p * noise - q * z0, float32."""
        check_same_shape(z0=z0, noise=noise)
        alpha, sigma = self.alpha_sigma(t)
        p, q = _broadcast(self.combination(alpha=alpha, sigma=sigma), z0)
        return p * noise - q * z0

    def estimate(self, *, z_t: Latents, prediction: Latents, t: Times) -> tuple[Latents32, Latents32]:
        """(z0_hat, eps_hat), float32, from the network's output. Both gradients are finite at every valid t."""
        check_same_shape(z_t=z_t, prediction=prediction)
        alpha, sigma = self.alpha_sigma(t)
        p, q = self.combination(alpha=alpha, sigma=sigma)
        det = alpha * p + sigma * q
        # Divide the small coefficients, not the latents; alpha / alpha is exactly 1, so eps_hat of eps is exactly D.
        a, b, c, d = _broadcast((p / det, sigma / det, q / det, alpha / det), z_t)
        return a * z_t - b * prediction, c * z_t + d * prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteParadigm(Paradigm):
    """Variance preserving diffusion on `train_steps` indices; t is drawn uniformly from all of them."""

    samplers: ClassVar[tuple[str, ...]] = ("ddim",)

    zero_terminal_snr: bool = field(False, "eps, v: rescale the schedule to end in pure noise (v: on)")
    train_steps: int = field(1000, "eps, v: number of timesteps", whole(2, 100_000))
    beta_start: float = field(0.00085, "eps, v: first beta", between(1e-9, 0.999))
    beta_end: float = field(0.012, "eps, v: last beta", between(1e-9, 0.999))

    @override
    def check(self) -> None:
        if not self.beta_start < self.beta_end:
            raise InputError(
                f"paradigm.beta_end={self.beta_end} is not possible: it must be above beta_start={self.beta_start}"
            )

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) of all indices: read-only float64 arrays on the host, cached."""
        return schedules.alpha_sigma_tables(
            self.train_steps, self.beta_start, self.beta_end, self.zero_terminal_snr, self.schedule_rescale
        )

    def alpha_sigma(self, t: Times) -> Coefficients:
        """Of the tables; raises InputError unless t are integers."""
        t = jnp.asarray(t)
        if not jnp.issubdtype(t.dtype, jnp.integer):
            raise InputError(f"t of {self.name!r} must be integer indices 0..{self.train_steps - 1}, got {t.dtype}")
        alpha, sigma = (
            jnp.asarray(table, jnp.float32).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            for table in self.tables()
        )
        return alpha, sigma

    def sample_t(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Times:
        """Uniform over all indices, int32."""
        return jax.random.randint(key, shape, 0, self.train_steps, jnp.int32)

    def time_of(self, u: PerTime) -> Times:
        """Every index is given an equal part of [0, 1)."""
        return jnp.minimum((u * self.train_steps).astype(jnp.int32), self.train_steps - 1)

    def time_input(self, t: Times) -> PerTime:
        """The index itself."""
        return jnp.asarray(t).astype(jnp.float32)

    def active_fraction(self, tau: float) -> float:
        """By counting the indices under tau."""
        alpha, sigma = self.tables()
        return float(np.mean(np.divide(sigma, alpha, out=np.full_like(alpha, np.inf), where=alpha > 0) <= tau))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpsParadigm(DiscreteParadigm):
    """The network predicts the noise. Impossible with zero terminal SNR, where z0_hat would divide by alpha = 0."""

    name: ClassVar[str] = "eps"

    @override
    def check(self) -> None:
        super().check()
        if self.zero_terminal_snr:
            raise InputError(
                "paradigm.zero_terminal_snr=True is impossible with 'eps' (z0_hat divides by alpha = 0): "
                "use zero_terminal_snr=False, or paradigm 'v' or 'flow'"
            )
        alpha, sigma = self.tables()
        if not sigma[-1] <= NOISE_LEVEL * alpha[-1]:
            raise InputError(
                f"paradigm.train_steps={self.train_steps} with beta_end={self.beta_end} ends in noise alone (alpha = "
                f"{alpha[-1]:.1e}), where 'eps' has no estimate of the image: take fewer steps, smaller betas, or "
                "paradigm 'v'"
            )

    def combination(self, *, alpha: PerTime, sigma: PerTime) -> Coefficients:
        """Ones and zeros: the target is the noise."""
        return jnp.ones_like(alpha), jnp.zeros_like(sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VParadigm(DiscreteParadigm):
    """The network predicts v = alpha * noise - sigma * z0; the last index is pure noise by default."""

    name: ClassVar[str] = "v"

    zero_terminal_snr: bool = field(True, "rescale the schedule to end in pure noise")

    def combination(self, *, alpha: PerTime, sigma: PerTime) -> Coefficients:
        """(alpha, sigma) themselves: the target is v."""
        return alpha, sigma


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowParadigm(Paradigm):
    """Flow matching on straight paths: alpha = 1 - t, sigma = t, and the network predicts noise - z0.

    `schedule_rescale` moves the drawn times and the sampler's grid (`schedules.shift_time`); alpha_sigma(t) itself does
    not change. `time_sampling` is "mode" (with `mode_scale` in [-1, 1.7519]), "uniform" or "logit_normal".
    """

    name: ClassVar[str] = "flow"
    samplers: ClassVar[tuple[str, ...]] = ("euler", "rk4")

    time_sampling: str = field(
        "mode", "flow: distribution of t: mode | uniform | logit_normal", one_of(*timesteps.FLOW_TIME_SAMPLING)
    )
    mode_scale: float = field(
        1.29,
        "flow, mode: scale of the heavy tails",
        between(timesteps.MODE_SCALE_MIN, timesteps.MODE_SCALE_MAX),
    )
    logit_mean: float = field(0.0, "flow, logit_normal: mean", between(-10, 10))
    logit_std: float = field(1.0, "flow, logit_normal: standard deviation", between(0.001, 100))

    def alpha_sigma(self, t: Times) -> Coefficients:
        """(1 - t, t); raises InputError unless t are floats."""
        t = jnp.asarray(t)
        if not jnp.issubdtype(t.dtype, jnp.floating):
            raise InputError(f"t of 'flow' must be floats between 0 and 1, got {t.dtype}")
        t = t.astype(jnp.float32)
        return 1.0 - t, t

    def _time_distribution(self) -> dict[str, Any]:
        return dict(
            kind=self.time_sampling,
            mode_scale=self.mode_scale,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
        )

    def sample_t(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Times:
        """From the distribution that `time_sampling` names, shifted by `schedule_rescale`."""
        t = timesteps.sample_flow_time(key, shape, **self._time_distribution())
        return schedules.shift_time(t, self.schedule_rescale)

    def time_of(self, u: PerTime) -> Times:
        """By the inverse of that distribution's cumulative function, or its mirror image."""
        return schedules.shift_time(timesteps.flow_time(u, **self._time_distribution()), self.schedule_rescale)

    def time_input(self, t: Times) -> PerTime:
        """1000 t."""
        return FLOW_TIME_SCALE * jnp.asarray(t).astype(jnp.float32)

    def active_fraction(self, tau: float) -> float:
        """By the distribution's cumulative function."""
        tau = tau / self.schedule_rescale  # undo the shift, which multiplies t / (1 - t)
        bound = 1.0 if math.isinf(tau) else tau / (1.0 + tau)
        return timesteps.flow_time_cdf(bound, **self._time_distribution())

    def combination(self, *, alpha: PerTime, sigma: PerTime) -> Coefficients:
        """Ones: the target is noise - z0."""
        return jnp.ones_like(alpha), jnp.ones_like(sigma)


PARADIGMS: dict[str, type[Paradigm]] = {cls.name: cls for cls in (EpsParadigm, VParadigm, FlowParadigm)}


def paradigm(name: str, *, schedule_rescale: float = 1.0, **options) -> Paradigm:
    """Build the paradigm "eps", "v" or "flow".

    Options of eps and v: `zero_terminal_snr` (False for eps, True for v), `train_steps`, `beta_start`, `beta_end`;
    of flow: `time_sampling`, `mode_scale`, `logit_mean`, `logit_std`.

    Raises InputError for an unknown name or option, or a value out of range.
    """
    if name not in PARADIGMS:
        raise InputError(
            f"paradigm.name={name!r} is not possible{nearest(name, PARADIGMS)}: it must be one of "
            f"{', '.join(PARADIGMS)}"
        )
    cls = PARADIGMS[name]
    check_names(options, [item.name for item in dataclasses.fields(cls)], f"paradigm.{{}} of {name!r}")
    return cls(schedule_rescale=schedule_rescale, **options)


def _broadcast(coefficients: Sequence[jax.Array], like: jax.Array) -> list[jax.Array]:
    """Append axes to per-sample coefficients so that they multiply arrays of `like`'s shape.

    The coefficients are float32 arrays, so their products with bfloat16 latents or predictions are float32 too.
    """
    shape = coefficients[0].shape
    if shape != like.shape[: len(shape)]:
        raise InputError(f"t of shape {shape} does not fit latents of shape {like.shape}: one t per sample is needed")
    return [c.reshape(shape + (1,) * (like.ndim - len(shape))) for c in coefficients]


def check_same_shape(**arrays: jax.Array) -> None:
    """Raise InputError, which names the arrays by their keywords, rather than broadcast."""
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) > 1:
        raise InputError(f"{' and '.join(arrays)} must have the same shape, got {' and '.join(map(str, shapes))}")
