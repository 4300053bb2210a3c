"""Rows, events and checkpoints are those of an undisturbed run, wherever a run was stopped or broke off."""

import json
import os
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.same_files import differences
from lpl_jax.experiment import build
from lpl_jax.runs import checkpoints
from lpl_jax.training import loop, train
from lpl_jax.training import step as step_module
from lpl_jax.training.logging import read_metrics
from lpl_jax.training.metrics import MetricBuffer, Recorder

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture
def runs(tiny_config, tmp_path, monkeypatch):
    """function(name, at): a run of 9 steps with rows every 2, checkpoints every 3 and evaluations every 4.

    at: what happens in an evaluation, or before a batch, by ("evaluation" or "step", step).
    """
    at = {}

    def step(state, batch, *_, **__):
        loss = jnp.mean(batch["mean"]) / 3 + state.step
        bad = jnp.float32(state.step == 4)
        return state.replace(step=state.step + 1), {"loss": loss, "taps": jnp.stack([loss, loss]), "nonfinite": bad}

    put = loop.parallel.put_batch
    monkeypatch.setattr(step_module, "train_step", step)
    monkeypatch.setattr(loop, "NonfiniteWatch", Watch)

    def run(name, happens=None):
        at.clear()
        at.update(happens or {})
        began = checkpoints.latest_step(tmp_path / name / "checkpoints") or 0
        batches = iter(range(began + 1, 100))

        def next_batch(batch, mesh):
            at.get(("step", next(batches)), lambda: None)()
            return put(batch, mesh)

        def evaluate(step, _):
            at.get(("evaluation", step), lambda: None)()
            return {"evaluation/cfd": step / 7}, np.full((2, 2, 3), step, np.uint8)

        monkeypatch.setattr(loop.parallel, "put_batch", next_batch)
        monkeypatch.setattr(loop, "periodic_evaluation", lambda *_, **__: evaluate)
        config = tiny_config(train__steps=9, train__log_every=2, train__checkpoint_every=3)
        config.evaluation.every = 4
        return train(build(config), tmp_path / name)

    return run


class Watch:
    """In the place of the one that says what was not finite, which would repeat the step."""

    def __init__(self, *given):
        self.row, self.told = list(given[-1]), []

    def __call__(self, steps, state):
        self.row = [*self.row, *steps][-1:]


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise RuntimeError("a kill, as far as the files are concerned")


MOMENTS = {
    "in an interval": ("step", 4, stop),
    "at the end of one": ("step", 5, stop),
    "in an evaluation": ("evaluation", 4, stop),
    "in the last evaluation": ("evaluation", 8, stop),
    "broken off in an evaluation": ("evaluation", 4, fail),
    "broken off in a step": ("step", 9, fail),
}


@pytest.mark.slow
def test_rows_are_one_a_step_and_the_same_after_every_stop(runs, tmp_path):
    runs("whole")
    rows = read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]
    assert ["evaluation/cfd" in row for row in rows] == [False, True, False, True, False]
    assert [row["nonfinite"] for row in rows] == [0, 0, 1, 0, 0]
    for name, (kind, step, happens) in MOMENTS.items():
        try:
            assert runs("run", {(kind, step): happens}).stopped
        except RuntimeError:
            assert happens is fail
        assert checkpoints.latest_step(tmp_path / "run/checkpoints") < 9
        assert runs("run").step == 9
        assert differences(tmp_path / "run", tmp_path / "whole") == [], name
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_an_evaluation_that_was_left_is_made_up_for_and_only_then(runs, tmp_path):
    made = []
    note = {("evaluation", step): lambda step=step: made.append(step) for step in (4, 8)}
    runs("run", {("evaluation", 4): stop})
    runs("run", note)
    assert made == [4, 8]
    made.clear()
    runs("run", note)
    assert made == [], "a run that is complete is left as it is"


class Rows(list):
    """In the place of a logger and a progress."""

    def write(self, step, metrics):
        self.append({"step": step, **{name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}})

    def update(self, *_, **__):
        pass


def recorder_of(rows, past=(), kept=None):
    return Recorder(rows, rows, 8, lambda step: 0.1 * step, past, kept and json.loads(json.dumps(kept)))


def test_a_row_that_waits_for_its_evaluation_is_the_same_in_the_next_process():
    """Also the median that it is compared with, and the interval behind it."""
    found = []
    for broken_off in (False, True):
        rows = Rows()
        recorder = recorder_of(rows, past=[0.1, 0.3])
        for step in (1, 2, 3):
            recorder.push(step, {"loss": jnp.float32(step), "taps": jnp.float32([step, jnp.inf])})
        recorder.interval(3)
        assert recorder.settle(3, evaluated=True) == [] and rows == []
        if broken_off:
            recorder = recorder_of(rows, past=[0.1, 0.3], kept=recorder.kept())
        recorder.evaluation(3, {"evaluation/cfd": 1 / 3})
        recorder.push(4, {"loss": jnp.float32(9), "taps": jnp.zeros(2)})
        recorder.settle(4)
        if broken_off:
            recorder = recorder_of(rows, past=[0.1, 0.3, 2.0], kept=recorder.kept())
        recorder.push(5, {"loss": jnp.float32(0.1), "taps": jnp.zeros(2)})
        recorder.interval(5)
        recorder.settle(5)
        found.append(rows)
    assert found[0] == found[1] and [row["step"] for row in found[0]] == [3, 5]
    assert found[0][0]["evaluation/cfd"] == 1 / 3 and found[0][0]["loss_spike"] == 2 / 0.2
    assert found[0][1]["loss_spike"] > 2


def test_the_sums_of_an_interval_are_kept_with_its_count():
    buffer = MetricBuffer()
    buffer.push(1, {"loss": jnp.float32(0.1)})
    assert buffer.open_interval() == {"count": 1, "sums": {"nonfinite": 0.0, "loss": float(np.float32(0.1))}}
