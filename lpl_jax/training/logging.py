"""The metrics of a run in files: `metrics.jsonl`, and TensorBoard's events."""

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

from lpl_jax.errors import InputError
from lpl_jax.fields import fits
from lpl_jax.io.atomic import upload, write_text
from lpl_jax.io.faults import naming
from lpl_jax.io.jsons import read_lines
from lpl_jax.io.paths import AnyPath, is_remote, size_of, to_path
from lpl_jax.io.places import check as check_place

METRICS_FILE = "metrics.jsonl"
UPLOAD_SECONDS = 60  # between uploads of a remote run's metrics


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

        What is not finite is null there, and left out of TensorBoard. The line comes last: where a step has one, it has
        all of its events.
        """
        if self._file is None or self._board is None:
            return
        check_place(self._shown)
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        line = {"step": int(step)} | {name: _json(value.tolist()) for name, value in values.items()}
        with naming(self._shown):
            for name, value in values.items():
                one = value.ndim == 0
                elements = {name: value} if one else {f"{name}/{i}": each for i, each in enumerate(value.ravel())}
                for tag, element in elements.items():
                    if np.isfinite(element):
                        self._board.add(step, summary.scalar(tag, element))
            self._board.flush()
        with naming(self._shown / METRICS_FILE):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
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
    rows = list(read_lines(path))
    for number, row in enumerate(rows, 1):
        if not (fits(row.get("step"), int) and row["step"] >= 0 and all(map(_is_metric, row.values()))):
            raise InputError(f"{path}: line {number} holds no step with numbers")
    return rows


def _is_metric(value: Any) -> bool:
    """Whether it is a number, None where it was not finite, or a list of these."""
    return all(map(_is_metric, value)) if isinstance(value, list) else value is None or fits(value, float)


def _drop_after(path: AnyPath, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _json(value):
    if isinstance(value, list):
        return [_json(element) for element in value]
    return value if math.isfinite(value) else None
