"""What the perceptual loss costs a training step: time, memory and operations with it over without it.

    python -m benchmarks.lpl                                   a small model and a narrow SD decoder, 64 px: any CPU
    python -m benchmarks.lpl --size paper796                   the paper's model at 512 px: one large GPU
    python -m benchmarks.lpl --size paper796 --resolution 256 --batch 64
    python -m benchmarks.lpl --size tiny --repeats 1

Steps without the loss, at each decoded share q of --shares (q = decoded images / batch) and in the economical setting
run in turns on the same random latents; the ratio is the median over turns. Beside it stand the ratio of the analytic
operations (docs/flops.md: model FLOPs, latents cached) and of the memory that XLA plans. The loss alone, forward and
backward, is timed with and without its outlier mask. The result is printed and written to benchmarks/results.
"""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common
from lpl_jax import xla_flags
from lpl_jax.errors import InputError
from lpl_jax.tools.cli import Parser, run_main

PAPER_SHARE = 0.307  # that the paper's Table 8 implies (docs/flops.md)
BASE = "without LPL"
MASK_GOAL, MEMORY_GOAL, FLOP_GOAL, ECONOMICAL_GOAL, PAPER_GOAL = 0.10, 1.15, 1.10, 1.20, 1.73


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the autoencoder whose latents it learns, with the defaults of a measurement.

    model: fields of the config's section. autoencoder: fields that differ from Stable Diffusion's.
    """

    model: dict[str, Any]
    autoencoder: dict[str, Any]
    resolution: int
    batch: int


_NARROW = dict(encoder_channels=(32, 64, 128, 128), decoder_channels=(32, 64, 128, 128))
_TINY = dict(encoder_channels=(8, 8, 16, 16), decoder_channels=(8, 8, 16, 16), decoder_resnets=2, norm_groups=4)
SIZES = {
    "tiny": Size(dict(preset="tiny", hidden=16, depth=2, heads=2, num_classes=2), _TINY, 32, 4),
    "small": Size(dict(preset="small", num_classes=8), _NARROW, 64, 16),
    "paper796": Size(dict(preset="paper796", num_classes=1000), {}, 512, 16),
}


def autoencoder_config(size: Size):
    """Its compute type is bfloat16 on accelerators, float32 on CPUs, as the denoiser's is."""
    import jax

    from lpl_jax.autoencoders import AutoencoderConfig

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return AutoencoderConfig(name="SD architecture, random weights", dtype=dtype, **size.autoencoder)


def experiment(size: Size, resolution: int, batch: int, capacity: int | str | None, **fields: Any):
    """A resolved experiment with so many decoded images ("economical": that setting; None: without LPL).

    fields: of the config, as section__field.
    """
    from lpl_jax.configs import base
    from lpl_jax.experiment import build, resolve

    c = base.get_config()
    c.resolution, c.train.batch_size = resolution, batch
    c.model.update(size.model)
    c.model.base_grid = max(resolution // 16, 1)
    c.paradigm.schedule_rescale = resolution / 256
    c.mesh.data = 1
    if capacity is not None:
        c.lpl.preset, c.lpl.weight, c.loss.lpl_capacity = "paper", 1.0, str(capacity)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        c[section][field] = value
    return resolve(build(c), autoencoder_config(size))


def experiments(size: Size, resolution: int, batch: int, shares: Sequence[float], **fields: Any) -> dict[str, Any]:
    """Experiments by name: without LPL, at the shares (rounded to whole images), economical."""
    found = {BASE: experiment(size, resolution, batch, None, **fields)}
    for count in sorted({min(batch, max(1, round(share * batch))) for share in shares}):
        found[f"q = {count}/{batch}"] = experiment(size, resolution, batch, count, **fields)
    return found | {"economical": experiment(size, resolution, batch, "economical", **fields)}


def one_device():
    """The mesh of the first device."""
    import jax

    from lpl_jax import parallel

    return parallel.make_mesh(parallel.MeshConfig(data=1), jax.devices()[:1])


def compile_steps(given: dict[str, Any], autoencoder, mesh, threads: int | None = None) -> dict[str, tuple[Any, dict]]:
    """Compiled steps and what the compiler says of each; `threads` at a time."""
    import jax

    from lpl_jax.cost import step_cost

    def one(each):
        with jax.set_mesh(mesh):
            return step_cost.compile_step(each, autoencoder, mesh)

    with ThreadPoolExecutor(threads or max(1, (os.cpu_count() or 1) // 4)) as pool:
        return dict(zip(given, pool.map(one, given.values()), strict=True))


def steps(given: dict[str, Any], size: Size, repeats: int, keep: str | None = None) -> tuple[dict[str, dict], Any]:
    """Rows by name: time, memory, operations, MFU, and their ratios to the step without the loss.

    keep: name of an experiment whose (function that runs a step, compiled step) come back too, to be traced.
    """
    import jax

    from lpl_jax.cost import step_cost

    autoencoder, mesh = common.random_autoencoder(autoencoder_config(size)), one_device()
    compiled = compile_steps(given, autoencoder, mesh)
    with jax.set_mesh(mesh):
        runs = {name: step_cost.runner(each, autoencoder, mesh, compiled[name][0]) for name, each in given.items()}
        seconds = common.interleaved(runs, repeats, warm_up=2)
    rows = {}
    for name, each in given.items():
        report, plan = step_cost.analyse(each, autoencoder), compiled[name][1]
        usual, batch = report["analytic"]["usual"], each.train.batch_size
        timed = common.spread(seconds[name])
        rows[name] = timed | {
            "decoded_images": report["decoding"]["images"],
            "decoded_share": report["decoding"]["share"],
            "images_per_second": round(batch / timed["median_seconds"], 4),
            "flop_ratio": usual["ratio"],
            "tflop": usual["total"] * batch / 1e12,
            "memory_plan": plan["memory"],
            "compile_seconds": round(plan["compile_seconds"], 1),
            "use": step_cost.utilisation(timed["median_seconds"], usual["total"] * batch, mesh),
        }
        if name != BASE:
            ratio = common.paired_ratio(seconds[name], seconds[BASE])
            peaks = [compiled[key][1]["memory"].get("peak") for key in (name, BASE)]
            rows[name] |= {
                "time_ratio": round(ratio, 4),
                "time_ratio_over_flop_ratio": round(ratio / usual["ratio"], 4),
                "memory_ratio": round(peaks[0] / peaks[1], 4) if all(peaks) else None,
            }
    return rows, None if keep is None else (runs[keep], compiled[keep][0])


def loss_alone(size: Size, resolution: int, images: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of the loss of so many images, with and without its mask, and the mask's share."""
    import jax
    import jax.numpy as jnp

    from lpl_jax.losses import LPLConfig, gated_perceptual_loss

    autoencoder = common.random_autoencoder(autoencoder_config(size))
    given = jax.device_put((autoencoder, *common.latents(autoencoder.config, resolution, images)))

    def run(config):
        @jax.jit
        def value_and_gradient(autoencoder, predicted, clean):
            ones = jnp.ones(images)

            def loss(predicted):
                given = dict(z0_hat=predicted, z0=clean, alpha=ones, sigma=0 * ones, key=jax.random.key(0))
                return gated_perceptual_loss(autoencoder, config, **given, resolution=resolution)[0]

            return jax.value_and_grad(loss)(predicted)

        return common.blocking(value_and_gradient, *given)

    configs = {"with mask": LPLConfig.paper(), "without mask": LPLConfig.paper(mask_layers="none")}
    seconds = common.interleaved({name: run(config) for name, config in configs.items()}, repeats)
    share = 1 - common.paired_ratio(seconds["without mask"], seconds["with mask"])
    return {
        "images": images,
        "resolution": resolution,
        "runs": {name: common.spread(each) for name, each in seconds.items()},
        "mask_share": round(share, 4),
    }


def goals(rows: dict[str, dict[str, Any]], loss: dict[str, Any] | None, size: str, resolution: int) -> list[dict]:
    """The goals that these rows can tell of; those on the absolute ratio are stated for paper796 at 512 px alone."""
    found, full = [], size == "paper796"
    for name, row in rows.items():
        if name == BASE:
            continue
        found.append(common.goal(f"{name}: time ratio / FLOP ratio", row["time_ratio_over_flop_ratio"], FLOP_GOAL))
        found.append(common.goal(f"{name}: planned memory ratio", row["memory_ratio"], MEMORY_GOAL))
        if full and name == "economical":
            found.append(common.goal(f"{name}: time ratio", row["time_ratio"], ECONOMICAL_GOAL))
        if full and resolution == 512 and 0.29 < row["decoded_share"] < 0.32:
            found.append(common.goal(f"{name} (the paper's share): time ratio", row["time_ratio"], PAPER_GOAL))
    if loss is not None:
        found.append(common.goal("outlier mask: share of the loss's time", loss["mask_share"], MASK_GOAL))
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| step | seconds | time ratio | FLOP ratio | memory plan, GiB | ratio |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        peak = row["memory_plan"].get("peak")
        cells = [
            name,
            f"{row['median_seconds']:.4g}",
            f"{row.get('time_ratio', 1):.3f}",
            f"{row['flop_ratio']:.3f}",
            "-" if peak is None else f"{peak / 2**30:.3f}",
            f"{row.get('memory_ratio') or 1:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--size", choices=SIZES, default="small", help="model and autoencoder")
    flags.add_argument("--resolution", type=int, help="image side, pixels, instead of the size's")
    flags.add_argument("--batch", type=int, help="images of a step, instead of the size's")
    flags.add_argument("--shares", type=float, nargs="+", default=(0.125, PAPER_SHARE, 0.5), help="decoded shares q")
    flags.add_argument("--remat", choices=("none", "full", "dots"), default="none", help="of the denoiser's blocks")
    flags.add_argument("--images", type=int, default=1, help="images of the loss alone; 0: do not time it")
    flags.add_argument("--repeats", type=int, default=5, help="timed turns")
    flags.add_argument("--results", type=Path, default=common.RESULTS, help="folder for the result")
    args = flags.parse_args(argv)
    if args.repeats < 1 or not all(0 < share <= 1 for share in args.shares):
        raise InputError("--repeats is 1 or more, --shares are above 0 and at most 1")
    xla_flags.set_for_gpu()
    size = SIZES[args.size]
    resolution, batch = args.resolution or size.resolution, args.batch or size.batch
    rows, _ = steps(experiments(size, resolution, batch, args.shares, model__remat=args.remat), size, args.repeats)
    loss = loss_alone(size, resolution, args.images, args.repeats) if args.images else None
    result = {
        "benchmark": "lpl",
        "date": common.today(),
        "command": " ".join(["python -m benchmarks.lpl", *argv]),
        "size": dict(name=args.size, resolution=resolution, batch=batch, remat=args.remat, latents="cached"),
        "steps": rows,
        "loss_alone": loss,
        "goals": goals(rows, loss, args.size, resolution),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": common.machine(),
    }
    path = common.write(result, f"lpl-{args.size}-{resolution}px-{result['machine']['backend']}", args.results)
    print(table(rows))
    print(common.goals_text(result["goals"]))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    run_main(main)
