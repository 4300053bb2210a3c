"""Signals: in a library, and in programs that hear of them while Python runs no handlers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import lpl_jax
from benchmarks.kills import catches_signals
from lpl_jax.stopping import Stopped, StopSignal
from lpl_jax.tools import verbs


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal, also where the tests themselves run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested is None


def test_first_signal_asks_to_stop_and_the_second_does_what_it_did(interruptible):
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested is signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == previous
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) not in previous
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == previous
    assert stop.requested is None


def test_signals_are_left_alone_outside_the_main_thread():
    entered = []

    def use():
        with StopSignal() as stop:
            entered.append(stop.requested)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert entered == [None]


# --- programs ---

ROOT = Path(lpl_jax.__file__).parents[1]
PRELUDE = """
import hashlib, os, signal, sys, threading, time
from lpl_jax import stopping
stopping.catch(["verb", "--flag", "a b"])
stopping.PROMPTLY = stopping.PATIENCE = 0.4
def busy():  # in C, where no handler runs
    threading.Timer(0.05, print, ["ready"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**8)
def idle(seconds=30):
    print("ready", flush=True)
    time.sleep(seconds)
"""
LINE = "stopped by {}; to go on: lpl verb --flag 'a b'\n"


def start(code, **options):
    """A program that catches signals, once it is ready for one."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    process = subprocess.Popen([sys.executable, "-c", PRELUDE + code], **options)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def end(process, *signals, pause=0.0):
    """(status, stderr, seconds) after the signals."""
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    _, said = process.communicate(timeout=30)
    return process.returncode, said, time.monotonic() - began


def test_a_signal_removes_what_is_half_written_and_says_how_to_go_on(tmp_path):
    code = f"""
from lpl_jax.tools import cli
def main(argv):
    file = open({str(tmp_path / "half")!r}, "w")
    try:
        idle()
    finally:
        os.remove(file.name)
cli.run_main(main, [], keep_programs=False)"""
    for debug in ("0", "1"):
        status, said, seconds = end(start(code, env=os.environ | {"LPL_DEBUG": debug}), signal.SIGTERM)
        assert (status, said) == (130, "lpl verb: " + LINE.format("SIGTERM")) and seconds < 2
        assert not list(tmp_path.iterdir())


def test_an_error_that_a_signal_leads_to_is_no_error():
    code = (
        "from lpl_jax.tools import cli\ndef main(argv):\n try: idle()\n except BaseException: raise OSError('torn')\n"
    )
    status, said, _ = end(start(code + "cli.run_main(main, [], keep_programs=False)"), signal.SIGINT)
    assert (status, said) == (130, "lpl verb: " + LINE.format("SIGINT"))


@pytest.mark.parametrize("where", ["with stopping.unwinding():", "with stopping.StopSignal():"])
def test_a_program_that_is_in_c_ends_all_the_same(where):
    status, said, seconds = end(start(f"{where}\n    busy()"), signal.SIGTERM)
    assert (status, said) == (130, "lpl verb: " + LINE.format("SIGTERM")) and 0.3 < seconds < 3


def test_a_second_signal_ends_a_program_at_once_and_a_doubled_one_is_one():
    code = "stopping.PATIENCE = 60\nwith stopping.StopSignal() as stop:\n    busy()"
    status, said, seconds = end(start(code), signal.SIGTERM, signal.SIGINT, pause=0.3)
    assert (status, said) == (130, "lpl verb: " + LINE.format("SIGTERM")) and seconds < 3
    code = "stopping.PATIENCE = 60\nwith stopping.StopSignal() as stop:\n    idle(1)\nprint(stop.requested.name)"
    process = start(code)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("SIGTERM\n", "") and process.returncode == 0


def test_nothing_is_raised_while_a_module_is_imported(tmp_path):
    """Modules in C++ break down at an exception in the middle of their beginning."""
    (tmp_path / "slow.py").write_text("import __main__\n__main__.idle(1.0)\n__main__.through = True")
    code = f"sys.path.insert(0, {str(tmp_path)!r})\n"
    status, said, seconds = end(start(code + "with stopping.unwinding():\n    import slow"), signal.SIGTERM)
    assert (status, said) == (130, "lpl verb: " + LINE.format("SIGTERM")) and seconds < 0.9
    code += """
stopping.PATIENCE = 60
with stopping.StopSignal() as stop:
    try:
        with stop.leaving(unsaved=True):
            import slow
            time.sleep(30)
    except stopping.Stopped:
        print(stop.requested.name, through, flush=True)"""
    process = start(code)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("SIGTERM True\n", "")


def test_a_signal_that_a_program_ignores_stays_ignored():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + PRELUDE + "idle(0.5)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", None) and process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_program_that_another_one_waits_for_ends_with_it(number, tmp_path):
    child = PRELUDE.replace("print", "print(os.getpid(), file=open('pid', 'w'), flush=True) or print")
    child += "with stopping.StopSignal() as stop:\n    while not stop.requested: idle(0.01)\n"
    child += "open('saved', 'w').close()"
    code = f"with stopping.unwinding():\n    stopping.call([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r}, "
    code += f"env=os.environ | {{'PYTHONPATH': {str(ROOT)!r}}})"
    process = start(code)
    process.send_signal(number)
    process.wait(10)
    for _ in range(200):
        if (tmp_path / "saved").exists():
            break
        time.sleep(0.01)
    assert (tmp_path / "saved").exists(), "also where its parent could do nothing"
    process.stdout.close()
    process.stderr.close()


def test_a_signal_to_a_worker_is_none_to_its_program():
    code = """
if (pid := os.fork()) == 0:
    time.sleep(30)
time.sleep(0.1)
os.kill(pid, signal.SIGTERM)
print("ready", os.waitpid(pid, 0)[1] & 127, stopping.stopped())"""
    found = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == f"ready {int(signal.SIGTERM)} False\n"


def test_a_part_that_may_be_left_is_left_at_once(interruptible):
    with StopSignal() as stop:
        with pytest.raises(Stopped), stop.leaving(unsaved=True):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert stop.requested is signal.SIGTERM and stop.before(2)
        with pytest.raises(Stopped), stop.leaving(unsaved=True):
            raise AssertionError("it is not begun any more")


def test_every_verb_ends_by_a_signal_from_its_first_moment():
    processes = {verb: subprocess.Popen(
        [sys.executable, "-m", "lpl_jax", verb, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True) for verb in verbs.VERBS}  # fmt: skip
    for verb, process in processes.items():
        while process.poll() is None and not catches_signals(process.pid):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate()
        done = process.returncode == 0 and out  # it was as fast as this test
        assert done or (process.returncode, said) == (
            130,
            f"lpl {verb}: stopped by SIGTERM; to go on: lpl {verb} --help\n",
        )
