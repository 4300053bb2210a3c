"""What a run leaves on its way: rows of metrics, evaluations, checkpoints; and where it was when it is resumed.

Rows and events are those of a run that nobody disturbed, wherever it was stopped or killed: a checkpoint keeps what is
in no row yet, and comes before the evaluation of its step. A run that is resumed from a step whose row is not there
begins with that evaluation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lpl_jax import distributed
from lpl_jax.io.paths import is_remote
from lpl_jax.runs import checkpoints
from lpl_jax.runs.checkpoints import Checkpointer
from lpl_jax.runs.workdir import CHECKPOINTS
from lpl_jax.stopping import StopSignal
from lpl_jax.training.logging import METRICS_FILE, MetricLogger, read_metrics
from lpl_jax.training.metrics import WINDOW, Recorder
from lpl_jax.training.nonfinite import NonfiniteWatch, check_finite
from lpl_jax.training.session import Session
from lpl_jax.training.state import TrainState

METRICS, NONFINITE = "metrics", "nonfinite"  # in a checkpoint's metadata: `Recorder.kept`, `NonfiniteWatch.row`


class Past(NamedTuple):
    """Where a run was: what its checkpoint keeps of the metrics, and what is in its rows.

    logged: the step up to which rows and events count; None for a new run. losses: of the last rows. evaluates: the
    evaluation of the step that was saved is still to come.
    """

    logged: int | None = None
    losses: Sequence[float] = ()
    kept: Mapping[str, Any] | None = None
    nonfinite: Sequence[int] = ()
    evaluates: bool = False


def past(session: Session, step: int) -> Past:
    """Of a run that goes on from a step; 0: that has no checkpoint yet."""
    if not session.resumed:
        return Past()
    rows, written = [], np.int32(False)
    if jax.process_index() == 0 and (session.workdir / METRICS_FILE).exists():
        rows = [row for row in read_metrics(session.workdir) if row["step"] <= step]
        written = np.int32(any(row["step"] == step for row in rows))
    if jax.process_count() > 1:  # an evaluation takes all of them
        written = multihost_utils.broadcast_one_to_all(written)
    saved = checkpoints.read_metadata(session.workdir / CHECKPOINTS, step) if step > 0 else {}
    kept = saved.get(METRICS)
    if kept and written:  # the row that waited is there
        kept = {**kept, "waiting": None}
    return Past(
        logged=step if written or step == 0 else step - 1,  # of a step without its row there may be events
        losses=[row["loss"] for row in rows if row.get("loss") is not None][-WINDOW:],
        kept=kept,
        nonfinite=saved.get(NONFINITE, ()),
        evaluates=evaluates(session, step) and not written,
    )


def evaluates(session: Session, step: int) -> bool:
    """Whether an evaluation follows this step."""
    every = session.experiment.evaluation.every
    return session.evaluate is not None and every is not None and step > 0 and step % every == 0


class Course(NamedTuple):
    """What takes down a run while it goes."""

    session: Session
    recorder: Recorder
    watch: NonfiniteWatch
    logger: MetricLogger
    checkpointer: Checkpointer
    stop: StopSignal

    def begin(self, step: int, state: TrainState, before: Past) -> None:
        """What was not finished after the step that a run goes on from."""
        if before.evaluates:
            self.evaluate(step, state, unsaved=False)
        else:
            self.recorder.evaluation(step, {})

    def after(self, step: int, state: TrainState) -> None:
        """What is to be done after a step.

        Where a row ends depends on the config alone, not on where the run is stopped.
        """
        config = self.session.experiment
        last = step == config.train.steps
        if last or step % config.train.log_every == 0 or step == config.loss.lpl_start:
            self.watch(self.recorder.interval(step), state)
        saves, evaluated = last or step % config.train.checkpoint_every == 0, evaluates(self.session, step)
        if not (saves or evaluated):
            return
        self.settle(step, state, evaluated=evaluated)
        if saves:
            self.save(state)
        if evaluated:
            self.evaluate(step, state, unsaved=not saves)
        self.recorder.start(step)

    def settle(self, step: int, state: TrainState, *, evaluated: bool = False) -> None:
        """Waits for the step: all rows up to it are written, but for one that waits for its evaluation."""
        self.watch(self.recorder.settle(step, evaluated=evaluated), state)

    def save(self, state: TrainState) -> None:
        """A checkpoint, unless there is one of this step. Rows are settled."""
        if not is_remote(self.session.store.path):  # its shards were copied here
            distributed.on_all(self.session.store.check_files)
        # No step lets such values in, but a learning rate can: what is good stays the newest.
        check_finite({"parameter": state.params, "average": state.emas})
        self.logger.flush()
        self.checkpointer.save(state, **{METRICS: self.recorder.kept(), NONFINITE: self.watch.row})

    def evaluate(self, step: int, state: TrainState, *, unsaved: bool) -> None:
        """A small evaluation, and its row. Raises Stopped where a signal comes in between."""
        assert self.session.evaluate is not None
        average = self.session.experiment.ema.first
        with self.stop.leaving(unsaved=unsaved):
            metrics, picture = self.session.evaluate(step, state.params if average is None else state.emas[average])
        self.logger.image(step, "samples", picture)
        self.recorder.evaluation(step, metrics)
