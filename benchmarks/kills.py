"""Programs are killed at random moments and in chosen phases, called again until they are done, and compared.

    python benchmarks/kills.py --kills 100 --work /tmp/kills --out kills.json    the long form
    python benchmarks/kills.py --kills 10 --only prepare,sample                  a short one

A story is one folder in which `lpl train`, `prepare`, `sample` or `eval` is called, killed by SIGKILL or SIGTERM a few
times, and called again by the same command until it is done. What is there then is compared with an undisturbed twin,
bit for bit (`benchmarks.same_files`). After SIGTERM the status must be 130 within 20 seconds, with one line on stderr.
Stories depend on the seed alone. The results are written as they come: the same command goes on with the next story.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.same_files import differences  # noqa: E402
from lpl_jax.io.atomic import write_json  # noqa: E402

LONGEST = 20.0  # seconds from SIGTERM to the end
STUCK = 900.0  # seconds after which a program that was not killed is given up
# What is compared is exact with any flags; with these, little time goes into compiling.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
STEPS, LOG, SAVE, EVALUATE, TERM = 24, 4, 6, 8, 10  # of the run: where rows, checkpoints, evaluations, the term come

TRAIN = f"""train --config quickstart:lpl --workdir run --config.data.crops=2 --config.model.hidden=32
    --config.model.depth=2 --config.train.batch_size=8 --config.train.steps={STEPS} --config.train.log_every={LOG}
    --config.train.checkpoint_every={SAVE} --config.loss.lpl_start={TERM} --config.loss.calibration_batches=2
    --config.loss.lpl_capacity=2 --config.evaluation.every={EVALUATE} --config.evaluation.every_images=16
    --config.evaluation.batch_size=16 --config.sampling.steps=2"""
COMMANDS = {
    "train": TRAIN,
    "prepare": "prepare --source photos --crops 4 --resolution 64 --out store --shard-records 4 --batch-size 4",
    "sample": "sample --workdir {run} --label 1 --label cat --count 8 --steps 4 --out samples",
    "eval": """eval --workdir {run} --out cards --checkpoint 18,24 --features classifier --config.sampling.steps=2
        --config.evaluation.num_images=32 --config.evaluation.reference_images=16""",
}


class Moment(NamedTuple):
    """When a program is killed: so many seconds after something has come about in its folder, or after its start.

    cold: with an empty cache of compiled programs, so that it compiles.
    """

    seen: Callable[[Path, str], bool] | None
    seconds: tuple[float, float]
    cold: bool = False


def _row(folder: Path, step: int) -> bool:
    file = folder / "run/metrics.jsonl"
    return file.exists() and f'{{"step": {step},' in file.read_text()


def _any(pattern: str) -> Callable[[Path, str], bool]:
    return lambda folder, _: next(folder.glob(pattern), None) is not None


EVERYWHERE = {
    "first instant": Moment(None, (0.03, 0.3)),
    "start-up": Moment(None, (0.3, 5.0)),
    "compile": Moment(None, (4.0, 12.0), cold=True),
}
PHASES: Mapping[str, Mapping[str, Moment]] = {
    "train": {
        "compile of the step": Moment(lambda _, said: "steps " in said, (0.0, 4.0), cold=True),
        "the store": Moment(_any("run/latents/*.partial"), (0.0, 0.01)),
        "early steps": Moment(lambda _, said: "first step after" in said, (0.0, 0.3)),
        "evaluation": Moment(lambda folder, _: _row(folder, EVALUATE - LOG), (0.0, 2.5)),
        "calibration": Moment(lambda folder, _: _row(folder, TERM), (0.0, 1.5)),
        "compile of the term": Moment(lambda folder, _: _row(folder, TERM), (1.0, 8.0), cold=True),
        "late steps": Moment(lambda folder, _: _row(folder, 2 * EVALUATE), (0.0, 0.5)),
        "second evaluation": Moment(lambda folder, _: _row(folder, 2 * EVALUATE - LOG), (0.0, 2.5)),
        "last evaluation": Moment(lambda folder, _: _row(folder, STEPS - LOG), (0.0, 2.5)),
        "checkpoint write": Moment(_any("run/checkpoints/*tmp*"), (0.0, 0.05)),
        "checkpoint in the background": Moment(_any("run/checkpoints/*tmp*/params"), (0.0, 0.02)),
        "end of a checkpoint": Moment(_any("run/checkpoints/*tmp*/files.json"), (0.0, 0.005)),
        "after a checkpoint": Moment(_any("run/checkpoints/[1-9]*[0-9]/files.json"), (0.0, 0.2)),
    },
    "prepare": {
        "a shard": Moment(_any("store/*.partial"), (0.0, 0.05)),
        "after a shard": Moment(_any("store/latents-0000[1-5]*.json"), (0.0, 0.1)),
        "the manifest": Moment(_any("store/report.json"), (0.0, 0.003)),
    },
    "sample": {
        "drawing": Moment(lambda _, said: "drawing" in said, (0.0, 4.0)),
        "pictures": Moment(_any("samples/*.png"), (0.0, 0.05)),
    },
    "eval": {
        "features": Moment(_any("cards/features/*"), (0.0, 5.0)),
        "a card": Moment(_any("cards/step*/*"), (0.0, 0.3)),
    },
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where all happens, and what undisturbed programs took: seconds by name."""

    work: Path
    seconds: dict[str, float]

    def twin(self, name: str) -> Path:
        return self.work / "twins" / name

    def command(self, name: str) -> list[str]:
        return COMMANDS[name].format(run=self.twin("train") / "run").split()

    def start(self, name: str, folder: Path, log: Path, cold: Path | None = None) -> subprocess.Popen:
        """Starts a program in a folder, with its output in log.out and log.err."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "LPL_JAX_COMPILE_CACHE": str(cold or self.work / "programs"),
        }  # fmt: skip
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        folder.mkdir(parents=True, exist_ok=True)
        with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
            command = [sys.executable, "-m", "lpl_jax", *self.command(name)]
            return subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )


def prepare_twins(place: Place, names: Sequence[str], times: int) -> None:
    """Undisturbed programs, each of them twice so that the cache of programs is warm for the time that it takes."""
    needed = [name for name in COMMANDS if name in names or (name == "train" and {"sample", "eval"} & set(names))]
    for name in needed:
        mark = place.twin(name).with_suffix(".json")
        if not mark.exists() or not place.twin(name).exists():
            for _ in range(times):
                shutil.rmtree(place.twin(name), ignore_errors=True)
                began = time.monotonic()
                log = place.work / "logs" / f"twin-{name}"
                if status := finish(place.start(name, place.twin(name), log)):
                    raise SystemExit(f"undisturbed {name}: status {status}: {log.with_suffix('.err').read_text()}")
            write_json(mark, time.monotonic() - began)
            print(f"undisturbed {name}: {time.monotonic() - began:.1f} s", flush=True)
        place.seconds[name] = json.loads(mark.read_text())


def tell(place: Place, number: int, seed: int, names: Sequence[str], note: Callable[[dict], None]) -> dict[str, Any]:
    """One story; note: called with each kill. Returns what came out."""
    draw = random.Random(f"{seed}-{number}")
    # Every scenario in turn, training as often as all others together: it has most phases.
    turn = [each for name in names if name != "train" for each in ("train", name) if each in names] or list(names)
    name = turn[number % len(turn)]
    folder, cold = place.work / "stories" / f"{number:04d}", place.work / "cold" / f"{number:04d}"
    for each in (folder, cold):
        shutil.rmtree(each, ignore_errors=True)
    problems, planned = [], draw.randint(2, 5)
    moments = EVERYWHERE | PHASES[name] | {"any time": Moment(None, (0.0, place.seconds[name]))}
    for kill in range(planned):
        phase = draw.choice(list(moments))
        number_of, wait = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.uniform(*moments[phase].seconds)
        log = place.work / "logs" / f"{number:04d}-{kill}"
        process = place.start(name, folder, log, cold if moments[phase].cold else None)
        found = {"story": number, "scenario": name, "phase": phase, "signal": number_of.name}
        found |= strike(process, moments[phase].seen, wait, number_of, folder, log)
        problems += [f"kill {kill} ({phase}, {number_of.name}): {text}" for text in found["problems"]]
        note(found)
        if found["status"] == 0 and not found["killed"]:
            break
    log = place.work / "logs" / f"{number:04d}-end"
    status = finish(place.start(name, folder, log))
    said = log.with_suffix(".err").read_text()
    if status or said:
        problems.append(f"the last call: status {status}: {said[-500:]}")
    problems += differences(folder, place.twin(name))
    if not problems:
        shutil.rmtree(folder)
    return {"story": number, "scenario": name, "same": not problems, "problems": problems}


def finish(process: subprocess.Popen) -> int:
    """Its status at its end; it is killed where that does not come, or where this program is stopped."""
    try:
        return process.wait(STUCK)
    except subprocess.TimeoutExpired:
        return -9
    finally:
        process.kill()


def strike(
    process: subprocess.Popen, seen, wait: float, number: signal.Signals, folder: Path, log: Path
) -> dict[str, Any]:
    """Sends a signal at its moment, and looks how the program ends."""
    began, out = time.monotonic(), log.with_suffix(".out")
    while seen is not None and process.poll() is None and not seen(folder, out.read_text()):
        if time.monotonic() - began > STUCK:
            number = signal.SIGKILL
            break
        time.sleep(0.002)
    end = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < end:
        time.sleep(min(0.01, max(0.0, end - time.monotonic())))
    catches, sent = catches_signals(process.pid), time.monotonic()
    killed = process.poll() is None
    if killed:
        process.send_signal(number)
    problems: list[str] = []
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        problems.append("it had not ended after 60 s")
        process.kill()
        process.wait()
    seconds, said, status = time.monotonic() - sent, log.with_suffix(".err").read_text(), process.returncode
    # At its very end, when all is done, the interpreter runs no handlers any more.
    wanted = {-9} if number == signal.SIGKILL else {130, 0} if catches else {130, -15}
    if not killed:
        wanted = {0}
    if status not in wanted:
        problems.append(f"status {status}")
    if killed and number == signal.SIGTERM and seconds > LONGEST:
        problems.append(f"{seconds:.1f} s")
    if said.count("\n") != (status == 130) or (status == 130 and "; to go on: lpl " not in said):
        problems.append(f"stderr: {said[-500:]!r}")
    times = {"after": round(sent - began, 3), "seconds": round(seconds, 3)}
    return {"killed": killed, "status": status, "caught": catches} | times | {"problems": problems}


def catches_signals(pid: int) -> bool:
    """Whether a process handles SIGTERM: it cannot before its interpreter runs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of kills and stories, and the longest end after SIGTERM."""
    kills = [kill for kill in results["kills"] if kill["killed"]]
    ends = [kill["seconds"] for kill in kills if kill["signal"] == "SIGTERM" and kill["status"] == 130]
    return {
        "kills": len(kills),
        "by": dict(Counter(f"{kill['scenario']}, {kill['signal']}" for kill in kills)),
        "phases": dict(Counter(f"{kill['scenario']}: {kill['phase']}" for kill in kills)),
        "longest_seconds_to_end": max(ends, default=None),
        "before_the_handler": sum(kill["status"] == -15 for kill in kills),
        "stories": len(results["stories"]),
        "same": sum(story["same"] for story in results["stories"]),
        "problems": [text for story in results["stories"] for text in story["problems"]],
    }


def run(
    kills: int, seed: int, names: Sequence[str], out: Path, work: Path, *, jobs: int = 2, twins: int = 2
) -> dict[str, Any]:
    """Stories until there are so many kills; returns the results, which are in `out`, too.

    twins: how often each undisturbed program is run; 1 where the time that it takes says nothing.
    """
    place = Place(work.absolute(), {})
    (place.work / "logs").mkdir(parents=True, exist_ok=True)
    prepare_twins(place, names, twins)
    results: dict[str, Any] = {"seed": seed, "kills": [], "stories": []}
    if out.exists() and (before := json.loads(out.read_text()))["seed"] == seed:
        told = {story["story"] for story in before["stories"]}
        results |= {"stories": before["stories"], "kills": [kill for kill in before["kills"] if kill["story"] in told]}
    lock = threading.Lock()

    def add(to: str, entry: dict) -> None:
        with lock:
            results[to].append(entry)
            write_json(out, results | {"summary": summary(results)})

    def numbers() -> Iterator[int]:
        number = 0
        while sum(kill["killed"] for kill in results["kills"]) < kills:
            if number not in {story["story"] for story in results["stories"]}:
                yield number
            number += 1

    def story(number: int) -> None:
        found = tell(place, number, seed, names, lambda kill: add("kills", kill))
        add("stories", found)
        print(f"story {number}, {found['scenario']}: {'same' if found['same'] else found['problems']}", flush=True)

    running: set[concurrent.futures.Future] = set()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number in numbers():
            running.add(pool.submit(story, number))
            if len(running) == jobs:
                done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                for each in done:
                    each.result()
    for each in running:
        each.result()
    write_json(out, results | {"summary": summary(results)})
    return results | {"summary": summary(results)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(COMMANDS), help="scenarios, with commas between them")
    parser.add_argument("--out", type=Path, default=Path("kills.json"))
    parser.add_argument("--work", type=Path, help="folder to work in, kept; default: a temporary one")
    parser.add_argument("--jobs", type=int, default=2, help="stories at a time")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        results = run(args.kills, args.seed, args.only.split(","), args.out, args.work or Path(scratch), jobs=args.jobs)
    print(json.dumps(results["summary"], indent=1))
    return 1 if results["summary"]["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
