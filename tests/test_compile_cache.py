import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import pytest

from lpl_jax import compile_cache
from lpl_jax.runs import open_run

ROOT = Path(compile_cache.__file__).parents[1]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"XDG_CACHE_HOME": "{tmp}/xdg"}, "{tmp}/xdg/lpl_jax/compiled"),
        ({"HOME": "{tmp}/home"}, "{tmp}/home/.cache/lpl_jax/compiled"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg", "LPL_JAX_COMPILE_CACHE": "{tmp}/mine"}, "{tmp}/mine"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg", "LPL_JAX_COMPILE_CACHE": "off"}, None),
        ({"XDG_CACHE_HOME": "{tmp}/xdg", "JAX_COMPILATION_CACHE_DIR": "{tmp}/jax"}, None),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, None),
    ],
)
def test_folder(given, folder, tmp_path, monkeypatch):
    environment = {name: value.format(tmp=tmp_path) for name, value in given.items()}
    monkeypatch.setenv("HOME", environment.get("HOME", "/proc/nowhere"))
    before = dict(environment)
    found = compile_cache.enable(environment)
    if folder is None:
        assert found is None and environment == before
    else:
        assert str(found) == environment["JAX_COMPILATION_CACHE_DIR"] == folder.format(tmp=tmp_path)
        assert found.is_dir() and int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) > 0


def test_tests_write_into_no_home():
    assert os.environ["LPL_JAX_COMPILE_CACHE"] == "off"


@pytest.mark.slow
def test_a_cached_program_trains_to_the_same_bits(tmp_path, tiny_config, with_lpl):
    """Four steps in one go without a cache; two steps twice over, of which the second finds all its programs."""
    config = tiny_config(lpl__taps=3, train__steps=4, train__checkpoint_every=2, **with_lpl)
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    (tmp_path / "config.py").write_text(
        "import json\nfrom pathlib import Path\nfrom ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict(json.loads(Path({str(tmp_path / 'config.json')!r}).read_text()))\n"
    )

    def run(folder, steps, cache):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        environment |= {"LPL_JAX_COMPILE_CACHE": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "train.py", f"--config={tmp_path / 'config.py'}", f"--config.train.steps={steps}"]
        command += [f"--workdir={tmp_path / folder}"]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)

    def programs():
        return {path.name for path in (tmp_path / "cache").glob("*-cache")}

    run("once", 4, "off")
    run("cold", 2, str(tmp_path / "cache"))
    filled = programs()
    assert any(name.startswith("jit_train_step") for name in filled)
    run("warm", 2, str(tmp_path / "cache"))
    resumed = run("warm", 4, str(tmp_path / "cache"))
    assert {name for name in programs() - filled if name.startswith("jit_train_step")} == set()
    assert "first step after" in resumed.stdout and "onated" not in resumed.stdout + resumed.stderr
    trees = (open_run(tmp_path / name).params(weights="params") for name in ("warm", "once"))
    chex.assert_trees_all_equal(*trees)
    starts = [json.loads(line) for line in (tmp_path / "warm/startup.jsonl").read_text().splitlines()]
    cold = json.loads((tmp_path / "cold/startup.jsonl").read_text())
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[0]["seconds"]["compile"] < cold["seconds"]["compile"]
