"""One writer of a folder at a time."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lpl_jax.errors import InputError
from lpl_jax.io import locks
from lpl_jax.io.atomic import append_text, write_text
from lpl_jax.io.locks import only_writer, writer_of


def elsewhere(function):
    """function() in another thread, for which a lock of this one is another writer's; raises what it raises."""
    raised = []

    def run():
        try:
            function()
        except InputError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def take(folder, part=None):
    with only_writer(folder, part):
        pass


def test_a_folder_has_one_writer_and_nothing_is_left_of_its_lock(tmp_path):
    with only_writer(tmp_path / "a/run"):
        with pytest.raises(InputError, match=rf"run is in use by process {os.getpid()} \(.*\), which writes there"):
            elsewhere(lambda: take(tmp_path / "a/run"))
        with only_writer(tmp_path / "a/run"):
            (tmp_path / "a/run/result").write_text("")
        with pytest.raises(InputError, match="in use"):
            elsewhere(lambda: take(tmp_path / "a/run"))
    elsewhere(lambda: take(tmp_path / "a/run"))
    assert [path.name for path in (tmp_path / "a/run").iterdir()] == ["result"]


def test_a_folder_that_nothing_was_written_into_is_gone_again(tmp_path):
    (tmp_path / "made").mkdir()
    for name in ("made", "new/run"):
        with pytest.raises(InputError, match="mistake"), only_writer(tmp_path / name):
            raise InputError("mistake")
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "what was there before is kept"


def test_several_writers_share_a_folder_by_their_numbers(tmp_path):
    with only_writer(tmp_path, 0):
        elsewhere(lambda: take(tmp_path, 1))
        for part in (0, None):
            with pytest.raises(InputError, match="in use"):
                elsewhere(lambda part=part: take(tmp_path, part))
    elsewhere(lambda: take(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_writer_is_named(tmp_path):
    assert writer_of(tmp_path) is None
    with only_writer(tmp_path):
        assert writer_of(tmp_path) is None, "it is this one"
        others = []
        elsewhere(lambda: others.append(writer_of(tmp_path)))
        assert others[0].startswith(f"process {os.getpid()} (")
        about = {"host": "node7", "pid": 12, "command": "lpl train"}
        (tmp_path / ".lock").write_text(json.dumps(about))
        with pytest.raises(InputError, match=r"in use by process 12 on host node7 \(lpl train\)"):
            elsewhere(lambda: take(tmp_path))


def test_what_a_killed_writer_has_left_is_taken_over(tmp_path):
    code = "import sys, pathlib, time; from lpl_jax.io.locks import only_writer\n"
    code += "with only_writer(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {process.pid} "):
        take(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / ".lock").read_text())["host"] == socket.gethostname()
    take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Its owner has removed the file at its end, between its opening and its locking here: it is taken anew."""
    lock, calls = fcntl.flock, []

    def too_late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with only_writer(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_said_and_nothing_is_refused(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(locks.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    take(tmp_path / "run")
    assert "is on a file system without locks: no other process may write there" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


RACE = """
import os, pathlib, sys, time
from lpl_jax.errors import InputError
from lpl_jax.io.locks import only_writer
root, rounds, begin = pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0.0
print("ready", flush=True)
begin = float(sys.stdin.readline())
for number in range(rounds):
    while time.time() < begin + 0.04 * number:
        pass
    try:
        with only_writer(root / f"{number}/new/run"):
            mine = root / f"{number}/new/run/mine"
            mine.touch(exist_ok=False)  # two at a time would meet here
            time.sleep(0.005 * (number % 3))
            mine.unlink()
            (root / f"won.{number}.{os.getpid()}").touch()
    except InputError as error:
        (root / f"lost.{number}.{os.getpid()}").write_text(str(error))
"""


def test_of_jobs_started_in_one_new_folder_at_the_same_moment_one_has_it(tmp_path):
    """Real processes, many rounds: the folder is made, and removed again, while others look for it."""
    rounds, command = 30, [sys.executable, "-c", RACE, str(tmp_path), "30"]
    jobs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [job.stdout.readline() for job in jobs] == ["ready\n"] * 3
    begin = time.time() + 0.1
    for job in jobs:
        job.stdin.write(f"{begin}\n")
        job.stdin.close()
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    for number in range(rounds):
        assert list(tmp_path.glob(f"won.{number}.*")), "nobody had it"
    lost = [path.read_text() for path in tmp_path.glob("lost.*")]
    assert lost and all(
        re.search(r"in use by (process \d+ \(.* of this host\)|another process), which", text) for text in lost
    )


@pytest.mark.parametrize("made", ["file", "link"])
def test_a_path_that_is_no_folder_is_said(made, tmp_path):
    path = tmp_path / "it"
    path.touch() if made == "file" else path.symlink_to(tmp_path / "nothing")
    what = "is a file" if made == "file" else "is a link to nothing"
    for folder in (path, path / "run"):
        with pytest.raises(InputError, match=f"{path} {what}: give a folder"):
            take(folder)


@pytest.mark.parametrize("write", [write_text, append_text])
def test_a_folder_that_is_gone_while_one_writes_there_is_not_made_anew(write, tmp_path):
    with (
        pytest.raises(InputError, match="run was removed while files were written there"),
        only_writer(tmp_path / "run"),
    ):
        write(tmp_path / "run/a.txt", "a")
        shutil.rmtree(tmp_path / "run")
        write(tmp_path / "run/a.txt", "b")
    with pytest.raises(InputError, match=f"run was renamed to {tmp_path}/other while"), only_writer(tmp_path / "run"):
        write(tmp_path / "run/a.txt", "a")
        (tmp_path / "run").rename(tmp_path / "other")
        write(tmp_path / "run/a.txt", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["other"] and (tmp_path / "other/a.txt").read_text() == "a"


def test_what_is_written_elsewhere_is_no_matter(tmp_path):
    with only_writer(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        write_text(tmp_path / "run2/a.txt", "a")
    assert (tmp_path / "run2/a.txt").exists()
