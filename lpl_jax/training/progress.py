"""What a run shows while it runs: where it stands, and where the time of its start went."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
from tqdm import tqdm

from lpl_jax.io.atomic import append_text
from lpl_jax.io.paths import PathLike, to_path
from lpl_jax.io.progress import place


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
