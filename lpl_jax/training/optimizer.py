"""AdamW with warm-up and clipping."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lpl_jax.errors import InputError
from lpl_jax.parallel import leaf_path

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    learning_rate: the value after the warm-up.
    warmup_steps: the rate grows linearly over this many updates; 0 for none.
    schedule: after the warm-up, "constant" or "cosine" (to 0 at `total_steps`).
    clip_norm: largest global norm of the gradient; None for no clipping.
    weight_decay: decoupled, applied to kernels only.
    total_steps: updates in the whole run; needed by "cosine" and refused otherwise.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 1000
    schedule: str = "constant"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    total_steps: int | None = None

    def __post_init__(self):
        def require(ok: bool, field: str, allowed: str):
            if not ok:
                raise InputError(f"optimizer.{field} is {getattr(self, field)!r}; it must be {allowed}")

        require(self.schedule in SCHEDULES, "schedule", " or ".join(SCHEDULES))
        require(self.learning_rate > 0, "learning_rate", "positive")
        require(self.warmup_steps >= 0, "warmup_steps", "0 (none) or more")
        require(0 <= self.b1 < 1, "b1", "in [0, 1)")
        require(0 <= self.b2 < 1, "b2", "in [0, 1)")
        require(self.eps > 0, "eps", "positive")
        require(self.weight_decay >= 0, "weight_decay", "0 (none) or more")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or None for no clipping")
        if self.schedule == "cosine":
            ok = self.total_steps is not None and self.total_steps > self.warmup_steps
            require(ok, "total_steps", f"more than warmup_steps={self.warmup_steps} with schedule 'cosine'")
        else:
            require(self.total_steps is None, "total_steps", f"None with schedule {self.schedule!r}, which has no end")


def learning_rate_schedule(config: OptimizerConfig) -> Callable[[jax.Array | int], jax.Array | np.floating]:
    """Learning rate of the update made at step n (counted from 0), as a float32 scalar.

    For an int it is computed on the host: on a device it would come after all steps that are waiting there.

    Warm-up: (n + 1) / warmup_steps of the full rate, so the first update does something and update `warmup_steps` is
    the first at the full rate.
    """

    def schedule(step):
        xp = np if isinstance(step, int) else jnp
        step = xp.asarray(step, xp.float32)
        factor = xp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "cosine":
            done = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
            factor *= 0.5 * (1 + xp.cos(xp.pi * xp.clip(done, 0.0, 1.0)))
        return config.learning_rate * factor

    return schedule


def decay_mask(params):
    """True for the leaves that weight decay acts on: those named `kernel`.

    By name, as in a stack of scanned layers biases and scales have two axes too.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_path(path).rsplit("/", 1)[-1] == "kernel", params)


def make_optimizer(config: OptimizerConfig) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
    """The optimizer and its learning rate as a function of the step (for the metrics)."""
    schedule = learning_rate_schedule(config)
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule
