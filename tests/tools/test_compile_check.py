"""The compile check as a user calls it, and its parts: plans of a tiny step, the search for a batch, messages."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lpl_jax import autoencoders
from lpl_jax.cost import compile_report, hlo, topology
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, resolve
from lpl_jax.tools import compile_check

ROOT = Path(compile_check.__file__).parents[2]
TINY = [
    "--config=configs/base.py",
    "--config.resolution=32",
    "--config.model.preset=small",
    "--config.model.hidden=64",
    "--config.model.depth=2",
    "--config.model.num_classes=2",
    "--config.autoencoder.source=bundled",
    "--config.train.batch_size=16",
]
SPLIT = ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def call(argv, folder, **environment):
    """The program as a user starts it: (finished process, its report)."""
    finished = subprocess.run(
        [sys.executable, "-m", "lpl_jax", "compile-check", *argv, f"--json={folder / 'report.json'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert finished.returncode == 0, finished.stderr
    return finished, json.loads((folder / "report.json").read_text())


def test_emulated_devices(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(compile_check.CHILD, "cpu:8")  # this process has them
    argv = [*TINY, *SPLIT, "--topology=cpu:8", "--batch-size=24", f"--json={tmp_path / 'report.json'}"]
    assert compile_check.main([*argv, f"--hlo={tmp_path / 'hlo.txt'}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{compile_check.text(report)}written to" in capsys.readouterr().out
    assert (report["devices"], report["mesh"], report["batch_size"]) == (8, {"data": 1, "fsdp": 8, "tensor": 1}, 24)
    memory = report["memory"]
    assert memory["peak"] == memory["argument"] + memory["temp"] + memory["output"] - memory["alias"]
    assert report["fits"] is None and report["state"] < report["state_whole"]
    # The new state takes the old one's place.
    assert memory["alias"] >= report["state"] > 0.9 * memory["alias"]
    assert report["flops"]["compiled"] == pytest.approx(report["flops"]["traced"], rel=0.2)
    assert report["flops"]["compiled"] > report["flops"]["analytic"] * 0.9
    assert {"all-gather", "all-reduce"} <= set(report["collectives"]) and report["rematerializations"] == []
    assert hlo.summary((tmp_path / "hlo.txt").read_text())["collectives"] == report["collectives"]


@pytest.mark.slow
def test_a_process_of_its_own_has_as_many_devices_as_asked_for(tmp_path):
    finished, report = call([*TINY, "--topology=cpu:3", "--batch-size=6"], tmp_path)
    assert finished.stderr == "" and report["devices"] == 3 and report["mesh"]["data"] == 3


@pytest.mark.slow
@pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed: pip install 'lpl_jax[tpu-compile]'")
def test_a_tpu_slice(tmp_path):
    finished, report = call([*TINY, *SPLIT, "--topology=v5e-4"], tmp_path)
    assert "v5e-4 = v5e:2x2: 4 v5e chips" in finished.stdout and "of 15.75 GiB: fits" in finished.stdout
    assert finished.stderr == ""
    assert report["fits"] and 0 < report["memory"]["peak"] < 2**30 and report["dtype"] == "bfloat16"
    assert report["flops"]["compiled"] == pytest.approx(report["flops"]["traced"], rel=0.2)
    assert report["collectives"] and not report["rematerializations"] and not report["unknown_loops"]
    assert set(report["versions"]) == {"jax", "jaxlib", "libtpu"}
    # Code generation adds nothing but XLA's own count of operations.
    whole = call([*TINY, *SPLIT, "--topology=v5e-4", "--codegen"], tmp_path)[1]
    assert (report.pop("code"), whole.pop("code")) == (False, True) and whole["flops"].pop("xla") > 0
    for each in (report, whole):
        each.pop("compile_seconds")
    planned, compiled = report.pop("memory"), whole.pop("memory")
    for kind in ("argument", "output", "alias"):
        assert planned[kind] == compiled[kind]
    assert 0 <= planned["peak"] - compiled["peak"] < 2**20  # the plan has constants, too
    assert report["flops"].pop("xla") is None and report == whole


@pytest.mark.slow
@pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed: pip install 'lpl_jax[tpu-compile]'")
def test_largest_batch_of_a_tpu_slice(tmp_path):
    """It fits, nothing larger that was tried does, and the next one was tried or is said not to have been."""
    argv = [*TINY, *SPLIT, "--topology=v5e-4", "--config.resolution=256", "--config.model.remat=none"]
    finished, report = call([*argv, "--find-batch"], tmp_path)
    largest, hbm = report["largest_batch"], report["hbm"]
    plans = {int(batch): peak for batch, peak in report["plans"].items()}
    assert f"largest batch that fits: {largest}" in finished.stdout and hbm / 2 < plans[largest] <= hbm
    assert all(peak is None or peak > hbm for batch, peak in plans.items() if batch > largest)
    assert (largest + 4 in plans) != ("the search ended" in finished.stdout)
    assert finished.stderr.count("compiling for a batch of") == len(plans)


# --- what does not fit ---


@pytest.fixture(scope="module")
def tiny():
    """A resolved experiment whose data axis copies the state, and its autoencoder's shapes."""
    init = functools.partial(autoencoders.init, autoencoders.AutoencoderConfig.tiny())
    shapes = jax.eval_shape(init, jax.random.key(0))
    experiment = build({"resolution": 32, "model": {"hidden": 64, "num_classes": 2}, "train": {"batch_size": 8}})
    return resolve(experiment, shapes.config), shapes


def test_a_state_that_hardly_splits_is_named():
    report = {
        "memory": {}, "hbm": 16.0, "fits": None, "state": 5.0, "state_whole": 16.0,
        "mesh": {"data": 1, "fsdp": 256, "tensor": 1},
    }  # fmt: skip
    assert "multiples of fsdp=256: try fewer parts" in "\n".join(compile_check._memory(report))
    split = report | {"state": 1.0}
    assert "multiples" not in "\n".join(compile_check._memory(split))


def test_a_state_that_does_not_fit_is_not_compiled_for(tiny, monkeypatch):
    monkeypatch.setattr(compile_report.step_cost, "compile_step", None)
    small = dataclasses.replace(topology.parse("cpu:8"), hbm=2**20)
    report = compile_report.compile_report(*tiny, small)
    assert report["fits"] is False and report["state"] == report["state_whole"] > 2**20
    lines = compile_check.text({"given": small.text, "autoencoder": "", "dtype": ""} | report)
    assert "DOES NOT FIT; nothing was compiled" in lines
    assert "keeps 8 copies of the state; --config.mesh.data=-1 --config.mesh.fsdp=8" in lines


@pytest.mark.parametrize(
    "message, with_state",
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", False),
        (
            "The total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
            True,
        ),
    ],
)
def test_what_the_compiler_needed_is_reported(message, with_state, tiny, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(compile_report.step_cost, "compile_step", fail)
    report = compile_report.compile_report(*tiny, dataclasses.replace(topology.parse("cpu:8"), hbm=15.75 * 2**30))
    assert report["fits"] is False
    assert report["memory"] == {"peak": 20.5 * 2**30 + with_state * report["state"]}


def test_warnings_of_the_partitioner_are_listed(tiny, monkeypatch, capfd):
    """They come from C++, past sys.stderr."""
    head = f"W0000 spmd_partitioner.cc:652] {compile_report.FULL_REMATERIALIZATION}. The compiler"
    operation = 'HLO operation %dot.2 = bf16[64,1,32]{2,1,0} dot(%a), metadata={op_name="jit(f)/out/dot_general" id=1}.'

    class Program:
        def as_text(self):
            return "ENTRY %main () -> () {\n  ROOT %nothing = () tuple()\n}\n"

    def compile_step(*_, **__):
        os.write(2, f"{head} cannot go for {operation}\n{head}\nnothing\n".encode())
        values = {"memory": {}, "traced": 0, "traced_kernels": 0, "flops": 0.0, "compile_seconds": 0.0}
        return Program(), values

    monkeypatch.setattr(compile_report.step_cost, "compile_step", compile_step)
    report = compile_report.compile_report(*tiny, topology.parse("cpu:8"))
    named = "bf16[64,1,32] of jit(f)/out/dot_general"
    assert report["rematerializations"] == [named, "an array of an unnamed operation"]
    assert capfd.readouterr().err == ""


def child_that(ends, monkeypatch):
    """The process that compiles writes two lines to a stderr that is kept, and then does this."""
    code = (
        "import os\nfrom lpl_jax.cost.compile_report import _stderr\nwith _stderr():\n"
        f"    os.write(2, b'W0 a warning\\nF0 Unknown flag: --x\\n')\n    {ends}"
    )

    def child(command, env, **options):
        return subprocess.call([sys.executable, "-c", code], env=env | {"PYTHONPATH": str(ROOT)}, **options)

    monkeypatch.setattr(compile_check.stopping, "call", child)


def test_a_compiler_that_ends_the_process_is_quoted(monkeypatch):
    """Its messages were kept from stderr."""
    child_that("os._exit(1)", monkeypatch)
    with pytest.raises(InputError, match=r"the compiler ended the process \(status 1\): F0 Unknown flag: --x"):
        compile_check.main([*TINY, "--topology=cpu:1"])


@pytest.mark.slow
def test_a_compiler_that_comes_to_its_end_leaves_nothing_to_say(monkeypatch):
    child_that("pass", monkeypatch)
    assert compile_check.main([*TINY, "--topology=cpu:1"]) == 0


# --- the search for a batch ---


@pytest.mark.parametrize("curve", [0.0, 0.002, -0.0001])
@pytest.mark.parametrize("first", [16, 64, 4096])
def test_largest_batch(curve, first):
    """Plans that are a line, or bend: the batch fits, and one of an image more for each shard would not."""
    tried = []

    def peak(batch):
        return 100 + 2 * batch + curve * batch**2

    def measure(batch):
        tried.append(batch)
        return {"batch_size": batch, "memory": {"peak": peak(batch)}, "hbm": 1000.0}

    found, reports = compile_report.find_batch(measure, first, 16)
    assert peak(found) <= 1000 and found % 16 == 0
    assert len(tried) == len(set(tried)) == len(reports) <= 2 + compile_report.ATTEMPTS
    assert peak(found + 16) > 1000


def test_largest_batch_of_a_compiler_that_saves_memory_near_the_limit():
    def measure(batch):
        peak = 100 + 2 * batch if batch <= 400 else 900 + 0.5 * (batch - 400)
        return {"batch_size": batch, "memory": {"peak": peak}, "hbm": 1000.0}

    assert compile_report.find_batch(measure, 64, 16)[0] == 592  # 600 is where it ends


def test_largest_batch_far_from_the_first():
    """A line through small batches points beyond the limit: the search does not creep back from there."""

    def measure(batch):
        return {"batch_size": batch, "memory": {"peak": 26e6 + 0.9e6 * batch + 30 * batch**1.2}, "hbm": 15.75 * 2**30}

    found, reports = compile_report.find_batch(measure, 16, 4)
    assert 0.99 < measure(found)["memory"]["peak"] / (15.75 * 2**30) <= 1
    assert len(reports) <= 2 + compile_report.ATTEMPTS


def test_no_batch_fits():
    def measure(batch):
        return {"batch_size": batch, "memory": {}, "hbm": 1.0}

    assert compile_report.find_batch(measure, 16, 16)[0] is None


def test_unknown_memory_has_no_largest_batch():
    with pytest.raises(InputError, match="name a TPU topology"):
        compile_report.find_batch(lambda batch: {"memory": {"peak": 1}, "hbm": None}, 16, 16)


# --- mistakes ---


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*TINY], "no topology given"),
        ([*TINY, "--topology=v5e-17"], "v5e-17 is no slice that there is"),
        ([*TINY, "--topology=v5e-16"], 'pip install "lpl_jax\\[tpu-compile\\]"'),
        ([*TINY, "--topology=cpu:8", "--batch-size=0"], "--batch-size 0: must be 1 to 1,048,576"),
        (["--topology=cpu:8"], "no config given"),
    ],
)
def test_mistakes_are_named(argv, message, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    with pytest.raises(InputError, match=message):
        compile_check.main(argv)


def test_the_guard_is_given_its_file():
    assert compile_check.parser().parse_args(["--update-guard", "guard.json"]).update_guard == Path("guard.json")
