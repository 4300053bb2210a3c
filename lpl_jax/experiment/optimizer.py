"""The optimizer's settings."""

import dataclasses

from lpl_jax.errors import InputError

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
