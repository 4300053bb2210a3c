"""Whether memory, open files, threads and the time of a step stay flat over a long run.

    python benchmarks/endurance.py                       20,000 steps, 100,000 images prepared, 50,000 evaluated
    python benchmarks/endurance.py --scale 0.01          a hundredth of each, to try it
    python benchmarks/endurance.py --parts train,eval    some of the parts

Each part is a process of `lpl` as users start it, with a tiny network, that is looked at once a second through
/proc (Linux). Its samples are cut into the start (the first tenth, in which caches fill) and five equal windows;
what counts is the median of the last window beside that of the first one. Training evaluates 40 times and saves 100
checkpoints on the way. The result is written to benchmarks/results/YYYY-MM-DD-endurance.json.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # of this file's folder, where it would hide packages of its files' names

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks import common  # noqa: E402
from lpl_jax import autoencoders  # noqa: E402
from lpl_jax.fields import above  # noqa: E402
from lpl_jax.tools.cli import Number, Parser, Several, run_main  # noqa: E402
from lpl_jax.training.logging import read_metrics  # noqa: E402

STEPS, PREPARED, EVALUATED = 20_000, 100_000, 50_000
WINDOWS = 5
# Growth from the first window to the last: memory in MiB, and shares of step time. An allocator keeps what it had at
# its fullest, so that some MiB come late without being lost.
LIMITS = {"rss_mib": 64.0, "files": 2, "threads": 2, "step_time": 1.2}
SIDE, CLASSES = 32, 4


def network(folder: Path) -> Path:
    """A tiny autoencoder in a folder."""
    config = autoencoders.AutoencoderConfig.tiny()
    autoencoders.save(common.random_autoencoder(config), folder / "autoencoder")
    return folder / "autoencoder"


def images(folder: Path, count: int) -> Path:
    """Small images of noise in the folders of some classes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"class{index % CLASSES}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return folder


def watch(command: list[str], environment: dict[str, str]) -> tuple[list[dict[str, float]], int, float]:
    """Runs a command and looks at it once a second: samples, status, seconds. What it says is shown if it fails."""
    samples, start = [], time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if (found := look(process.pid)) is not None:
                samples.append(found)
            time.sleep(1)
        if process.returncode:
            output.seek(0)
            print(output.read().decode()[-2000:], file=sys.stderr)
    return samples, process.returncode, time.monotonic() - start


def look(pid: int) -> dict[str, float] | None:
    """What Linux says of a process; None where it has ended."""
    folder = Path("/proc") / str(pid)
    try:
        pages = int((folder / "statm").read_text().split()[1])
        files, threads = len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))  # noqa: PTH208
    except (OSError, IndexError):
        return None
    return {"rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "files": files, "threads": threads}


def windows(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Medians of each quantity in equal windows behind the start."""
    rest = samples[max(1, len(samples) // 10) :]
    cuts = np.linspace(0, len(rest), WINDOWS + 1).astype(int)
    return {
        name: [round(statistics.median(each[name] for each in rest[a:b]), 1) for a, b in itertools.pairwise(cuts)]
        for name in rest[0]
    }


def step_times(workdir: Path) -> list[float]:
    """Milliseconds of a step in equal parts of the run, medians, from its metrics."""
    rates = [row["images_per_second"] for row in read_metrics(workdir) if row.get("images_per_second")]
    parts = np.array_split(np.asarray(rates[len(rates) // 10 :]), WINDOWS)
    return [round(1000 * 8 / float(np.median(part)), 3) for part in parts]


def report(name: str, samples, status: int, seconds: float, **more: Any) -> dict[str, Any]:
    """The result of a part, and whether it is within the limits."""
    found = windows(samples) | {key: value for key, value in more.items() if isinstance(value, list)}
    growth = {key: round(value[-1] - value[0], 1) for key, value in found.items() if key in LIMITS}
    if "step_time" in found:
        growth["step_time"] = round(found["step_time"][-1] / found["step_time"][0], 3)
    flat = {key: value <= LIMITS[key] for key, value in growth.items()}
    result = {"status": status, "seconds": round(seconds, 1), "windows": found, "growth": growth, "flat": flat}
    print(f"{name}: status {status}, {seconds:.0f} s, first to last window {growth}: {flat}", flush=True)
    return result | {key: value for key, value in more.items() if not isinstance(value, list)}


def parser() -> Parser:
    result = Parser(__doc__)
    result.add_argument("--scale", type=Number(above(0, 1)), default=1.0, help="share of the steps and images")
    result.add_argument("--parts", type=Several(str), default=["prepare", "train", "eval"], help="of the three")
    result.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    return result


def main(argv) -> int:
    args = parser().parse_args(argv)
    steps, prepared, evaluated = (max(40, int(args.scale * count)) for count in (STEPS, PREPARED, EVALUATED))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    lpl, results = [sys.executable, "-m", "lpl_jax"], {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        autoencoder = network(root)
        photos = images(root / "images", prepared)
        store, run = root / "store", root / "run"
        prepare = [*lpl, "prepare", "--source", str(photos), "--resolution", str(SIDE), "--out", str(store)]
        prepare += ["--autoencoder", str(autoencoder)]
        train = [*lpl, "train", "--config", "base", "--workdir", str(run), *settings(store, autoencoder, steps, photos)]
        evaluate = [*lpl, "eval", "--workdir", str(run), "--features", "classifier"]
        evaluate += ["--config.evaluation.num_images=" + str(evaluated), "--config.evaluation.resamples=10"]
        evaluate += ["--config.sampling.steps=1", "--config.evaluation.reference_images=" + str(min(prepared, 2000))]
        for part, command in (("prepare", prepare), ("train", train), ("eval", evaluate)):
            if part not in args.parts:  # the next ones need what it makes
                small = [f"{each}".replace(f"train.steps={steps}", "train.steps=40") for each in command]
                subprocess.run(small, check=True, env=environment, stdout=subprocess.DEVNULL)
                continue
            samples, status, seconds = watch(command, environment)
            if status:
                return 1
            more = {"step_time": step_times(run), "steps": steps} if part == "train" else {}
            more |= {"images": {"prepare": prepared, "eval": evaluated}.get(part)} if part != "train" else {}
            results[part] = report(part, samples, status, seconds, **more)
    path = common.write({"limits": LIMITS, "machine": common.machine(), "parts": results}, "endurance", args.out)
    print(path)
    return 0 if all(all(part["flat"].values()) for part in results.values()) else 1


def settings(store: Path, autoencoder: Path, steps: int, source: Path) -> list[str]:
    """A run of a tiny denoiser that evaluates and saves often, as flags."""
    sections = {
        "data": dict(store=store, source=source),
        "autoencoder": dict(source=autoencoder),
        "model": dict(hidden=16, depth=2, heads=2, num_classes=CLASSES, base_grid=2),
        "optimizer": dict(warmup_steps=2),
        "lpl": dict(preset="paper", weight=1.0, tau=3.0, tau_ref_resolution=SIDE),
        "train": dict(batch_size=8, steps=steps, log_every=10, checkpoint_every=max(1, steps // 100)),
        "evaluation": dict(every=max(1, steps // 40), every_images=16, batch_size=8),
        "sampling": dict(steps=2),
    }
    flags = [f"{section}.{field}={value}" for section, fields in sections.items() for field, value in fields.items()]
    return [f"--config.{flag}" for flag in (f"resolution={SIDE}", *flags)]


if __name__ == "__main__":
    run_main(main)
