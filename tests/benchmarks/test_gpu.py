"""The benchmarks in miniature, and how they judge: numbers of traces, goals, sections that fail."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import common, gpu, lpl, traces
from lpl_jax.errors import InputError

ROOT = Path(gpu.__file__).resolve().parents[1]


def run(folder, *options):
    """(exit status, name of the result, result) of a run in this process."""
    status = gpu.main(["--miniature", "--in-process", f"--results={folder}", *options])
    (path,) = folder.iterdir()
    return status, path.name, json.loads(path.read_text())


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Steps with a loss of one tap, and a section that is quick."""

    def one_tap(*given, **fields):
        experiment = whole(*given, **fields)
        small = experiment.lpl and dataclasses.replace(experiment.lpl, taps=1)
        return dataclasses.replace(experiment, lpl=small)

    whole = lpl.experiment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpl, "experiment", one_tap)
        patch.setattr(common.gc, "collect", lambda: 0)  # of all that other tests have left
        return run(tmp_path_factory.mktemp("some"), "--only", "steps_512", "inception")


@pytest.fixture(scope="module")
def every_section(tmp_path_factory):
    return run(tmp_path_factory.mktemp("all"))


@pytest.mark.slow
def test_a_run_of_some_sections(miniature):
    status, name, result = miniature
    assert [(section, found["status"]) for section, found in result["sections"].items()] == [
        ("steps_512", "ok"),
        ("inception", "ok"),
    ]
    assert status == 0 and name == f"{result['date']}-gpu-miniature.json"
    assert result["machine"]["cores"] >= 1 and result["sections"]["inception"]["images_per_second"] > 0


@pytest.mark.slow
def test_every_section_runs(every_section):
    status, _, result = every_section
    assert status == 0
    assert {name: found["status"] for name, found in result["sections"].items()} == dict.fromkeys(gpu.SECTIONS, "ok")


@pytest.mark.slow
def test_numerics_are_judged(every_section):
    sections = every_section[2]["sections"]
    numerics = {name: found for name, found in sections["numerics"].items() if isinstance(found, dict)}
    assert len(numerics) == 3 * 2  # loss, decoder and one sampler in two modes
    # Both devices are CPUs here: the same program gives the same numbers, and bfloat16 others.
    for name, found in numerics.items():
        assert all(error == 0 for error in found["errors"]) or "bfloat16" in name
        assert found["within"] and len(found["errors"]) == (2 if name.startswith("loss") else 1)
    assert all(error > 1e-4 for name, found in numerics.items() if "bfloat16" in name for error in found["errors"])


@pytest.mark.slow
def test_steps_have_ratios_and_kernels(miniature):
    section = miniature[2]["sections"]["steps_512"]
    rows = section["steps"]
    assert list(rows) == [lpl.BASE, "q = 1/4", "economical"]
    row = rows["q = 1/4"]
    assert row["decoded_images"] == 1 and row["decoded_share"] == 0.25
    assert row["time_ratio_over_flop_ratio"] == pytest.approx(row["time_ratio"] / row["flop_ratio"], abs=2e-4)
    assert row["flop_ratio"] > 1 and row["memory_ratio"] > 1
    memory = rows[lpl.BASE]["memory_plan"]["peak"], row["memory_plan"]["peak"]
    assert row["memory_ratio"] == pytest.approx(memory[1] / memory[0], abs=1e-4)
    kernels = section["kernels"]
    assert kernels["parts"]["decoder: convolutions"] > 0 and kernels["parts"]["denoiser"] > 0
    assert 0.99 < sum(kernels["kinds"].values()) < 1.01
    named = [goal["goal"] for goal in section["goals"]]
    assert "economical: planned memory ratio" in named and f"{lpl.BASE}: MFU" in named
    mfu = [goal for goal in section["goals"] if goal["goal"].endswith("MFU")]
    assert all(goal["met"] is None for goal in mfu)  # nobody knows the peak of this CPU


@pytest.mark.slow
def test_torch_is_compared_or_left_out(every_section):
    section = every_section[2]["sections"]["torch"]
    assert "skipped" in section or section["agreement"]["torch eager"]["gradient"] < 1e-3


def test_traces_name_what_runs(tmp_path):
    compiled = jax.jit(lambda a: jnp.sort(a @ a, axis=0)).lower(jnp.ones((300, 300))).compile()
    traces.capture(common.blocking(compiled, jnp.ones((300, 300))), tmp_path, times=2)
    found = traces.summary(tmp_path, compiled.as_text(), count=3)
    assert 1 <= len(found["top"]) <= 3 and found["top"][0]["calls"] % 2 == 0
    assert found["kinds"]["matrix product"] > 0
    assert found["top"] == sorted(found["top"], key=lambda each: -each["seconds"])
    with pytest.raises(FileNotFoundError, match="no trace"):
        traces.newest(tmp_path / "elsewhere")


def test_a_failing_section_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(scale, record):
        record(found=1)
        raise RuntimeError("no such kernel")

    def outside(scale, record):
        record(loss={"errors": [0.5], "tolerances": [0.1], "within": False})

    monkeypatch.setattr(gpu, "SECTIONS", {"loss": (broken, 9), "numerics": (outside, 9)})
    assert gpu.main(["--miniature", "--in-process", f"--results={tmp_path}"]) == 1
    (path,) = tmp_path.iterdir()
    sections = json.loads(path.read_text())["sections"]
    assert sections["loss"]["status"] == "failed: RuntimeError: no such kernel" and sections["loss"]["found"] == 1
    assert sections["numerics"]["status"] == "ok"
    errors = capsys.readouterr().err
    assert "no such kernel" in errors and "numerics, loss: errors [0.5]" in errors


def test_children_have_a_time_limit(tmp_path, monkeypatch):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    run = subprocess.run
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: run(sleep, **options))
    assert gpu.run_child("loss", [], tmp_path / "part", 0.5) == "failed: not done in 0 s"
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, **options: run([*sleep[:2], "raise OSError(7)"], **options)
    )
    assert gpu.run_child("loss", [], tmp_path / "part", 60) == "failed: status 1: OSError: 7"


def test_goals():
    assert common.goal("a", 1.2, 1.15)["met"] is False and common.goal("a", 1.1, 1.15)["met"] is True
    assert common.goal("a", 1.2, 1.15, at_least=True)["met"] is True and common.goal("a", None, 1)["met"] is None
    assert "MISSED  a: 1.2 (at most 1.15)" in common.goals_text([common.goal("a", 1.2, 1.15)])
    row = dict(time_ratio_over_flop_ratio=1.05, memory_ratio=1.1, time_ratio=1.3, decoded_share=5 / 16)
    judged = lpl.goals({lpl.BASE: {}, "q": row, "economical": row}, {"mask_share": 0.2}, "paper796", 512)
    met = {goal["goal"]: goal["met"] for goal in judged}
    assert met["economical: time ratio"] is False and met["q (the paper's share): time ratio"] is True
    assert met["outlier mask: share of the loss's time"] is False
    assert len(lpl.goals({lpl.BASE: {}, "q": row}, None, "small", 64)) == 2


def test_turns_are_interleaved(monkeypatch):
    monkeypatch.setattr(common.gc, "collect", lambda: 0)
    order = []
    seconds = common.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3 and {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}
    assert common.paired_ratio([2, 30, 4], [1, 10, 2]) == 2


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(InputError, match="--miniature"):
        gpu.main([])


@pytest.mark.slow
@pytest.mark.parametrize("module, argv, name", [
    ("gpu", ["--miniature"], "gpu-miniature"),
    ("lpl", ["--size=tiny", "--repeats=1"], "lpl-tiny-32px-cpu"),
    ("torch_lpl", ["--size=tiny", "--resolution=32", "--repeats=1", "--images=2", "--batch=3"], "torch-cpu-32px"),
])  # fmt: skip
def test_as_called(module, argv, name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{module}", *argv, f"--results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == f"{result['date']}-{name}.json"
    if module == "torch_lpl":
        assert {*result["ours_over_torch"], *result["failed"]} == {"torch eager", "torch.compile"}
        assert all(each["value"] < 1e-5 for each in result["agreement"].values())
        assert result["agreement"]["torch eager"]["gradient"] < 1e-3
