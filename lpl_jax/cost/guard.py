"""Whether the compiled training step has grown.

Its operations, memory and communication at tiny size are compared with values in a file, which are renewed on purpose
(`lpl compile-check --update-guard FILE`). The step is compiled for emulated CPU devices: what grows there by more than
the tolerance grows elsewhere, too. The values depend on the version of jax.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lpl_jax import autoencoders
from lpl_jax.cost import topology
from lpl_jax.cost.compile_report import compile_report
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, resolve
from lpl_jax.io.atomic import write_json
from lpl_jax.io.jsons import read_json, record

UPDATE = "lpl compile-check --update-guard"
TOLERANCE = 0.05
# paper796 in small, wide enough that matrices are split over a mesh (`parallel.MIN_SHARD_SIZE`).
CONFIG = {
    "resolution": 32,
    "model": {"preset": "small", "hidden": 64, "depth": 3, "num_classes": 2, "base_grid": 2, "remat": "full"},
    "ema": {"decays": ()},
    "train": {"batch_size": 16},
}
LPL = {"lpl": {"preset": "paper", "tau": 3.0, "tau_ref_resolution": 32, "weight": 1.0, "taps": 3}}  # one of them masked
MESHES = {"1 device": (1, {}), "mesh of 8": (8, {"data": 2, "fsdp": 4})}
CASES = {
    f"{devices}, {loss}": (CONFIG | extra | {"mesh": mesh}, count)
    for devices, (count, mesh) in MESHES.items()
    for loss, extra in (("diffusion loss", {}), ("LPL", LPL))
}


# These two hold all that the others do, for a test that has to be fast.
FAST = ("1 device, diffusion loss", "mesh of 8, LPL")


def measure(cases: Sequence[str] = tuple(CASES)) -> dict[str, dict[str, float]]:
    """Of every case the quantities by name. The process needs eight CPU devices."""
    return {name: _quantities(*CASES[name]) for name in cases}


def _quantities(config: dict[str, Any], devices: int) -> dict[str, float]:
    init = functools.partial(autoencoders.init, autoencoders.AutoencoderConfig.tiny())
    shapes = jax.eval_shape(init, jax.random.key(0))
    experiment = resolve(build(config), shapes.config)
    report = compile_report(experiment, shapes, topology.parse(f"cpu:{devices}"))
    memory = report["memory"]
    found: dict[str, float] = {}
    for name in ("traced", "compiled"):
        found[f"{name} operations"] = report["flops"][name]
    for name in ("argument", "temp", "peak"):
        found[f"memory: {name}, bytes"] = memory[name]
    for kind, total in report["collectives"].items():
        found |= {f"{kind}: number": total["count"], f"{kind}: bytes": total["bytes"]}
    found["full rematerializations"] = len(report["rematerializations"])
    return found


def grown(
    now: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]], tolerance: float = TOLERANCE
) -> list[str]:
    """A line for each quantity of each case that is larger than before by more than the tolerance."""
    lines = []
    for case, quantities in now.items():
        for name, value in quantities.items():
            old = before.get(case, {}).get(name, 0)
            if value > old * (1 + tolerance):
                percent = f" (+{value / old - 1:.1%})" if old else ""
                lines.append(f"{case}: {name} was {old:,.0f}, is {value:,.0f}{percent}")
    return lines


class Known(NamedTuple):
    """What the file of the guard holds: the version of jax, and the cases as `measure` returns them."""

    jax: str
    cases: Mapping[str, Mapping[str, float]]


def read(file: Path) -> Known:
    """The values in a file. Raises InputError where there is no such file, or it is damaged."""
    try:
        return record(Known, read_json(file), str(file))
    except InputError as error:
        raise InputError(f"{error}; make it: {UPDATE} {file}") from error


def write(file: Path) -> list[str]:
    """Measures, writes the file and returns a line for each quantity that changed."""
    before = read(file).cases if file.exists() else {}
    now = measure()
    write_json(file, {"jax": jax.__version__, "cases": now})
    lines = []
    for case in {**now, **before}:
        old, new = before.get(case, {}), now.get(case, {})
        lines += [
            f"{case}: {name}: {old.get(name, 0):,.0f} -> {new.get(name, 0):,.0f}"
            for name in {**new, **old}
            if old.get(name, 0) != new.get(name, 0)
        ]
    return lines
