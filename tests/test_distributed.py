"""Several processes: flags, parts of a batch, and runs of two CPU processes against one."""

import fcntl
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kills import catches_signals
from lpl_jax import distributed
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.parallel import host_parts, make_mesh
from lpl_jax.runs import checkpoints
from lpl_jax.training import loop, step, train
from lpl_jax.training.logging import read_metrics

ROOT = Path(loop.__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(auto=True, coordinator="a:1"), "--distributed takes everything.*--coordinator is given"),
        (dict(coordinator="a:1"), "--coordinator also needs --num-processes and --process-id"),
        (dict(process_id=0, num_processes=2), "--num-processes also needs --coordinator"),
        (dict(coordinator="localhost", num_processes=2, process_id=0), "localhost: give HOST:PORT"),
        (dict(coordinator="a:99999", num_processes=2, process_id=0), "a:99999: give HOST:PORT"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--process-id=2 with --num-processes=2"),
        (dict(auto=True, timeout=0), "--connect-timeout=0"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(**arguments)


def test_a_coordinator_that_is_not_there():
    port = free_port()
    with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be reached within 1 s"):
        distributed.initialize(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=1, timeout=1)


def test_without_arguments_nothing_happens():
    distributed.initialize()
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("processes", "parts"),
    [
        ([[0], [0], [1], [1]], {0: (0, 2, [0, 1]), 1: (1, 2, [2, 3])}),
        ([[0, 0], [1, 1]], {0: (0, 2, [0]), 1: (1, 2, [1])}),
        # A tensor axis over two processes: they hold the same pieces.
        ([[0, 1], [0, 1]], {0: (0, 1, [0, 1]), 1: (0, 1, [0, 1])}),
        ([[0, 1], [2, 3]], {0: (0, 2, [0]), 1: (0, 2, [0]), 2: (1, 2, [1]), 3: (1, 2, [1])}),
        # 4 x 4 chips in rows, with hosts of 2 x 2.
        ([[0], [0], [1], [1], [0], [0], [1], [1]], {0: (0, 2, [0, 1, 4, 5]), 1: (1, 2, [2, 3, 6, 7])}),
    ],
)
def test_parts_of_a_batch(processes, parts):
    for process, expected in parts.items():
        assert host_parts(np.array(processes), process) == expected


def test_pieces_shared_unevenly_are_refused():
    with pytest.raises(InputError, match="2 processes do not share the 2 pieces"):
        host_parts(np.array([[0, 0, 0], [0, 1, 1]]), 0)


def small_step(state, batch, key, frozen, **_):
    """In place of `train_step`, which takes most of a minute to compile in three processes."""
    moment = jnp.mean(batch["mean"] * (1 + batch["label"])[:, None, None, None])
    params = jax.tree.map(lambda leaf: leaf + moment, state.params)
    return state.replace(step=state.step + 1, params=params), {"loss": moment, "diffusion_loss": jnp.max(batch["mean"])}


class Pair:
    """Two processes that run train.py together, with two devices each; small: with `small_step`, and one device."""

    def __init__(self, folder: Path, config, *overrides: str, small: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.to_json_best_effort())
        text = "import json\nfrom ml_collections import ConfigDict\n"
        text += f"def get_config():\n    with open({str(folder / 'config.json')!r}) as file:\n"
        text += "        return ConfigDict(json.load(file))\n"
        (folder / "config.py").write_text(text)
        self.workdir = folder / "run"
        flags = f"--xla_force_host_platform_device_count={1 if small else 2} --xla_backend_optimization_level=0"
        flags += " --xla_cpu_use_fusion_emitters=false"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        # PyTorch, which TensorBoard's writer imports where it is installed, takes a second.
        program = "import sys\nsys.modules['torch'] = None\nimport jax\nimport jax.numpy as jnp\n"
        program += f"{inspect.getsource(small_step)}\n"
        program += (
            "from lpl_jax.tools import cli, train\nfrom lpl_jax.training import step\nstep.train_step = small_step\n"
        )
        program = ["-c", program + "cli.run_main(train.main)"] if small else ["train.py"]
        command = [sys.executable, *program, f"--config={folder / 'config.py'}", f"--workdir={self.workdir}"]
        command += [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", "--connect-timeout=60", *overrides]
        self._files = [(folder / f"output{index}.txt").open("w+") for index in (0, 1)]
        self.processes = [
            subprocess.Popen(
                [*command, f"--process-id={index}"],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for index, file in enumerate(self._files)
        ]

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit statuses."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.end()

    def end(self):
        for process in self.processes:
            process.kill()

    def output(self, index: int) -> str:
        self._files[index].seek(0)
        return self._files[index].read()


def assert_same_run(a: Path, b: Path, rtol: float):
    """Equal metrics of all lines, but for the speed."""
    lines, others = read_metrics(a), read_metrics(b)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in line.keys() - {"images_per_second"}:
            assert line[name] == pytest.approx(other[name], rel=rtol, abs=1e-6), (line["step"], name)


@pytest.fixture(scope="module")
def four_devices():
    """One process uses four of its devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.parallel, "make_mesh", lambda config: make_mesh(config, jax.devices()[:4]))
        yield


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(lpl__taps=2, loss__lpl_capacity="4"), id="lpl"),
        pytest.param(dict(lpl__taps=2, train__accumulate=2), id="lpl_in_parts"),
        pytest.param(dict(mesh__data=1, mesh__fsdp=2, mesh__tensor=2), id="tensor"),
        pytest.param(dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=4), id="tensor_over_hosts"),
        pytest.param(
            dict(evaluation__every=3, evaluation__every_images=8, sampling__steps=2),
            id="evaluation",
        ),
    ],
)
@pytest.mark.slow
def test_two_processes_do_what_one_does(changes, tmp_path, tiny_config, with_lpl, four_devices):
    """Float32 sums in another order: gloo's reductions against those inside one process."""
    changes = changes | with_lpl if "lpl__taps" in changes else changes
    config = tiny_config(train__steps=4, **changes)
    pair = Pair(tmp_path / "two", config)
    try:
        result = train(build(config), tmp_path / "one")
        assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    finally:
        pair.end()
    assert_same_run(pair.workdir, tmp_path / "one", rtol=2e-4)
    assert checkpoints.steps(pair.workdir / "checkpoints") == [3, 4]
    assert len(list(pair.workdir.glob("events.out.tfevents*"))) == 1
    assert f"{pair.workdir}: step 4" in pair.output(0)
    assert str(pair.workdir) not in pair.output(1)
    # One process goes on from what two have saved.
    state = train(build(config), pair.workdir).state
    chex.assert_trees_all_close(state.params, result.state.params, rtol=1e-3, atol=1e-5)


def test_two_processes_read_train_and_save_what_one_does(tmp_path, tiny_config, two_devices, monkeypatch):
    """Everything around the step: parts of batches, metrics and config of one process, checkpoints of both."""
    config = tiny_config(train__steps=4)
    monkeypatch.setattr(step, "train_step", small_step)
    pair = Pair(tmp_path / "two", config, small=True)
    try:
        result = train(build(config), tmp_path / "one")
        assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    finally:
        pair.end()
    assert_same_run(pair.workdir, tmp_path / "one", rtol=1e-5)
    assert checkpoints.steps(pair.workdir / "checkpoints") == [3, 4]
    assert len(list(pair.workdir.glob("events.out.tfevents*"))) == 1
    assert f"{pair.workdir}: step 4" in pair.output(0) and "first step after" in pair.output(0)
    assert str(pair.workdir) not in pair.output(1) and "first step after" not in pair.output(1)
    state = train(build(config), pair.workdir).state  # one process restores what two have saved
    chex.assert_trees_all_close(state.params, result.state.params, rtol=1e-7, atol=1e-5)


def wait_for(condition, pair: Pair, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        alive = all(process.poll() is None for process in pair.processes)
        assert alive and time.monotonic() < end, pair.output(0) + pair.output(1)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path, tiny_config):
    config = tiny_config(train__steps=10**6, train__checkpoint_every=10**6)
    pair = Pair(tmp_path, config)
    try:
        wait_for(lambda: (pair.workdir / "metrics.jsonl").exists() and read_metrics(pair.workdir), pair)
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait(60) == [130, 130], pair.output(0) + pair.output(1)
    finally:
        pair.end()
    (step,) = checkpoints.steps(pair.workdir / "checkpoints")
    assert 0 <= step - read_metrics(pair.workdir)[-1]["step"] < config.train.log_every
    assert f"stopped at step {step} by SIGTERM; to go on: " in pair.output(0)


@pytest.mark.slow
def test_signals_to_both_end_both_before_their_first_step(tmp_path, tiny_config):
    """Where no step is near at which they could agree: while they start, and while they compile."""
    for number, said in enumerate(("", "steps 0 to")):
        pair = Pair(tmp_path / str(number), tiny_config())
        try:
            for process in pair.processes:
                while not catches_signals(process.pid):
                    time.sleep(0.01)
            wait_for(lambda pair=pair, said=said: said in pair.output(0), pair)
            time.sleep(1)
            for process in pair.processes:
                process.send_signal(signal.SIGTERM)
            assert pair.wait(20) == [130, 130], pair.output(0) + pair.output(1)
        finally:
            pair.end()
        assert "Traceback" not in pair.output(0) + pair.output(1)


@pytest.mark.slow
def test_what_one_process_finds_all_report(tmp_path, tiny_config):
    """The lock is process 0's: the other one does not wait for it in vain."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pair = Pair(tmp_path, tiny_config())
        assert pair.wait(60) == [2, 2]
    for index in (0, 1):
        assert "error: " in pair.output(index) and "in use by another process" in pair.output(index)
        assert "Traceback" not in pair.output(index)
    assert not (pair.workdir / "config.json").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_found_by_one_process_and_reported_by_both(tmp_path, tiny_config):
    config = tiny_config(train__steps=1)
    train(build(config), tmp_path / "run")
    folder = tmp_path / "run/checkpoints/1"
    files = json.loads((folder / "files.json").read_text())
    largest = folder / max(files, key=files.get)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    config.train.steps = 2
    pair = Pair(tmp_path, config)
    assert pair.wait(120) == [2, 2], pair.output(0) + pair.output(1)
    for index in (0, 1):
        assert f"error: checkpoint {folder} is damaged" in pair.output(index) and largest.name in pair.output(index)


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_the_same_commands_end_as_if_it_had_not_been(tmp_path, tiny_config):
    """Of the other one jax's coordination service takes care: it ends, and does not wait for ever."""
    config = tiny_config(train__steps=300, train__log_every=10, train__checkpoint_every=50, train__keep=10)
    whole = Pair(tmp_path / "whole", config)
    assert whole.wait() == [0, 0], whole.output(0) + whole.output(1)
    pair = Pair(tmp_path / "killed", config)
    try:
        wait_for(lambda: checkpoints.steps(pair.workdir / "checkpoints"), pair)
        pair.processes[1].kill()
        begun = time.monotonic()
        assert pair.processes[0].wait(200) != 0
        print(f"the other process ended after {time.monotonic() - begun:.0f} s")
    finally:
        pair.end()
    assert checkpoints.latest_step(pair.workdir / "checkpoints") < 300
    again = Pair(tmp_path / "killed", config)
    assert again.wait() == [0, 0], again.output(0) + again.output(1)
    assert_same_run(again.workdir, whole.workdir, rtol=0)
    for weights in ("params", "0.5", "0.9"):
        ours, theirs = (checkpoints.load_params(run.workdir / "checkpoints", weights) for run in (again, whole))
        chex.assert_trees_all_equal(ours, theirs)
