"""Optimizer, moving averages, and the length of a run."""

import dataclasses
import math
from typing import Literal

from typing_extensions import override

from lpl_jax.errors import InputError
from lpl_jax.fields import Part, above, between, each, field, whole
from lpl_jax.limits import BATCH, DECAY, STEP, STEPS

MOST_AVERAGES = 16
MOST_KEPT = 100_000  # checkpoints for good


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Part, section="optimizer"):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); parameters and moments are float32."""

    learning_rate: float = field(1e-4, "after the warm-up", between(1e-12, 100))
    warmup_steps: int = field(1000, "updates over which the rate grows linearly; 0: none", STEP)
    schedule: Literal["constant", "cosine"] = field(
        "constant", "after the warm-up: constant | cosine (to 0 at total_steps)"
    )
    total_steps: int | None = field(None, "cosine only: updates of the run", STEPS)
    b1: float = field(0.9, "decay of the first moment", DECAY)
    b2: float = field(0.95, "decay of the second moment", DECAY)
    eps: float = field(1e-8, "added to the root of the second moment", between(1e-30, 1000))
    weight_decay: float = field(0.0, "decoupled, on kernels only; 0: none", between(0, 100))
    clip_norm: float | None = field(1.0, "largest global norm of the gradient; None: no clipping", above(0, 1e9))

    @override
    def check(self) -> None:
        if self.schedule == "cosine":
            if self.total_steps is None or self.total_steps <= self.warmup_steps:
                raise InputError(
                    f"optimizer.total_steps={self.total_steps} is not possible: with schedule 'cosine' it must be more "
                    f"than warmup_steps={self.warmup_steps}"
                )
        elif self.total_steps is not None:
            raise InputError(
                f"optimizer.total_steps={self.total_steps} is not possible: schedule {self.schedule!r} has no end; "
                "leave it at None"
            )


@dataclasses.dataclass(frozen=True)
class EMAConfig(Part, section="ema"):
    """Moving averages of the parameters, side by side."""

    decays: tuple[float, ...] = field((0.9999,), "one average each, side by side", each(DECAY, MOST_AVERAGES))
    start: int = field(0, "until this step the averages equal the parameters", STEP)

    @override
    def check(self) -> None:
        ema_names(self.decays)

    @property
    def first(self) -> str | None:
        """The name of the first average; None where there is none."""
        return ema_name(self.decays[0]) if self.decays else None


def ema_name(decay: float) -> str:
    """Name of the average with this decay ("0.9999"). Raises InputError outside [0, 1)."""
    if not 0 <= decay < 1:
        raise InputError(f"EMA decay is {decay!r}; it must be in [0, 1), for example 0.9999")
    return repr(float(decay))


def ema_names(decays) -> list[str]:
    """Name of each average. Raises InputError where a decay is given twice."""
    names = [ema_name(decay) for decay in decays]
    if len(set(names)) < len(names):
        raise InputError(f"EMA decays {', '.join(names)}: each may be given once")
    return names


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Part, section="checkpoint"):
    """What a run that is resumed does with its checkpoints."""

    on_damage: Literal["error", "previous"] = field(
        "error",
        "where the newest is damaged: error (say so and end) | previous (set it aside, go on from the last good one)",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Part, section="train"):
    """Length of a run, what it starts from, and what it saves."""

    batch_size: int = field(256, "images of a step, over all devices", BATCH)
    accumulate: int = field(1, "parts that a batch is taken in, one after another, to save memory", BATCH)
    steps: int = field(100_000, "updates in all", STEPS)
    log_every: int = field(50, "steps between lines of metrics", STEPS)
    checkpoint_every: int = field(5000, "steps between checkpoints", STEPS)
    keep: int = field(3, "newest checkpoints that are kept", whole(1, 10**6))
    keep_every: int | None = field(None, "also keep those at multiples of this step", STEPS)
    max_nonfinite: int = field(
        3, "steps in a row whose loss or gradient is not finite, at which a run ends; each is left out", STEPS
    )
    init_from: str | None = field(None, "run (its folder) or weights (docs/weights.md) that this run starts from")
    init_weights: str = field("params", "which of them: params, or the name of an average such as 0.9999")
    init_step: int | None = field(None, "step of the run that init_from names; None: its newest", STEP)
    weight_from: str | None = field(
        None, "run (its folder) whose weight of LPL, as it was calibrated there, this run takes in place of its own"
    )

    @override
    def check(self) -> None:
        if self.init_step is not None and self.init_from is None:
            raise InputError(f"train.init_step={self.init_step} is not possible without train.init_from")
        if (count := len(self._kept_for_good())) > MOST_KEPT:
            raise InputError(
                f"train.keep_every={self.keep_every} keeps {count:,} checkpoints of train.steps={self.steps}; possible "
                f"are up to {MOST_KEPT:,}"
            )
        if self.batch_size % self.accumulate:
            raise InputError(
                f"train.accumulate={self.accumulate} is not possible: it must be a divisor of "
                f"train.batch_size={self.batch_size}"
            )

    def kept_steps(self) -> list[int]:
        """Steps whose checkpoints are there when the run is done, ascending."""
        saved = range(self.checkpoint_every, self.steps, self.checkpoint_every)
        newest = [*saved[max(0, len(saved) + 1 - self.keep) :], self.steps]
        return sorted({*self._kept_for_good(), *newest})

    def _kept_for_good(self) -> range:
        if self.keep_every is None:
            return range(0)
        every = math.lcm(self.checkpoint_every, self.keep_every)
        return range(every, self.steps, every)
