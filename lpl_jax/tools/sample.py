"""Draw images with a trained run: prompts or classes in, PNG files and a grid out.

    lpl sample --workdir runs/cc12m --prompt "a kitten with its paws up" --prompt "a stone wall"
    lpl sample --workdir runs/cc12m --prompts prompts.txt --guidance 2 --out samples
    lpl sample --workdir runs/imagenet --label 207 --label 88 --count 8 --weights 0.9999

    OUT/0003_a-stone-wall.png    number and prompt (or class), one image each
    OUT/grid.png                 all of them under their prompts, a row each
    OUT/samples.json             everything that they depend on; each PNG holds its own part of it as text

The same call gives the same images: image n of a call depends on the run's weights, the seed, n, its prompt and the
sampling options, not on how many there are or on the batch (up to rounding). What is left out is as the run has it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lpl_jax import parallel
from lpl_jax.errors import InputError
from lpl_jax.evaluation.figures import captioned_rows
from lpl_jax.evaluation.prompts import read_prompts
from lpl_jax.io.atomic import atomic_open, write_json
from lpl_jax.io.locks import only_writers
from lpl_jax.io.paths import AnyPath
from lpl_jax.io.pictures import write_picture
from lpl_jax.io.tensors import read_json
from lpl_jax.runs import Run, checkpoints, open_run
from lpl_jax.tools import cli, flags

SLUG = 40  # characters of a prompt in a file name


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    run = open_run(args.workdir)
    given = {name: getattr(args, name) for name in ("guidance", "steps", "sampler", "spacing")}
    sampling = run.sampling(**{name: value for name, value in given.items() if value is not None})
    shown, titles = _shown(run, args)
    options: dict[str, Any] = dict(step=run.step(args.checkpoint), weights=run.weights(args.weights), seed=args.seed)
    mesh = parallel.make_mesh(parallel.MeshConfig())  # all devices there are, each with a part of every batch
    chosen: dict[str, Any] = {name: getattr(sampling, name) for name in given} | {
        "sampler": sampling.sampler or run.experiment.paradigm.samplers[0]
    }
    out, titles = args.out or run.workdir / "samples", [title for title in titles for _ in range(args.count)]
    provenance = {"run": str(run.workdir), "checkpoint": options["step"], "weights": options["weights"]}
    provenance |= chosen | {"seed": args.seed}
    provenance["fingerprint"] = checkpoints.fingerprint(run.checkpoints, options["step"])
    with only_writers(out):
        check_same(out, {**provenance, "shows": titles})
        print(f"drawing {len(titles)} images of step {options['step']}, weights {options['weights']}", flush=True)
        sample = run.sampler(batch_size=args.batch_size, mesh=mesh, **options, **chosen)
        images = sample([each for each in shown for _ in range(args.count)])
        if jax.process_index() == 0:
            write(out, images, titles, provenance, args.count)
            print(f"written to {out}; {out / 'grid.png'} has all of them")
    return 0


def check_same(out: AnyPath, about: dict[str, Any]) -> None:
    """Raises InputError where the folder holds other samples, which these would be mixed with."""

    def what(about: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in about.items() if name != "run"}  # the same run may have been moved

    path = out / "samples.json"
    if path.is_file() and what(read_json(path)) != json.loads(json.dumps(what(about))):
        raise InputError(f"{out} holds other samples: give another --out")


def write(out: AnyPath, images: np.ndarray, titles: Sequence[str], provenance: dict[str, Any], per_row: int) -> None:
    """PNG files of uint8 images (N, H, W, 3) with metadata, a grid with `per_row` images of each title, and a JSON."""
    # First, so that what a killed call has left is known to be of it.
    write_json(out / "samples.json", {**provenance, "shows": list(titles)}, ensure_ascii=False)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        about = PngInfo()
        about.add_itxt("Description", title)
        about.add_itxt("lpl_jax", json.dumps({"number": number, "shows": title, **provenance}, ensure_ascii=False))
        with atomic_open(out / f"{number:04d}_{slug(title)}.png") as file:
            Image.fromarray(image).save(file, "PNG", pnginfo=about)
    write_picture(out / "grid.png", captioned_rows(images, titles[::per_row], per_row))


def slug(title: str) -> str:
    """A prompt as part of a file name: letters, numbers and hyphens; "image" where it has none."""
    words = "-".join(re.findall(r"\w+", title.lower()))
    return words[:SLUG].strip("-_") or "image"


def _shown(run: Run, args) -> tuple[list, list[str]]:
    """Labels or prompts of the command line, checked against what the run was trained on, and their titles."""
    if run.experiment.text is None:
        possible = f"give --label N, 0 to {run.experiment.model.num_classes - 1}"
        if args.prompt or args.prompts:
            raise InputError(f"{args.workdir} is a run on classes: {possible}")
        if not args.label:
            raise InputError(f"nothing to draw: {possible}")
        return args.label, [f"class {label}" for label in args.label]
    if args.label:
        raise InputError(f"{args.workdir} is a run on text: give --prompt TEXT, or --prompts FILE")
    prompts = [*(args.prompt or ()), *(read_prompts(args.prompts, args.limit).lines if args.prompts else ())]
    if not prompts:
        raise InputError("nothing to draw: give --prompt TEXT, or --prompts FILE")
    return prompts, prompts


def parser() -> cli.Parser:
    """The flags of `lpl sample`."""
    result = cli.Parser(__doc__, prog="lpl sample")
    add = result.add_argument
    flags.add(result, "workdir", required=True)
    add("--prompt", action="append", metavar="TEXT", help="text of a run on captions; may be given several times")
    add("--prompts", type=flags.path, metavar="PATH", help="text file of prompts, one a line, or a store with captions")
    flags.add(result, "limit")
    add("--label", action="append", type=cli.not_negative, metavar="N", help="class; may be given several times")
    flags.add(result, "count", default=4)
    flags.add(result, "out", note="WORKDIR/samples")
    flags.add(result, "seed", default=0)
    flags.add(result, "guidance", note="the run's")
    flags.add(result, "steps", note="the run's")
    text = "ddim, euler or rk4, as the paradigm allows (default: the run's)"
    add("--sampler", type=cli.text, metavar="NAME", help=text)
    text = "timesteps of ddim: trailing or leading (default: the run's)"
    add("--spacing", type=cli.text, metavar="NAME", help=text)
    flags.add(result, "weights", note="the first average")
    flags.add(result, "checkpoint", note="the newest")
    flags.add(result, "batch-size", default=16)
    return result
