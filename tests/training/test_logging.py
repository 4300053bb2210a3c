import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from lpl_jax.errors import InputError
from lpl_jax.training.logging import MetricLogger, read_metrics
from lpl_jax.training.metrics import MetricBuffer, RateMeter
from lpl_jax.training.progress import Progress


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def board_events(folder):
    """The events in all TensorBoard files of a folder."""
    for file in sorted(folder.glob("events.out.*")):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # 8 bytes of length, 4 of checksum, the record, 4 of checksum
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def scalars(folder):
    return [(event.step, v.tag, v.simple_value) for event in board_events(folder) for v in event.summary.value]


def test_buffer_returns_means_one_interval_later():
    buffer = MetricBuffer()
    returned = []
    for step in range(1, 8):
        buffer.push(step, {"loss": jnp.float32(step), "taps": jnp.array([step, 2.0 * step]), "active": jnp.int32(step)})
        if step % 2 == 0:
            returned.append(buffer.take(step))
    assert returned[0] == []
    assert [[interval.step for interval in intervals] for intervals in returned] == [[], [2], [4]]
    assert returned[2][0].means["loss"] == 3.5 and returned[1][0].means["active"] == 1.5
    np.testing.assert_allclose(returned[1][0].means["taps"], [1.5, 3.0])
    (rest,), bad = buffer.settle()
    assert (rest.step, float(rest.means["loss"]), bad) == (6, 5.5, [])
    assert buffer.settle() == ([], []) and buffer.open_interval()["count"] == 1


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_interval_that_is_kept_and_gone_on_with_has_the_same_mean_to_the_bit(stop):
    values = [1e-8, 0.1, 3.3, 1e7, float("inf")]
    steps = [{"loss": jnp.float32(value), "taps": jnp.float32([1 / 3, value])} for value in values]
    whole = MetricBuffer()
    first = MetricBuffer()
    for step, metrics in enumerate(steps):
        whole.push(step, metrics)
        first.push(step, metrics)
        if step + 1 == stop:
            first.settle()
            first = MetricBuffer(json.loads(json.dumps(first.open_interval(), allow_nan=False)))
    for buffer in (whole, first):
        buffer.take(5)
    ((one,), _), ((other,), _) = whole.settle(), first.settle()
    for name in ("loss", "taps", "nonfinite"):
        assert one.means[name].tobytes() == other.means[name].tobytes()


def test_buffer_does_not_fetch_the_open_interval(monkeypatch):
    buffer, fetched = MetricBuffer(), []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or get(tree))
    for step in range(4):
        buffer.push(step, {"loss": jnp.float32(step)})
    buffer.take(4)
    assert not fetched
    buffer.take(4)
    assert len(fetched) == 1


def test_logger_writes_json_lines_and_tensorboard(tmp_path):
    with MetricLogger(tmp_path / "run") as logger:
        logger.write(10, {"loss": np.float32(0.5), "taps": np.array([1.0, np.inf]), "rate": 3})
        logger.write(20, {"loss": float("nan")})
        logger.image(20, "grid", np.zeros((8, 8, 3), np.uint8))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "loss": 0.5, "taps": [1.0, None], "rate": 3.0},
        {"step": 20, "loss": None},
    ]
    assert read_metrics(tmp_path / "run") == [json.loads(line) for line in lines]
    board = scalars(tmp_path / "run")
    assert (10, "loss", 0.5) in board and (10, "taps/0", 1.0) in board and (10, "rate", 3.0) in board
    assert any(name == "grid" for _, name, _ in board)


def test_lines_are_on_disk_at_once(tmp_path):
    with MetricLogger(tmp_path) as logger:
        logger.write(1, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_resumed_file_has_each_step_once(tmp_path):
    with MetricLogger(tmp_path) as logger:
        for step in (10, 20, 30, 40):
            logger.write(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "lo')  # killed while writing
    with MetricLogger(tmp_path, start_step=20) as logger:
        logger.write(30, {"loss": -30.0})
        logger.write(40, {"loss": -40.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, -30.0),
        (40, -40.0),
    ]
    # TensorBoard is append-only: a session that starts at step 21 tells it to forget what came after.
    starts = [event.step for event in board_events(tmp_path) if event.HasField("session_log")]
    assert starts == [21]
    assert {(10, "loss", 10.0), (30, "loss", 30.0), (30, "loss", -30.0)} <= set(scalars(tmp_path))


def test_resume_of_a_run_without_metrics(tmp_path):
    with MetricLogger(tmp_path / "new", start_step=5) as logger:
        logger.write(6, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "new")] == [6]


def test_new_run_does_not_write_into_another(tmp_path):
    with MetricLogger(tmp_path) as logger:
        logger.write(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=f"{tmp_path}/metrics.jsonl holds the metrics of another run"):
        MetricLogger(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_damaged_or_missing_metrics_are_named(tmp_path):
    with pytest.raises(InputError, match="no metrics.jsonl in"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl: line 2 cannot be read as JSON"):
        MetricLogger(tmp_path, start_step=1)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    terminal = Terminal()
    with MetricLogger(tmp_path / "run") as logger, Progress(3, batch_size=1, file=terminal) as progress:
        logger.write(1, {"loss": 1.0})
        logger.image(1, "grid", np.zeros((8, 8, 3), np.uint8))
        progress.update(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert terminal.getvalue() == ""


def test_rate_excludes_compilation_and_pauses():
    clock = Clock()
    meter = RateMeter(batch_size=4, clock=clock)
    assert meter.rate(1) is None
    clock.now += 60  # compiling
    meter.start(1)
    assert meter.rate(1) is None
    clock.now += 2
    assert meter.rate(6) == pytest.approx(4 * 5 / 2)
    clock.now += 1
    assert meter.rate(8) == pytest.approx(4 * 2 / 1)  # since the last reading
    clock.now += 1
    assert meter.close(10) == pytest.approx(4 * 9 / 4)  # since the start
    clock.now += 30  # a checkpoint
    meter.start(10)
    clock.now += 1
    assert meter.rate(11) == pytest.approx(4)
    assert meter.close(11) == pytest.approx(4)
    assert meter.mean == pytest.approx(4 * 10 / 5)
    assert meter.close(11) is None


def test_progress_outside_a_terminal_is_a_line_now_and_then():
    clock, out = Clock(), io.StringIO()
    with Progress(100, 10, batch_size=8, every=30, file=out, clock=clock) as progress:
        for step in range(11, 61):
            clock.now += 1
            fresh = step % 5 == 0
            progress.update(step, {"loss": step / 100, "lpl": 0.25} if fresh else None, 16.0 if fresh else None)
    lines = out.getvalue().splitlines()
    assert lines == [
        "train 40/100  loss 0.4  lpl 0.25  16 img/s  00:30 left",
        "train 60/100  loss 0.6  lpl 0.25  16 img/s  00:20 left",  # at the end
    ]


def test_progress_in_a_terminal_shows_step_terms_rate_and_time_left():
    terminal = Terminal()
    with Progress(50, 20, batch_size=8, label="with LPL", file=terminal) as progress:
        for step in range(21, 51):
            progress.update(step, {"loss": 0.5, "diffusion_loss": 0.125}, 4.0)
    last = terminal.getvalue().split("\r")[-1]
    assert "with LPL" in last and "50/50" in last
    assert "loss 0.5  diffusion_loss 0.125  4 img/s  00:00 left" in last
    assert "20/50" in terminal.getvalue().split("\r")[1]


def test_metrics_that_come_late_name_their_step():
    out = io.StringIO()
    with Progress(10, batch_size=8, every=0, file=out) as progress:
        progress.update(4, {"loss": 0.5}, of=2)
    assert out.getvalue() == "train 4/10  step 2: loss 0.5\n"


def test_progress_without_a_rate_names_no_time():
    out = io.StringIO()
    with Progress(10, batch_size=8, every=0, file=out) as progress:
        progress.update(1, {"loss": 1.0})
        progress.update(2)
    assert out.getvalue() == "train 1/10  loss 1\n"
