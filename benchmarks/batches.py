"""Latents/s of `lpl_jax.data.batches` beside what a training step on a TPU v5e-16 consumes.

    python benchmarks/batches.py            256 and 512 px latents of a Stable Diffusion autoencoder, some minutes
    python benchmarks/batches.py --quick    few records

The stores are made of random numbers: shapes, types and files are those of a real one, and lie in the page cache.
Every reading is a process of its own; "workers" are Grain's, 0 reads in threads of the training process. "alone" are
the parts of it, for the same places, in one thread. The consumption is that of paper796 with the diffusion loss alone
(LPL makes steps slower), at 50 % of the peak of 16 chips with 197 TFLOP/s each, over 4 hosts: an estimate, not a
measurement. The result is printed and written to benchmarks/results/YYYY-MM-DD-batches.json.
"""

import datetime
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # of this file's folder, where it would hide packages of its files' names

import numpy as np  # noqa: E402
from array_record.python.array_record_module import ArrayRecordWriter  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lpl_jax.data import LatentStore, Manifest, TextInfo, batches  # noqa: E402
from lpl_jax.data.manifest import Shard  # noqa: E402
from lpl_jax.io.atomic import write_json, write_text  # noqa: E402
from lpl_jax.tools.cli import Parser, run_main  # noqa: E402

BATCH = 64  # of one host: a quarter of 256
RECORDS = {256: 8192, 512: 2048}
CHIPS, HOSTS, PEAK, UTILISATION = 16, 4, 197e12, 0.5
CASES = [(side, text, workers) for side in RECORDS for text in (False, True) for workers in (0, 1, 2)]


def make_store(folder: Path, resolution: int, records: int, shards: int = 4) -> None:
    """A store of random numbers with two caption columns of 77 tokens."""
    text = TextInfo("random", "0", 77, 49408, 49407, ("txt", "recaption"))
    manifest = Manifest("random", "0", 0.18215, 0.0, 4, 8, resolution, "none", "float16", ("all",), "random", "0")
    manifest = Manifest(**{**vars(manifest), "text": text})
    folder.mkdir()
    rng = np.random.default_rng(0)
    fixed = np.zeros(1, manifest.record_dtype)
    fixed["moments"] = rng.standard_normal(fixed["moments"].shape)
    found = []
    for number in range(shards):
        name = f"latents-{number:05d}-of-{shards:05d}.array_record"
        writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        for index in range(records // shards):
            fixed["tokens"] = rng.integers(49406, size=fixed["tokens"].shape)
            caption = "a caption of the usual length that is here in the place of a real one"
            writer.write(fixed.tobytes() + f"{number}/{index}\0{caption}\0{caption * 3}".encode())
        writer.close()
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        found.append(Shard(name, records // shards, (folder / name).stat().st_size, digest))
    write_text(folder / "manifest.json", Manifest(**{**vars(manifest), "shards": tuple(found)}).to_json())


def measure(folder: Path, text: bool, workers: int, seconds: float) -> dict:
    """Latents/s of the pipeline in this process, and the growth of its peak memory while it reads."""
    store = LatentStore(folder)
    options = dict(text=True, second_caption=0.5) if text else {}
    stream = batches(store, batch_size=BATCH, seed=0, worker_processes=workers, **options)
    for _ in range(10):
        next(stream)
    memory, start, count = _peak_mib(), time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        next(stream)
        count += BATCH
    return dict(latents_per_second=count / (time.perf_counter() - start), extra_mib=_peak_mib() - memory)


def alone(folder: Path, rounds: int = 30) -> dict:
    """Latents/s of parts of the pipeline in one thread: the order and the draws, reading bytes, reading a batch."""
    from lpl_jax.data import batches as module_function

    data = sys.modules[module_function.__module__]
    store = LatentStore(folder)
    places = data._places(len(store), 0, data.functools.partial(data._draw, True, 0.0))
    runs = [[places[i] for i in range(n * BATCH, (n + 1) * BATCH)] for n in range(rounds)]

    def rate(function) -> float:
        times = []
        for n, run in enumerate(runs):
            start = time.perf_counter()
            function(n, run)
            times.append(time.perf_counter() - start)
        return BATCH / statistics.median(times)

    return dict(
        order_and_draws=rate(lambda n, run: [places[i] for i in range(n * BATCH, (n + 1) * BATCH)]),
        bytes=rate(lambda n, run: store.read([place.index for place in run])),
        batch=rate(lambda n, run: data._read(store, (), False, run)),
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def consumption(resolution: int) -> dict:
    """Images/s of a step on 16 chips, all hosts and one."""
    from lpl_jax.autoencoders import AutoencoderConfig
    from lpl_jax.cost.flops import USUAL, step_flops
    from lpl_jax.denoisers import preset

    flops = step_flops(USUAL, preset("paper796"), AutoencoderConfig(), resolution).base
    images = CHIPS * PEAK * UTILISATION / flops
    return dict(gflop_per_image=flops / 1e9, images_per_second=images, images_per_second_and_host=images / HOSTS)


def compare(scale: float, seconds: float, repeats: int) -> dict:
    results, load = {}, [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as root:
        for side, records in RECORDS.items():
            make_store(Path(root) / str(side), side, int(records * scale))
        for side, text, workers in tqdm(CASES, desc="batches", disable=None):
            given = ["--measure", str(Path(root) / str(side)), "--workers", str(workers), "--seconds", str(seconds)]
            runs = [_child(given + ["--text"] * text) for _ in range(repeats)]
            name = f"{side} px, {'text' if text else 'no text'}, {workers} workers"
            results[name] = dict(
                latents_per_second=round(statistics.median(run["latents_per_second"] for run in runs)),
                extra_mib=round(max(run["extra_mib"] for run in runs)),
            )
        parts = {f"{side} px": _child(["--alone", str(Path(root) / str(side))]) for side in RECORDS}
    load.append(os.getloadavg()[0])
    needed = {f"{side} px": {k: round(v, 1) for k, v in consumption(side).items()} for side in RECORDS}
    return dict(
        date=datetime.date.today().isoformat(),
        batch=BATCH,
        latents_per_second=results,
        alone={side: {part: round(rate) for part, rate in found.items()} for side, found in parts.items()},
        v5e_16_at_50_percent=needed,
        times_what_a_host_needs={
            name: round(found["latents_per_second"] / needed[name.split(",")[0]]["images_per_second_and_host"], 1)
            for name, found in results.items()
        },
        load_average=[round(value, 2) for value in load],
        machine=dict(
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            architecture=platform.machine(),
            python=platform.python_version(),
            numpy=np.__version__,
        ),
    )


def _child(arguments: list[str]) -> dict:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--quick", action="store_true", help="an eighth of the records, short readings")
    flags.add_argument("--repeats", type=int, default=3, help="readings of each case")
    flags.add_argument("--seconds", type=float, default=3.0, help="length of a reading")
    flags.add_argument("--results", type=Path, default=HERE / "results", help="folder for the result")
    flags.add_argument("--name", default="batches", help="of the result file, behind the date")
    flags.add_argument("--measure", type=Path, help="read this store in this process and print what was found")
    flags.add_argument("--alone", type=Path, help="measure the parts with this store")
    flags.add_argument("--text", action="store_true", help="with --measure: captions too")
    flags.add_argument("--workers", type=int, default=0, help="with --measure: worker processes")
    args = flags.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.text, args.workers, args.seconds)))
        return 0
    if args.alone:
        print(json.dumps(alone(args.alone)))
        return 0
    quick = dict(scale=1 / 8, seconds=0.5, repeats=1)
    result = compare(**quick) if args.quick else compare(1.0, args.seconds, args.repeats)
    print(json.dumps(result, indent=2))
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / f"{result['date']}-{args.name}.json", result, indent=2)
    return 0


if __name__ == "__main__":
    run_main(main)
