"""Time, extra memory and agreement of `lpl_jax.evaluation.prdc` and of the `prdc` package (pip install prdc).

    python benchmarks/prdc.py            10,000 x 10,000 x 2048, some minutes
    python benchmarks/prdc.py --quick    2,000 x 2,000 x 256

Each measurement is a process of its own, the methods taking turns, and counts what a user waits for: compilation too.
CPU seconds, of all threads, tell more than the clock where a machine has other work to do.
The result is printed and written to benchmarks/results/YYYY-MM-DD-prdc.json.
"""

import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # of this file's folder, where it would hide the package of its name

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lpl_jax.io.atomic import write_json  # noqa: E402
from lpl_jax.tools.cli import Parser, run_main  # noqa: E402

METHODS = {"lpl_jax float64": "float64", "lpl_jax float32": "float32", "prdc": None}
SIZES = {True: (2000, 256), False: (10000, 2048)}
RANK = 16  # dimensions in which the features really spread, so that the four numbers are neither 0 nor 1


def features(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and fake features (count, width), float32."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((RANK, width), np.float32)

    def draw(scale):
        rows = rng.standard_normal((count, RANK), np.float32) @ basis
        rows *= scale
        rows += 0.1 * basis[0]
        return rows

    return draw(1.0), draw(0.9)


def measure(method: str, count: int, width: int, k: int) -> dict:
    """What one method takes in this process (seconds, growth of the peak of resident memory), and its four numbers."""
    real, fake = features(count, width)
    if METHODS[method]:
        from lpl_jax.evaluation.prdc import prdc

        def run():
            return prdc(real=real, fake=fake, k=k, dtype=METHODS[method]).means()
    else:
        from prdc import compute_prdc

        def run():
            with contextlib.redirect_stdout(io.StringIO()):
                return compute_prdc(real, fake, nearest_k=k)

    memory, clock, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    means = run()
    return dict(
        seconds=time.perf_counter() - clock,
        cpu_seconds=time.process_time() - cpu,
        extra_mib=_peak_mib() - memory,
        means={key: float(means[key]) for key in sorted(means)},
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def compare(count: int, width: int, k: int, repeats: int) -> dict:
    """All methods in turn, `repeats` times, and their medians."""
    runs = {method: [] for method in METHODS}
    load = [os.getloadavg()[0]]
    for method in tqdm(list(METHODS) * repeats, desc=f"{count} x {count} x {width}", disable=None):
        command = [sys.executable, __file__, "--measure", method]
        given = ["--count", str(count), "--width", str(width), "--k", str(k)]
        done = subprocess.run(command + given, stdout=subprocess.PIPE, check=True, text=True)
        runs[method].append(json.loads(done.stdout.splitlines()[-1]))
    load.append(os.getloadavg()[0])
    methods = {
        method: dict(
            median_seconds=median(found, "seconds"),
            median_cpu_seconds=median(found, "cpu_seconds"),
            seconds=[round(run["seconds"], 2) for run in found],
            extra_mib=round(max(run["extra_mib"] for run in found)),
            **found[0]["means"],
        )
        for method, found in runs.items()
    }
    return dict(
        date=datetime.date.today().isoformat(),
        size=dict(real=count, fake=count, dimensions=width, k=k),
        methods=methods,
        prdc_over_ours={
            method: {
                key: round(methods["prdc"][key] / methods[method][key], 2)
                for key in ("median_seconds", "median_cpu_seconds", "extra_mib")
            }
            for method in METHODS
            if METHODS[method]
        },
        largest_difference={
            method: max(abs(runs[method][0]["means"][key] - value) for key, value in runs["prdc"][0]["means"].items())
            for method in METHODS
            if METHODS[method]
        },
        load_average=dict(before=round(load[0], 2), after=round(load[1], 2)),
        machine=machine(),
    )


def median(runs: list[dict], key: str) -> float:
    return round(statistics.median(run[key] for run in runs), 2)


def machine() -> dict:
    packages = ("jax", "jaxlib", "numpy", "scikit-learn", "prdc")
    return dict(
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        architecture=platform.machine(),
        platform=os.environ.get("JAX_PLATFORMS", "default of JAX"),
        python=platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    )


def main(argv) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--quick", action="store_true", help="a small size")
    flags.add_argument("--count", type=int, help="samples in each set, instead of the size's")
    flags.add_argument("--width", type=int, help="dimensions, instead of the size's")
    flags.add_argument("--k", type=int, default=3, help="nearest neighbours")
    flags.add_argument("--repeats", type=int, default=3, help="measurements of each method")
    flags.add_argument("--results", type=Path, default=HERE / "results", help="folder for the result")
    flags.add_argument("--measure", choices=METHODS, help="measure one method in this process and print it")
    args = flags.parse_args(argv)
    count, width = args.count or SIZES[args.quick][0], args.width or SIZES[args.quick][1]
    if args.measure:
        print(json.dumps(measure(args.measure, count, width, args.k)))
        return 0
    result = compare(count, width, args.k, args.repeats)
    print(json.dumps(result, indent=2))
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / f"{result['date']}-prdc.json", result, indent=2)
    # float32 decides ties by rounding: up to some pairs among all may differ
    allowed = {"lpl_jax float64": 1e-12, "lpl_jax float32": 1e-3}
    if wrong := [method for method, value in result["largest_difference"].items() if value > allowed[method]]:
        print(f"the numbers of {' and '.join(wrong)} are not those of prdc", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
