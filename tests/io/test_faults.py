"""Failures of the machine, as libraries raise them, in a line."""

import errno
import os

import jax
import pytest

from lpl_jax.errors import InputError
from lpl_jax.io.atomic import append_text, atomic_path, write_json, write_text
from lpl_jax.io.faults import LONGEST, explain, naming

NO_SPACE = os.strerror(errno.ENOSPC)


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


class ClientError(Exception):
    """As aiohttp raises them."""


ClientError.__module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (InputError("a\n  mistake"), "a mistake", 2),
        (OSError(errno.ENOSPC, NO_SPACE, "/run/x"), f"{NO_SPACE}: /run/x", 2),
        (PermissionError(errno.EACCES, "Permission denied", "/run"), "Permission denied: /run", 2),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/home/x"), "Disk quota exceeded: /home/x", 2),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed writing: \"/r/d/9\": No space left on device [os_error_code='28']"),
            f"{NO_SPACE}: /r/d/9",
            2,
        ),
        (RuntimeError("write() failed: No space left on device; writing /s/a.partial; at byte 4"), NO_SPACE, 2),
        (Exception("I/O error: No space left on device (os error 28)"), NO_SPACE, 2),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."),
            "out of memory on the device: 123 bytes more were asked for; give less",
            2,
        ),
        (MemoryError("Unable to allocate 2 GiB"), "out of memory on the host: Unable to allocate 2 GiB; give less", 2),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused", 2),
        (ClientError("Cannot connect to host storage.googleapis.com:443"), "storage.googleapis.com", 2),
        (TimeoutError("timed out"), "the network is not there, or refuses: timed out", 2),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "the package torch is not installed", 2),
        (RuntimeError("Grain worker process 3 was terminated unexpectedly"), "a worker process was killed", 2),
        (raised(RuntimeError("save failed"), OSError(errno.ENOSPC, NO_SPACE, "/r")), f"{NO_SPACE}: /r", 2),
        (raised(RuntimeError("no batch"), InputError("record 3 cannot be read")), "record 3 cannot be read", 2),
        (KeyError("x"), "KeyError: 'x' (not expected: --debug shows where)", 1),
    ],
)
def test_an_error_is_a_line(error, line, status):
    text, found = explain(error, lower="give less")
    assert line in text and "\n" not in text and found == status


def test_a_line_has_an_end():
    assert len(explain(InputError("x" * 20000))[0]) < LONGEST + 10


@pytest.mark.parametrize("write", [write_text, append_text, write_json])
def test_a_full_disk_is_said_with_the_path(tmp_path, write):
    """/dev/full takes nothing, as a full disk does, and its errors do not name it."""
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=NO_SPACE) as caught:
        write(full, "x" * 10000)
    assert explain(caught.value)[0] == f"{NO_SPACE}: {full}"


def test_what_fails_while_a_folder_is_made_names_it(tmp_path):
    with pytest.raises(OSError, match="/out") as caught, atomic_path(tmp_path / "out"):
        raise RuntimeError(f"write() failed: {NO_SPACE}")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_named_is_kept_and_other_errors_are_left_alone():
    with pytest.raises(FileNotFoundError, match="nowhere"), naming("/run"):
        open("nowhere")  # noqa: PTH123, SIM115
    with pytest.raises(KeyError, match="x"), naming("/run"):
        raise KeyError("x")
