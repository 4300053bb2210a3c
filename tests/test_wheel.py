"""The package from a wheel, in an empty folder: the program, its configs and its weights are there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder that the wheel is installed in, without what it depends on."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "lpl_jax", source / "lpl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", source, source], check=True)
    (wheel,) = source.glob("lpl_jax-*.whl")
    subprocess.run([*pip, "install", *options, "--target", place, wheel], check=True)
    return place


@pytest.fixture
def lpl(installed, tmp_path):
    """function(*arguments) -> what the program prints, called in an empty folder."""

    def call(*arguments):
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [installed / "bin/lpl", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_program_is_there(lpl):
    assert "compile-check" in lpl("--help")
    assert lpl("train", "--help").startswith("usage: lpl train ")


def test_configs_are_found(lpl):
    assert "steps" in lpl("config")
    for config in ("imagenet:256,lpl", "configs/imagenet.py:256,lpl"):
        assert "stabilityai/sdxl-vae" in lpl("config", f"--config={config}")


def test_data_is_there(installed):
    """Every file of the package."""
    ours = {path.relative_to(ROOT) for path in (ROOT / "lpl_jax").rglob("*") if "__pycache__" not in path.parts}
    missing = [path for path in ours if (ROOT / path).is_file() and not (installed / path).is_file()]
    assert missing == []
    names = {str(path.relative_to("lpl_jax")) for path in ours}
    weights = {"autoencoders/bundled/diffusion_pytorch_model.safetensors", "evaluation/bundled/classifier.safetensors"}
    assert weights | {"configs/paper.py"} <= names
