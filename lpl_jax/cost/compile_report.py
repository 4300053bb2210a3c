"""The full-size training step compiled ahead of time for devices that need not be there: what it takes on each of them.

Nothing of full size is allocated: state, batch and autoencoder are shapes with shardings.
"""

import contextlib
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.cost import hlo, step_cost
from lpl_jax.cost.plan import Plan
from lpl_jax.cost.topology import GIB, MESSAGES, Topology, devices, mesh_context
from lpl_jax.errors import InputError
from lpl_jax.experiment import Experiment
from lpl_jax.io.atomic import write_text
from lpl_jax.text import TextConditioner

# The partitioner copies a whole array to every device where it knows no better way from one sharding to another.
FULL_REMATERIALIZATION = "Involuntary full rematerialization"
ATTEMPTS = 8  # to compile at the batch size that `find_batch` expects to fit


def compile_report(
    experiment: Experiment,
    autoencoder: Autoencoder,
    topology: Topology,
    text: TextConditioner | None = None,
    *,
    hlo_file: str | Path | None = None,
    plan_folder: Path | None = None,
) -> dict[str, Any]:
    """What the step of a resolved experiment takes on each device, as plain values.

    `memory`: bytes; `hbm`, `fits`; where the step does not fit, `memory` holds `peak` alone, or nothing if the state
    alone is too large and nothing was compiled. `flops`: a step on one device; `analytic` (usual convention, nothing
    computed again), `traced`, `compiled` (matrix products and convolutions in the optimised program, loops as often as
    they run, and the traced ones of `kernels`), `xla` (its own count, loops once). `collectives`: see `hlo.summary`.
    `rematerializations`: see `rematerialized`. `code`: whether machine code was generated. hlo_file: where the text
    of the program goes. plan_folder: see `step_cost.compile_step`; the caller has to end the process then.

    Raises InputError as `topology.devices` and `parallel.make_mesh` do, or for a batch that does not divide.
    """
    mesh = parallel.make_mesh(experiment.mesh, devices(topology))
    batch = experiment.train.batch_size
    with mesh_context(mesh):
        analytic = step_cost.analyse(experiment, autoencoder, text)
        state = step_cost.abstract_arguments(experiment, autoencoder, mesh, text)[0]
        report = {
            "topology": topology.name,
            "devices": mesh.size,
            "mesh": dict(mesh.shape),
            "batch_size": batch,
            "resolution": experiment.resolution,
            "decoded": analytic["decoding"]["images"],
            "effort": jax.config.values["jax_exec_time_optimization_effort"],
            "versions": versions(topology),
            "state": _bytes_on_each(state),
            "state_whole": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            "hbm": topology.hbm,
        }
        if topology.hbm is not None and report["state"] > topology.hbm:
            return report | {"fits": False, "memory": {}}
        with _stderr() as messages:
            try:
                compiled, measured = step_cost.compile_step(
                    experiment, autoencoder, mesh, text, plan_folder=plan_folder
                )
            except jax.errors.JaxRuntimeError as error:
                needed = _memory_needed(str(error), report["state"])
                if needed is None:
                    raise
                return report | {"fits": False, "memory": {"peak": needed}}
    planned = isinstance(compiled, Plan)
    lines = compiled.text if planned else compiled.as_text()
    if hlo_file is not None:
        write_text(hlo_file, lines)
    program = hlo.summary(lines)
    memory = measured["memory"]
    return report | {
        "fits": None if topology.hbm is None or not memory else memory["peak"] <= topology.hbm,
        "memory": memory,
        "flops": {
            "analytic": analytic["analytic"]["usual"]["total"] * batch / mesh.size,
            "traced": measured["traced"] / mesh.size,
            "compiled": program.pop("flops") + measured["traced_kernels"] / mesh.size,
            "kernels": measured["traced_kernels"] / mesh.size,
            "xla": None if planned else measured["flops"],
        },
        **program,
        "rematerializations": rematerialized(messages()),
        "code": not planned,
        "compile_seconds": measured["compile_seconds"],
    }


def rematerialized(messages: str) -> list[str]:
    """Operations, with their shapes, that the partitioner warns to have copied whole to every device, one by one."""
    found = []
    for line in messages.splitlines():
        if FULL_REMATERIALIZATION in line:
            shape, name = re.search(r" = (\S+?\[[\d,]*\])", line), re.search(r'op_name="([^"]*)"', line)
            found.append(f"{shape[1] if shape else 'an array'} of {name[1] if name else 'an unnamed operation'}")
    return found


def versions(topology: Topology) -> dict[str, str]:
    """Of what a compiled program depends on."""
    names = ["jax", "jaxlib", *(["libtpu"] if topology.platform == "tpu" else [])]
    # libtpu may lie where nothing is imported from, and be named by its file.
    places = [*sys.path, *map(str, Path(os.environ.get("TPU_LIBRARY_PATH", "")).parents[1:2])]
    found = {}
    for name in names:
        for each in importlib.metadata.distributions(name=name, path=places):
            found.setdefault(name, each.version)
    return found


def find_batch(measure: Callable[[int], dict[str, Any]], first: int, shards: int) -> tuple[int | None, list[dict]]:
    """The largest batch that fits, a multiple of `shards`, and the reports of all that was compiled on the way.

    Two compiled plans, of `first` and of twice as many images, give a line; what that expects to fit is compiled, too,
    and corrected with what is found. Near the limit a compiler saves memory and the line bends: the search ends where
    the next batch is too large, or after some attempts. None: not even one image for each shard fits.

    measure: batch size -> report, whose `memory["peak"]` is compared with `hbm`.
    Raises InputError where the memory of the devices is not known.
    """
    reports: dict[int, dict[str, Any]] = {}

    def peak(batch: int) -> float:
        if batch not in reports:
            reports[batch] = measure(batch)
        return reports[batch]["memory"].get("peak", float("inf"))

    first = max(first // shards, 1) * shards
    peak(first)
    hbm = reports[first]["hbm"]
    if hbm is None:
        raise InputError("--find-batch: the memory of these devices is not known; name a TPU topology")
    second = 2 * first if peak(first) <= hbm else max(first // 2 // shards, 1) * shards
    peak(second)
    further = shards
    for _ in range(ATTEMPTS):
        known = {batch: peak(batch) for batch in reports if peak(batch) < float("inf")}
        low = max((batch for batch in reports if peak(batch) <= hbm), default=0)
        high = min((batch for batch in reports if peak(batch) > hbm and batch > low), default=None)
        batch = _expected(known, hbm, shards)
        if high is not None:
            if high - low <= shards:
                break
            least = (high - low) // 8  # by which what is not known shrinks, wherever the line points
            batch = min(max(batch, low + least), high - least) // shards * shards
            batch = min(max(batch, low + shards), high - shards)
        elif batch <= low:
            batch, further = low + further, 2 * further
        peak(batch)
    fitting = [batch for batch in reports if peak(batch) <= hbm]
    return max(fitting, default=None), [reports[batch] for batch in sorted(reports)]


def _expected(known: dict[int, float], hbm: float, shards: int) -> int:
    """Where the line through the two plans nearest to `hbm` meets it, rounded down."""
    points = sorted(known.items(), key=lambda point: abs(point[1] - hbm))[:2]
    if len(points) < 2 or points[0][1] == points[1][1]:
        return 0
    (a, low), (b, high) = sorted(points)
    return int(a + (hbm - low) * (b - a) / (high - low)) // shards * shards


def _bytes_on_each(tree) -> int:
    """Bytes of a tree of arrays or shapes on each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = 1
        for side in leaf.sharding.shard_shape(leaf.shape):
            size *= side
        total += size * leaf.dtype.itemsize
    return total


def _memory_needed(message: str, state: float) -> float | None:
    """Bytes, from libtpu's message that they are not there; None where the message is another one.

    It names all that is needed, or the temporaries alone: then the state comes on top.
    """
    whole = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM", message)
    match = whole or temporaries
    if match is None:
        return None
    size = float(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB}[match[2]]
    return size if whole else size + state


@contextlib.contextmanager
def _stderr():
    """Keeps what is written on stderr, by C++ too, from it; yields a function that returns that text afterwards.

    Where MESSAGES names a file the text is in it meanwhile: who started this process finds it there if a library ends
    the process.
    """
    sys.stderr.flush()
    kept, text = os.dup(2), ""
    path = os.environ.get(MESSAGES)
    with Path(path).open("w+b") if path else tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: text
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            file.truncate(0)
