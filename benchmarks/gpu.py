"""Everything that wants a GPU, in one call of less than nine minutes: numerics, times, memory, kernels.

    python -m benchmarks.gpu                    one large GPU (80 GB)
    python -m benchmarks.gpu --miniature        the same program on a CPU at tiny size, so that it cannot rot

Sections, each a process of its own with a time limit; what a section has found is in the result as soon as it is known,
and one that fails or runs out of time is reported and keeps none of the others from running:

  numerics    loss, gradient, decoder and samplers on the GPU against the CPU in float32, within the stated tolerances
  steps_512   steps of paper796 without and with the loss (the paper's share, and economical): ratios, MFU, memory,
  steps_256   and what the kernels of the step with the loss are
  loss        the loss alone, forward and backward, and the share of its outlier mask
  torch       the loss against PyTorch's, where PyTorch sees the GPU
  sampler     images/s of DDIM with guidance and of the decoder
  inception   images/s of the evaluator's network

Exit status: 0, or 1 where a section failed or a number is outside its tolerance. Goals that are missed are printed.
The result is written to benchmarks/results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu_sections import FULL, MINIATURE, SECTIONS, Record, Scale
from lpl_jax import xla_flags
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.tools.cli import Parser, run_main

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 520


def recorder(path: Path) -> Record:
    """A function that merges what it is given into the JSON file, lists by appending."""

    def record(**found: Any) -> None:
        known = json.loads(path.read_text()) if path.is_file() else {}
        for name, value in found.items():
            known[name] = known[name] + value if isinstance(value, list) and name in known else value
        write_json(path, known, indent=None)

    return record


def run_section(name: str, scale: Scale, path: Path) -> str:
    """Run it here; "ok" or what failed."""
    try:
        SECTIONS[name][0](scale, recorder(path))
    except Exception as error:  # whatever it is: the other sections go on
        return f"failed: {type(error).__name__}: {error}"[:500]
    return "ok"


def run_child(name: str, argv: Sequence[str], path: Path, seconds: float) -> str:
    """Run it in a process of its own, which is ended behind so many seconds; "ok" or what failed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if name == "torch":  # both frameworks in one process: neither may take all of the memory
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    command = [sys.executable, "-m", "benchmarks.gpu", *argv, f"--section={name}", f"--part={path}"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"failed: not done in {seconds:.0f} s"
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        return f"failed: status {done.returncode}: {lines[-1]}"[:500]
    return "ok"


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """All sections; the result is written behind each of them."""
    scale, start = MINIATURE if args.miniature else FULL, time.monotonic()
    result: dict[str, Any] = {"benchmark": "gpu", "date": common.today(), "miniature": args.miniature}
    result |= {"command": " ".join(["python -m benchmarks.gpu", *args.argv]), "sections": {}}
    child_argv = ["--miniature"] if args.miniature else []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only or SECTIONS:
            path, begun = Path(scratch) / f"{name}.json", time.monotonic()
            left = min(SECTIONS[name][1], args.seconds - (begun - start))
            if left <= 0:
                status = "failed: no time left"
            elif args.in_process:
                status = run_section(name, scale, path)
            else:
                status = run_child(name, child_argv, path, left)
            found = json.loads(path.read_text()) if path.is_file() else {}
            found = {"status": status, "seconds": round(time.monotonic() - begun, 1)} | found
            result["sections"][name] = found
            print(f"{name}: {status}, {found['seconds']} s", flush=True)
            result["path"] = str(common.write(result, "gpu-miniature" if args.miniature else "gpu", args.results))
    return result


def complaints(result: dict[str, Any]) -> list[str]:
    """Sections that failed, and numbers outside their tolerances."""
    sections = result["sections"]
    found = [f"{name}: {section['status']}" for name, section in sections.items() if section["status"] != "ok"]
    for name, judged in sections.get("numerics", {}).items():
        if isinstance(judged, dict) and not judged["within"]:
            found.append(f"numerics, {name}: errors {judged['errors']}, tolerances {judged['tolerances']}")
    return found


def report(result: dict[str, Any]) -> str:
    """Ratios, goals and the longest operations in words."""
    lines = []
    for name, section in result["sections"].items():
        if table := section.get("table"):
            lines += ["", f"{name}, {section['resolution']} px, {section['batch']} images", "", table]
        if kernels := section.get("kernels"):
            lines += ["", f"where the step's time goes: {kernels.get('parts')}", f"by kind: {kernels['kinds']}"]
            lines += [f"  {each['share']:6.1%}  {each['calls']:5d} x {each['name']}" for each in kernels["top"]]
        if (goals := section.get("goals")) and not result["miniature"]:  # they are stated for the full size
            lines += ["", common.goals_text(goals)]
        if "ours_over_torch" in section:
            lines += ["", f"time over PyTorch's: {section['ours_over_torch']}"]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--miniature", action="store_true", help="tiny sizes, on any machine")
    flags.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections")
    flags.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time limit of all sections together")
    flags.add_argument("--in-process", action="store_true", help="run the sections here: no time limits")
    flags.add_argument("--results", type=Path, default=common.RESULTS, help="folder for the result")
    flags.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    flags.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    args = flags.parse_args(argv)
    args.argv = list(argv)
    if not args.miniature and not xla_flags.wants_gpu():
        raise InputError("no GPU that jax can use is here: --miniature runs the same program on a CPU")
    if (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # numerics are compared with it
    xla_flags.set_for_gpu()
    if args.section:
        SECTIONS[args.section][0](MINIATURE if args.miniature else FULL, recorder(args.part))
        return 0
    result = run_all(args)
    if args.in_process:
        result["machine"] = common.machine()
    else:  # this process leaves the GPU to the sections: another one looks at it
        code = "import json; from benchmarks import common; print(json.dumps(common.machine()))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        result["machine"] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else "unknown"
    path = common.write(result, "gpu-miniature" if args.miniature else "gpu", args.results)
    print(report(result))
    print(f"written to {path}")
    wrong = complaints(result)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
