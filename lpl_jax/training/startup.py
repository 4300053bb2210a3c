"""Where the time from the start of a program to its first step goes."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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

    def write(self, folder: str | Path, step: int) -> None:
        """Adds a line to the folder's `startup.jsonl`: the step that was gone on from, and seconds by part."""
        line = {"step": step, "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}
        with (Path(folder) / STARTUP_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
