"""Fuzzes a reader for some time: bytes that nobody has written, one after the other.

    python benchmarks/fuzz.py --target json --seconds 60
    python benchmarks/fuzz.py --target all --seconds 60        one after the other, so long each

Targets are those of tests/support/fuzz_targets.py; CI runs them for a moment (tests/test_damage.py). With atheris
(pip install -r requirements/fuzz.txt; Linux, Python 3.11 to 3.13) the fuzzer sees which branches are taken and looks
for new ones; without it, valid files are changed at random. Prints a line of figures; the input of a fault is written
to fuzz-TARGET-HASH, and the status is 1.
"""

import argparse
import hashlib
import importlib
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-atheris", action="store_true")
    args = parser.parse_args()
    if args.target == "all":
        names = list(importlib.import_module("fuzz_targets").TARGETS)
        rest = sys.argv[1:]
        commands = [[sys.executable, __file__, *rest, f"--target={name}"] for name in names]
        return max([subprocess.run(command).returncode for command in commands])
    start = time.perf_counter()
    count, fault = (_at_random if args.without_atheris or not _has_atheris() else _guided)(args)
    seconds = time.perf_counter() - start
    print(f"{args.target}: {count:,} executions in {seconds:.0f} s, {'a fault' if fault else 'no fault'}", flush=True)
    return int(fault)


def _has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def _at_random(args) -> tuple[int, bool]:
    """Valid files with a few changes each."""
    target = importlib.import_module("fuzz_targets").TARGETS[args.target]
    rng, seeds, count = random.Random(args.seed), target.seeds(), 0
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        data = changed(rng.choice(seeds), seeds, rng)
        count += 1
        try:
            target.run(data)
        except BaseException as error:
            _keep(args.target, data, error)
            return count, True
    return count, False


def changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Bytes with one to four changes: flipped, removed, repeated, cut short, taken from another file."""
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        new = rng.choice(
            (
                b"",
                rng.randbytes(length),
                b"\xff" * length,
                b"\0" * length,
                data[place : place + length] * 2,
                other[start : start + length],
                bytes(byte ^ (1 << rng.randrange(8)) for byte in data[place : place + 1]),
                rng.choice((b"-1", b"1e999", b"9" * 30, b"null", b"[", b"{", b'"', b"../", b"0", b"true")),
            )
        )
        data = data[:place] if rng.random() < 0.05 else data[:place] + new + data[place + length * (len(new) > 0) :]
    return data


def _guided(args) -> tuple[int, bool]:
    """By atheris in a process of its own, as libFuzzer ends the process."""
    with tempfile.TemporaryDirectory() as corpus:
        code = f"import sys; sys.argv[0] = {__file__!r}; sys.path[:0] = {sys.path[:2] + sys.path[2:]!r}\n"
        code += (
            f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import fuzz; fuzz.guided({args.target!r}, {corpus!r})"
        )
        flags = [f"-max_total_time={max(1, int(args.seconds))}", f"-seed={args.seed + 1}", "-rss_limit_mb=8192"]
        flags += ["-timeout=60", "-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={corpus}/found-"]
        done = subprocess.run([sys.executable, "-c", code, *flags, corpus], capture_output=True, text=True)
        text = done.stdout + done.stderr
        counts = [int(line.split()[-1]) for line in text.splitlines() if "number_of_executed_units" in line]
        if done.returncode:
            print(text[-6000:], file=sys.stderr)
        for path in Path(corpus).glob("found-*"):
            _keep(args.target, path.read_bytes(), None)
    return sum(counts), done.returncode != 0


def guided(name: str, corpus: str) -> None:
    """What the process of `_guided` does."""
    import atheris

    with atheris.instrument_imports(include=["lpl_jax", "json"]):
        target = importlib.import_module("fuzz_targets").TARGETS[name]
        from lpl_jax.io.atomic import write_bytes
    for number, seed in enumerate(target.seeds()):
        write_bytes(Path(corpus) / f"seed-{number}", seed)
    longest = max(map(len, target.seeds()))
    atheris.Setup([*sys.argv, f"-max_len={2 * longest + 4096}"], target.run)
    atheris.Fuzz()


def _keep(name: str, data: bytes, error: BaseException | None) -> None:
    from lpl_jax.io.atomic import write_bytes

    path = Path(f"fuzz-{name}-{hashlib.sha256(data).hexdigest()[:12]}")
    write_bytes(path, data)
    if error is not None:
        traceback.print_exception(error)
    print(f"{name}: the input is in {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
