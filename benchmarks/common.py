"""What the benchmarks share: runs that take turns, the machine in words, random autoencoders, and dated results.

`benchmarks` is run from the checkout: `python -m benchmarks.lpl`. Nothing here imports jax before it is needed, so that
flags for XLA can be set first.
"""

import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# Instruction sets that decide how fast products and convolutions are on a CPU.
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turns, so that what else the machine does falls on all of them alike.

    runs: functions that return once their work is done. warm_up: rounds before the timed ones.
    """
    seconds = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def blocking(function: Callable, *args) -> Callable[[], Any]:
    """A call without arguments that waits for its result, for jax."""
    import jax

    return lambda: jax.block_until_ready(function(*args))


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median and range."""
    rounded = [round(value, 6) for value in seconds]
    return {"median_seconds": round(statistics.median(seconds), 6), "range": [min(rounded), max(rounded)]}


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios of runs of the same turn: what slows one turn down cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def goal(name: str, value: float | None, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """One goal with what was measured; met is None where nothing was."""
    met = None if value is None else bool(value >= limit if at_least else value <= limit)
    shown = None if value is None else round(value, 4)
    return {"goal": name, "value": shown, "limit": limit, "kind": "at least" if at_least else "at most", "met": met}


def random_autoencoder(config):
    """An autoencoder with random weights whose norms are not the identity.

    Drawn by NumPy: compiling jax's initialisers of so many parameters takes longer than all else.
    """
    import jax
    import numpy as np

    from lpl_jax import autoencoders

    shapes = jax.eval_shape(functools.partial(autoencoders.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(leaf):
        kernel = len(leaf.shape) > 1
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if kernel else 0.2
        return spread * rng.standard_normal(leaf.shape, np.float32) + np.float32(not kernel)

    return jax.device_put(jax.tree.map(draw, shapes))


def latents(config, resolution: int, count: int) -> tuple[Any, Any]:
    """Predicted and clean latents (count, h, w, C) that lie as near to each other as at low noise, float32 arrays."""
    import numpy as np

    rng = np.random.default_rng(0)
    side = resolution // config.downsample
    shape = (count, side, side, config.latent_channels)
    clean = rng.standard_normal(shape, np.float32)
    return clean + 0.3 * rng.standard_normal(shape, np.float32), clean


def machine() -> dict[str, Any]:
    """The machine and the versions, in general words."""
    import jax

    devices = jax.devices()
    found = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "architecture": platform.machine(),
        "cpu": _cpu("model name", platform.processor() or "unknown"),
        "instructions": [name for name in INSTRUCTIONS if name in _cpu("flags", "").split()],
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
    }
    for package in ("jax", "jaxlib", "flax", "numpy", "torch", "diffusers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _cpu(field: str, default: str) -> str:
    """A field of the first core in /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return default


def today() -> str:
    return datetime.date.today().isoformat()


def write(result: Mapping[str, Any], name: str, folder: Path) -> Path:
    """`result` as FOLDER/YYYY-MM-DD-NAME.json; the path."""
    from lpl_jax.io.atomic import write_json

    path = folder / f"{today()}-{name}.json"
    write_json(path, result)
    return path


def goals_text(goals: list[Mapping[str, Any]]) -> str:
    """A line for each goal."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    return "\n".join(f"{words[g['met']]:>12}  {g['goal']}: {g['value']} ({g['kind']} {g['limit']})" for g in goals)
