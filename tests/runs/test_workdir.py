"""The folder of a run: its lock, and what is written into it."""

import fcntl
import json
import os

import pytest

from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.runs.workdir import only_run_in, read_experiment, run_folder, write_config


def test_a_folder_is_for_one_process(tmp_path):
    with only_run_in(tmp_path / "run"):
        with pytest.raises(InputError, match="run is in use by another process"), only_run_in(tmp_path / "run"):
            pass
        (tmp_path / "run/config.json").write_text("{}")
    with only_run_in(tmp_path / "run"):
        pass
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "lock"]  # noqa: PTH208


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    (tmp_path / "made").mkdir()
    for name in ("made", "run"):
        with pytest.raises(InputError, match="mistake"), only_run_in(tmp_path / name):
            raise InputError("mistake")
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "what was there before is kept"


def test_a_lock_on_a_file_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Another process that gave up has removed the file between its opening and its locking here."""
    lock = fcntl.flock

    def too_late(file, how):
        (tmp_path / "run/lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(InputError, match="in use by another process"), only_run_in(tmp_path / "run"):
        pass


def test_a_config_is_written_once(tmp_path, tiny_config):
    experiment = build(tiny_config())
    write_config(experiment, tmp_path)
    path = tmp_path / "config.json"
    os.utime(path, ns=(1, 1))
    write_config(experiment, tmp_path)
    assert path.stat().st_mtime_ns == 1
    assert read_experiment(tmp_path) == experiment
    write_config(build(tiny_config(train__steps=7)), tmp_path)
    assert json.loads(path.read_text())["train"]["steps"] == 7


def test_s3_is_no_place_for_a_run():
    with pytest.raises(InputError, match="--workdir=s3://bucket/run: possible are local paths, gs://BUCKET/...$"):
        run_folder("s3://bucket/run")
