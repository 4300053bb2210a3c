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
    """Means of metrics over the steps up to `step`; nonfinite: those that are left out of them and not yet told."""

    step: int
    means: dict[str, np.ndarray]
    nonfinite: list[int]


class MetricBuffer:
    """Means of metrics over intervals of steps, without a wait.

    Call `push` after each step and `take` at the end of an interval: it returns the one before. Steps whose metric
    `nonfinite` is not 0 count in that metric alone, which is a sum. The sums of an interval that is not at its end can
    be kept (`open_interval`), for the next process to go on with: as float32 they are exact in JSON.

    kept: an interval that another process has begun.
    """

    def __init__(self, kept: Mapping[str, Any] | None = None):
        kept = kept or {"count": 0, "sums": {}}
        self._sums: Any = {name: _array(value, np.float32) for name, value in kept["sums"].items()} or None
        self._count = int(kept["count"])
        self._flags: list[tuple[int, jax.Array]] = []  # of steps, fetched where their sum is not 0
        self._closed: tuple[int, Any, list[tuple[int, jax.Array]]] | None = None

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Add one step's metrics (names and shapes stay the same within an interval) to the current interval."""
        given: dict[str, Any] = {NONFINITE: np.float32(0), **metrics}
        sums = dict.fromkeys(given, np.float32(0)) if self._sums is None else self._sums
        self._sums = _add(sums, given)
        self._flags.append((step, given[NONFINITE]))
        self._count += 1

    def take(self, step: int) -> list[Interval]:
        """Close the interval that ends with `step`; the one that was closed before, fetched now, or []."""
        before = self._fetch()
        self._closed = (step, _divide(self._sums, self._count), self._flags) if self._count else None
        self._sums, self._flags, self._count = None, [], 0
        return before

    def settle(self) -> tuple[list[Interval], list[int]]:
        """Waits for all steps: the interval that was closed, if any, and the bad steps of the open one, told once."""
        closed, flags, self._flags = self._fetch(), self._flags, []
        if not flags:
            return closed, []
        self._sums = jax.device_get(self._sums)
        return closed, _bad(flags) if self._sums[NONFINITE] else []

    def open_interval(self) -> dict[str, Any]:
        """The sums of the open interval as plain values, and of how many steps they are."""
        sums = jax.device_get(self._sums) if self._count else {}
        return {"count": self._count, "sums": {name: _plain(value) for name, value in sums.items()}}

    def _fetch(self) -> list[Interval]:
        closed, self._closed = self._closed, None
        if closed is None:
            return []
        step, means, flags = closed
        means = jax.device_get(means)
        return [Interval(step, means, _bad(flags) if means[NONFINITE] else [])]


def _bad(flags: Sequence[tuple[int, jax.Array]]) -> list[int]:
    """Of which steps the flag is set."""
    values = jax.device_get([flag for _, flag in flags])
    return [step for (step, _), value in zip(flags, values, strict=True) if value]


def _plain(values) -> Any:
    """Numbers as JSON has them: exact, in lists as the array has them, and as text where they are not finite."""
    if isinstance(values, list):
        return [_plain(value) for value in values]
    if not isinstance(values, float):
        return _plain(np.asarray(values, np.float64).tolist())
    return values if math.isfinite(values) else str(values)


def _array(plain: Any, dtype: Any) -> np.ndarray:
    """The other way; of an empty list, too."""
    if isinstance(plain, list):
        return np.array([_array(value, dtype) for value in plain], dtype)
    return np.asarray(float(plain), dtype)


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

    There is a row for each interval and each evaluation, one a step: what an evaluation finds is in the row of its
    step. A row is written once, wherever a run is stopped, saved or resumed in between: the interval that is open then,
    and the row that waits for its evaluation, are kept in the checkpoint (`kept`).

    learning_rate: function(updates before the step) -> rate, a metric of its own. past: losses of the rows before, of a
    run that is resumed; kept: what `kept` returned when its checkpoint was saved. A row whose loss is more than `SPIKE`
    times their running median has the ratio as `loss_spike`.
    """

    def __init__(
        self,
        logger: MetricLogger,
        progress: Progress,
        batch_size: int,
        learning_rate: Callable[[int], Any],
        past: Sequence[float] = (),
        kept: Mapping[str, Any] | None = None,
    ):
        self._logger, self._progress, self._learning_rate = logger, progress, learning_rate
        self._buffer, self._meter = MetricBuffer(kept and kept["open"]), RateMeter(batch_size)
        self._past = deque(past, maxlen=WINDOW)
        waiting = kept["waiting"] if kept else None
        self._waiting = waiting and {name: _array(value, np.float64) for name, value in waiting.items()}
        if self._waiting is not None:
            self._remember(float(self._waiting["loss"]))

    def start(self, step: int) -> None:
        """Time counts from here, after `step`: after the first one, an evaluation, a checkpoint."""
        self._meter.start(step)

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """The metrics of a step that was started; nothing waits for it."""
        self._buffer.push(step, metrics)
        self._progress.update(step)

    def interval(self, step: int) -> list[int]:
        """An interval ends with this step: the one before is written. Returns the steps of it that were not finite."""
        rows = self._buffer.take(step)
        self._write(step, rows, self._meter.rate(rows[-1].step) if rows else None)
        return rows[0].nonfinite if rows else []

    def settle(self, step: int, *, evaluated: bool = False) -> list[int]:
        """Waits for this step and writes the intervals that have ended. Returns the steps that were not finite.

        evaluated: the row of this step, if there is one, waits for its evaluation.
        """
        rows, bad = self._buffer.settle()
        self._write(step, rows, self._meter.close(step), wait_at=step if evaluated else None)
        return [*(rows[0].nonfinite if rows else []), *bad]

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """What an evaluation after this step has found goes into its row, which is written now."""
        if row := {**(self._waiting or {}), **metrics}:
            self._logger.write(step, row)
        self._waiting = None

    def kept(self) -> dict[str, Any]:
        """What is in no row yet, after `settle`, as plain values."""
        waiting = self._waiting and {name: _plain(value) for name, value in self._waiting.items()}
        return {"open": self._buffer.open_interval(), "waiting": waiting}

    @property
    def images_per_second(self) -> float | None:
        """The mean over all that was timed."""
        return self._meter.mean

    def _write(self, step: int, rows: list[Interval], rate: float | None, wait_at: int | None = None) -> None:
        for row in rows:
            metrics = row.means | {"learning_rate": float(self._learning_rate(row.step - 1))} | self._spike(row.means)
            shown = {name: metrics[name] for name in SHOWN if name in metrics}
            metrics |= {"images_per_second": rate} if rate else {}
            if row.step == wait_at:
                self._waiting = metrics
            else:
                self._logger.write(row.step, metrics)
            self._progress.update(step, shown, rate, of=row.step)

    def _spike(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        loss = float(means["loss"])
        median = float(np.median(self._past)) if self._past else math.inf
        self._remember(loss)
        return {"loss_spike": loss / median} if loss > SPIKE * median else {}

    def _remember(self, loss: float) -> None:
        if math.isfinite(loss):
            self._past.append(loss)
