"""What libtpu has decided before it generates machine code: the optimised program and its memory plan.

Experimental: it reads files that XLA dumps for people, whose names and layout are of no released interface (tried with
libtpu 0.0.52). `--codegen` compiles to the end without it.

Generating code took 182 of the 189 seconds of compiling paper796's step for v5e-16, and nothing in a report of memory,
operations and collectives depends on it. Where XLA's flags ask for it (`flags`), libtpu writes the program and its
buffer assignment down first. What is still being compiled then continues in a thread, until the process ends.
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = "after_optimizations_after_buffer_assignment.txt"  # the last of these to be written
BUFFERS = "after_optimizations-buffer-assignment.txt"
USAGE = "after_optimizations-memory-usage-report.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_TOTAL = re.compile(r"^Memory Space: default \(color=0\)\nTotal bytes: (\d+)", re.MULTILINE)


class Plan(NamedTuple):
    """What XLA has planned for a program.

    text: of the optimised program, as a compiled program's `as_text`. memory: bytes by kind, as in
    `step_cost.compile_step`.
    """

    text: str
    memory: dict[str, int]


def flags(folder: str | Path, function: str) -> str:
    """XLA's flags, to be set before JAX is imported, that write down the program of a jitted function in `folder`."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text=true --xla_dump_hlo_module_re=jit_{function}"


def compile_or_plan(compile_: Callable[[], Any], folder: Path, *, pause: float = 0.5) -> Any:
    """What `compile_` returns or raises, or the Plan that stands in `folder` before it is done."""
    results: list[Any] = []

    def run():
        try:
            results.append(compile_())
        except BaseException as error:  # for the caller, whatever it is
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    size = 0
    while thread.is_alive():
        thread.join(pause)
        now = next((path.stat().st_size for path in folder.glob(f"*.{PROGRAM}")), 0)
        if thread.is_alive() and now and now == size:  # it no longer grows
            return read(folder)
        size = now
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def read(folder: Path) -> Plan:
    """The one plan in a folder that `flags` named."""

    def text(ending: str) -> str:
        (path,) = folder.glob(f"*.{ending}")
        return path.read_text()

    return Plan(text(PROGRAM), memory(text(BUFFERS), text(USAGE)))


def memory(buffers: str, usage: str) -> dict[str, int]:
    """Bytes in the device's memory, from the buffer assignment and the report of its use."""
    peak = int(_TOTAL.findall(usage)[0])
    argument = alias = fresh = 0
    for size, rest in _ALLOCATION.findall(buffers):
        live_out = "maybe-live-out" in rest
        if "parameter" in rest:
            argument += int(size)
            alias += int(size) * live_out
        else:
            fresh += int(size) * live_out
    return {
        "argument": argument,
        "output": alias + fresh,
        "temp": peak - argument - fresh,
        "alias": alias,
        "peak": peak,
    }
