"""How much memory a call takes at its peak, beyond what the process had (Linux)."""

import contextlib
import ctypes
import re
from pathlib import Path

import pytest

_PROCESS = Path("/proc/self")


def peak_growth(call) -> int:
    """Bytes of resident memory that `call()` needed at most, beyond those before it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free would be taken again without being seen
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak is forgotten: see proc(5)
    except OSError:
        pytest.skip("this system does not tell the peak of a call's memory")
    before = _kib("VmRSS")
    call()
    return (_kib("VmHWM") - before) * 1024


def _kib(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", (_PROCESS / "status").read_text())[1])
