"""Metrics of a run: gathered on the device, written to JSONL and TensorBoard, shown in the terminal.

None of it makes the host wait for a step: means are taken on the device, and fetched one interval after they were
asked for, when they have long been computed.
"""

import contextlib
import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
from tqdm import tqdm

from lpl_jax.errors import InputError
from lpl_jax.io.atomic import append_text, upload, write_text
from lpl_jax.io.faults import naming
from lpl_jax.io.paths import AnyPath, PathLike, is_remote, size_of, to_path
from lpl_jax.io.progress import place

METRICS_FILE = "metrics.jsonl"
NONFINITE = "nonfinite"  # metric of a step: 1 where its loss or gradient was not finite, so that it changed nothing
SPIKE, WINDOW = 2.0, 100  # a loss more than so many times the median of so many rows before is marked
UPLOAD_SECONDS = 60  # between uploads of a remote run's metrics


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


class MetricLogger:
    """Writes metrics to `metrics.jsonl` (one object per line, with its step) and to TensorBoard. A context manager.

    folder: of the run; created. Only process 0 touches it. Nothing is appended to on object storage: the files of a
    remote folder are written on this machine and uploaded once a minute, by `flush`, and at the end.
    start_step: the step that the run resumes from; None for a new run, whose folder must hold no metrics.

    The file has each step once: where a run resumes from an earlier step than it had reached, the lines after
    `start_step` are dropped (they are written again), as is a last line that a kill cut short. TensorBoard is told too.
    Raises InputError for a new run in a folder that holds metrics.
    """

    def __init__(self, folder, *, start_step: int | None = None):
        self._file = self._board = self._remote = None
        if jax.process_index() != 0:
            return
        folder = to_path(folder, "--workdir", remote=True)
        path = folder / METRICS_FILE
        if start_step is None and path.exists() and size_of(path):
            raise InputError(
                f"{path} holds the metrics of another run: resume that run, give another folder, or remove it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if start_step is not None and path.exists():
            _drop_after(path, start_step)
        here: Any = folder  # a local path where it is written to
        if is_remote(folder):
            self._remote, self._scratch, self._uploaded = folder, tempfile.TemporaryDirectory(), time.monotonic()
            here = Path(self._scratch.name)
            if path.exists():
                (here / METRICS_FILE).write_bytes(path.read_bytes())
        self._file = (here / METRICS_FILE).open("a", encoding="utf-8")
        self._shown = folder
        with naming(folder):
            self._board = _Board(here, start_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line. Values are numbers or small arrays; in JSON an array is a list.

        What is not finite is null there, and left out of TensorBoard.
        """
        if self._file is None or self._board is None:
            return
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        line = {"step": int(step)} | {name: _json(value.tolist()) for name, value in values.items()}
        with naming(self._shown / METRICS_FILE):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        with naming(self._shown):
            for name, value in values.items():
                one = value.ndim == 0
                elements = {name: value} if one else {f"{name}/{i}": each for i, each in enumerate(value.ravel())}
                for tag, element in elements.items():
                    if np.isfinite(element):
                        self._board.add(step, summary.scalar(tag, element))
            self._board.flush()
        if self._remote is not None and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture for TensorBoard: (H, W, 3) uint8."""
        if self._board is not None:
            with naming(self._shown):
                self._board.add(step, summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        """All that was written is kept from now on: for a checkpoint, as the lines before it are not written again."""
        if self._file is not None and self._board is not None:
            with naming(self._shown):
                self._file.flush()
                self._board.flush()
            self._upload()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None and self._board is not None:
            with naming(self._shown):
                self._file.close()
                self._board.close()
            self._upload()
            self._file = self._board = None

    def _upload(self) -> None:
        if self._remote is not None:
            upload(Path(self._scratch.name), self._remote)
            self._uploaded = time.monotonic()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *_):
        self.close()


class _Board:
    """A file of TensorBoard's events, written without a thread of its own, whose errors nobody would see.

    start_step: events after it in other files of the folder no longer count.
    """

    def __init__(self, folder: Path, start_step: int | None):
        # The suffix keeps apart two files that are begun within a second, which would have one name.
        self._events = EventsWriter(str(folder / "events"), f".{start_step or 0}")
        if start_step is not None:
            again = dict(wall_time=time.time(), step=start_step + 1)
            self._events.write_event(Event(file_version="brain.Event:2", **again))
            self._events.write_event(Event(session_log=SessionLog(status=SessionLog.START), **again))
        self.flush()

    def add(self, step: int, content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def read_metrics(folder) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, oldest first; a last line that a kill cut short is left out."""
    path = to_path(folder, "--workdir", remote=True) / METRICS_FILE
    if not path.exists():
        raise InputError(f"no {METRICS_FILE} in {folder}")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a complete line ends with a newline
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _drop_after(path: AnyPath, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _json(value):
    if isinstance(value, list):
        return [_json(element) for element in value]
    return value if math.isfinite(value) else None


class Progress:
    """Where a run stands: step, loss terms, images per second, time left. A context manager.

    In a terminal one line that moves (tqdm); elsewhere, such as in a log file, a line every `every` seconds and one at
    the end, on stdout. Only process 0 shows anything.

    total: last step. start_step: where this part of the run begins. label: put before each line.
    """

    def __init__(
        self,
        total: int,
        start_step: int = 0,
        *,
        batch_size: int,
        label: str = "train",
        every: float = 30.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step, self._batch_size, self._label = total, start_step, batch_size, label
        self._file = place() if file is None else file
        self._every, self._clock, self._printed = every, clock, clock()
        self._shown = jax.process_index() == 0
        self._text, self._news, self._bar = "", False, None
        if self._shown and self._file.isatty():
            bar_format = "{desc} {bar} {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=total, initial=start_step, desc=label, file=self._file, bar_format=bar_format, dynamic_ncols=True
            )

    def update(
        self, step: int, metrics: Mapping[str, Any] | None = None, rate: float | None = None, of: int | None = None
    ) -> None:
        """After each step. metrics: scalars to show from now on, with the rate in images per second.

        of: the step whose metrics these are, which come an interval late; None: this one.
        """
        if not self._shown:
            return
        if metrics is not None:
            parts = [f"{name} {float(value):.4g}" for name, value in metrics.items()]
            if of not in (None, step):
                parts[0] = f"step {of}: {parts[0]}"
            if rate:
                left = (self._total - step) * self._batch_size / rate
                parts += [f"{rate:.4g} img/s", f"{tqdm.format_interval(left)} left"]
            self._text, self._news = "  ".join(parts), True
        if self._bar is not None:
            if metrics is not None:
                self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._bar is None and self._news and self._clock() - self._printed >= self._every:
            self._print()

    def note(self, text: str) -> None:
        """A line of its own, in its place above or between those of the progress."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._shown:
            print(text, file=self._file, flush=True)

    def _print(self) -> None:
        print(f"{self._label} {self._step}/{self._total}  {self._text}".rstrip(), file=self._file, flush=True)
        self._printed, self._news = self._clock(), False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self._news:
            self._print()


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


STARTUP_FILE = "startup.jsonl"


class Startup:
    """Seconds by part, in the order in which the parts came.

    began: reading of the clock when the program began, before its imports; None: now.
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._began = clock() if began is None else began
        self.seconds: dict[str, float] = {} if began is None else {"imports": clock() - began}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside counts as this part."""
        start = self._clock()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start

    def finish(self) -> str:
        """What is left counts as "other"; returns a line: "first step after 9.1 s: imports 3.0, ..."."""
        total = self._clock() - self._began
        self.seconds["other"] = max(0.0, total - sum(self.seconds.values()))
        return f"first step after {total:.1f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items())

    def write(self, folder: PathLike, step: int) -> None:
        """Adds a line to the folder's `startup.jsonl`: the step that was resumed from, and seconds by part."""
        line = {"step": step, "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}
        append_text(to_path(folder, "--workdir", remote=True) / STARTUP_FILE, json.dumps(line) + "\n")
