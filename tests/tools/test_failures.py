"""Whatever goes wrong in any verb is one line on stderr, and a status that is not 0; a traceback is for --debug."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

import lpl_jax
from lpl_jax.tools import cli, verbs

ROOT = Path(lpl_jax.__file__).parents[1]
FAULTS = {
    "a full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/x"),
    "a full disk, as Orbax says it": ValueError("Failed writing: '/r': No space left on device [os_error_code='28']"),
    "a folder that may not be written": PermissionError(errno.EACCES, "Permission denied", "/run"),
    "no network": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    "no memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\nmore"),
    "a fault of ours": KeyError("several\nlines"),
}


def call(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run_main(verbs.main, argv, lower=verbs.VERBS[argv[0]].lower)
    return caught.value.code, capsys.readouterr()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", verbs.VERBS)
def test_every_fault_of_every_verb_is_a_line(verb, fault, monkeypatch, capsys):
    def fail(_):
        raise FAULTS[fault]

    monkeypatch.delenv(cli.DEBUG, raising=False)
    monkeypatch.setattr(verbs.load(verb), "main", fail)
    status, output = call([verb], capsys)
    assert status == (1 if fault == "a fault of ours" else 2)
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    if fault == "no memory":
        assert output.err.rstrip().endswith(verbs.VERBS[verb].lower)
    with pytest.raises(type(FAULTS[fault])):
        cli.run_main(verbs.main, [verb, "--debug"])
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(type(FAULTS[fault])):
        cli.run_main(verbs.main, [verb])


# How each verb is given a path; {} is what cannot be one.
PATHS = {
    "train": "--config quickstart --workdir {}",
    "eval": "--workdir {}",
    "compare": "{}",
    "sample": "--workdir {} --label 1",
    "prepare": "--source photos --resolution 64 --out {}",
    "store": "verify {}",
    "export": "--workdir {} --out other",
    "import": "{} --config quickstart --workdir other",
    "parity": "autoencoder --autoencoder {}",
    "sweep": "--collect --workdir {}",
    "profile": "--config {}",
    "compile-check": "--config {}",
    "analyze": "interp --images {} --out other",
    "quickstart": "--workdir {}",
    "config": "--config {}",
}


@pytest.mark.parametrize("how", ["below a file", "too long", "a bucket without its package", "not a folder"])
@pytest.mark.parametrize("verb", verbs.VERBS)
def test_a_path_that_cannot_be_one_is_a_line(verb, how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    if how.startswith("a bucket"):
        for package in ("gcsfs", "s3fs"):
            monkeypatch.setitem(sys.modules, package, None)
    path = {"below a file": "file/x", "too long": "a" * 300, "not a folder": "file"}.get(how, "gs://bucket/x")
    status, output = call([verb, *PATHS[verb].format(path).split()], capsys)
    assert status != 0
    assert output.err.startswith("error: ") and output.err.count("\n") == 1, output
    assert [each.name for each in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_a_thread_that_fails_prints_nothing_and_fails_the_program(monkeypatch, capsys):
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/events")

    def main(_):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    monkeypatch.setattr(verbs.load("config"), "main", main)
    status, output = call(["config"], capsys)
    assert (status, output.err) == (2, f"error: {os.strerror(errno.ENOSPC)}: /events\n")


def test_prepare_on_a_full_disk_is_a_line_and_leaves_nothing(tmp_path):
    """Files are bounded as a full disk bounds them; the signal that says so otherwise is ignored, as Python does."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    code += "from lpl_jax.tools import verbs; verbs.run()"
    out = tmp_path / "store"
    argv = ["prepare", "--source", "photos", "--crops", "2", "--resolution", "64", "--out", str(out)]
    environment = os.environ | {"LPL_JAX_COMPILE_CACHE": "off", "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    found = subprocess.run([sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr.startswith(f"error: {os.strerror(errno.EFBIG)}: {out}/latents-") and found.stderr.count("\n") == 1
    )
    assert not out.exists()
