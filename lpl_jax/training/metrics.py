"""Metrics of steps, without a wait: means are taken on the device, and fetched one interval after they were asked for.

By then they have long been computed, so that the host waits for no step.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.training.logging import MetricLogger
from lpl_jax.training.progress import Progress

NONFINITE = "nonfinite"  # metric of a step: 1 where its loss or gradient was not finite, so that it changed nothing
SPIKE, WINDOW = 2.0, 100  # a loss more than so many times the median of so many rows before is marked


class Interval(NamedTuple):
    """Means of metrics over the steps up to `step`; nonfinite: those that are left out of them."""

    step: int
    means: dict[str, np.ndarray]
    nonfinite: list[int]


class MetricBuffer:
    """Means of metrics over intervals of steps, without a wait.

    Call `push` after each step and `take` once per interval: it closes the interval and returns the one before. Steps
    whose metric `nonfinite` is not 0 count in that metric alone, which is a sum.
    """

    def __init__(self):
        self._sums: Any = None
        self._flags: list[jax.Array] = []  # of the steps, fetched where their sum is not 0
        self._count = 0
        self._closed: tuple[int, Any, list[jax.Array]] | None = None

    def push(self, metrics: Mapping[str, jax.Array]) -> None:
        """Add one step's metrics (names and shapes stay the same within an interval) to the current interval."""
        given: dict[str, Any] = {NONFINITE: np.float32(0), **metrics}
        sums = dict.fromkeys(given, np.float32(0)) if self._sums is None else self._sums
        self._sums = _add(sums, given)
        self._flags.append(given[NONFINITE])
        self._count += 1

    def take(self, step: int) -> list[Interval]:
        """Close the interval that ends with `step`; the one that was closed before, fetched now, or []."""
        before = self._closed
        self._closed = (step, _divide(self._sums, self._count), self._flags) if self._count else None
        self._sums, self._flags, self._count = None, [], 0
        if before is None:
            return []
        last, means, flags = before
        means = jax.device_get(means)
        flags = jax.device_get(flags) if means[NONFINITE] else []
        steps = [last - len(flags) + number for number, flag in enumerate(flags, 1) if flag]
        return [Interval(last, means, steps)]

    def flush(self, step: int) -> list[Interval]:
        """All that is left, an interval cut short at `step` too. Waits: for the end, and before a checkpoint."""
        return self.take(step) + self.take(step)


@jax.jit
def _add(sums, metrics):
    finite = metrics[NONFINITE] == 0
    added = jax.tree.map(lambda total, value: jnp.where(finite, total + value, total), sums, metrics)
    return added | {NONFINITE: sums[NONFINITE] + metrics[NONFINITE]}


@jax.jit
def _divide(sums, count):
    finite = count - sums[NONFINITE]
    return jax.tree.map(lambda value: value / finite, sums) | {NONFINITE: sums[NONFINITE]}


class RateMeter:
    """Images per second.

    `start` it when the device has done a number of steps (after the first one, which compiles, a checkpoint, samples),
    and `close` it when it has been waited for again: nothing between two spans is counted. A `rate` read in between is
    that of the interval since the last reading; the device may be ahead of the steps that are known to be done, so it
    is only about right.
    """

    def __init__(self, batch_size: int, clock: Callable[[], float] = time.perf_counter):
        self._batch_size, self._clock = batch_size, clock
        self._start: tuple[int, float] | None = None
        self._read = (0, 0.0)
        self._images, self._seconds = 0, 0.0

    def start(self, step: int) -> None:
        """Count from `step`, the number of steps done by now."""
        self._start = self._read = (step, self._clock())

    def rate(self, step: int) -> float | None:
        """Images per second from the start, or the last reading, up to `step`. None where no step was done."""
        if self._start is None or step <= self._read[0]:
            return None
        images, seconds = self._since(self._read, step)
        self._read = (step, self._clock())
        return images / seconds if seconds > 0 else None

    def close(self, step: int) -> float | None:
        """Images per second from the start up to `step`, which is done. None where no step was done."""
        if self._start is None or step <= self._start[0]:
            return None
        images, seconds = self._since(self._start, step)
        self._images, self._seconds, self._start = self._images + images, self._seconds + seconds, None
        return images / seconds if seconds > 0 else None

    @property
    def mean(self) -> float | None:
        """Images per second over all closed spans."""
        return self._images / self._seconds if self._seconds > 0 else None

    def _since(self, mark: tuple[int, float], step: int) -> tuple[int, float]:
        return (step - mark[0]) * self._batch_size, self._clock() - mark[1]


SHOWN = ("loss", "diffusion_loss", "lpl", "lpl_share", "comparison", "comparison_share", "loss_spike")


class Recorder:
    """What a loop does with the metrics of its steps: means over intervals go to the logger, and some to the progress.

    learning_rate: function(updates before the step) -> rate, a metric of its own. past: losses of the rows before, of a
    run that is resumed. A row whose loss is more than `SPIKE` times their running median has the ratio as `loss_spike`.
    """

    def __init__(
        self,
        logger: MetricLogger,
        progress: Progress,
        batch_size: int,
        learning_rate: Callable[[int], Any],
        past: Sequence[float] = (),
    ):
        self._logger, self._progress, self._learning_rate = logger, progress, learning_rate
        self._buffer, self._meter = MetricBuffer(), RateMeter(batch_size)
        self._past = deque(past, maxlen=WINDOW)

    def start(self, step: int) -> None:
        """Time counts from here, after `step`: after the first one, an evaluation, a checkpoint."""
        self._meter.start(step)

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """The metrics of a step that was started; nothing waits for it."""
        self._buffer.push(metrics)
        self._progress.update(step)

    def interval(self, step: int) -> list[int]:
        """An interval ends with this step: the one before is written. Returns the steps of it that were not finite."""
        rows = self._buffer.take(step)
        return self._write(step, rows, self._meter.rate(rows[-1].step) if rows else None)

    def flush(self, step: int) -> list[int]:
        """Waits for this step, and writes all that is left. Returns the steps of it that were not finite."""
        return self._write(step, self._buffer.flush(step), self._meter.close(step))

    @property
    def images_per_second(self) -> float | None:
        """The mean over all that was timed."""
        return self._meter.mean

    def _write(self, step: int, rows: list[Interval], rate: float | None) -> list[int]:
        for row in rows:
            metrics = row.means | {"learning_rate": float(self._learning_rate(row.step - 1))} | self._spike(row.means)
            self._logger.write(row.step, metrics | ({"images_per_second": rate} if rate else {}))
            shown = {name: metrics[name] for name in SHOWN if name in metrics}
            self._progress.update(step, shown, rate, of=row.step)
        return [step for row in rows for step in row.nonfinite]

    def _spike(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        loss = float(means["loss"])
        median = float(np.median(self._past)) if self._past else math.inf
        if math.isfinite(loss):
            self._past.append(loss)
        return {"loss_spike": loss / median} if loss > SPIKE * median else {}
