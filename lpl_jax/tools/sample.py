"""Draw images with a trained run: prompts or classes in, PNG files and a grid out.

    lpl sample --workdir runs/cc12m --prompt "a kitten with its paws up" --prompt "a stone wall"
    lpl sample --workdir runs/cc12m --prompts prompts.txt --guidance 2 --out samples
    lpl sample --workdir runs/imagenet --label n02099601 --label 88 --count 8 --weights 0.9999
    lpl sample --workdir runs/without runs/with --label 207 --count 1 --out out/both

    OUT/0003_a-stone-wall.png    number and prompt (or class), one image each
    OUT/grid.png                 all of them under their prompts, a row each
    OUT/samples.json             everything that they depend on; each PNG holds its own part of it as text

Of several runs, from the same noise (as Fig. 1, 3 and 22 to 24 of the paper): OUT/RUN/ holds what is above of each, and
OUT/grid.png a row for each run under its name, below one another for each prompt or class.

The same call gives the same images: image n of a call depends on the run's weights, the seed, n, its prompt and the
sampling options, not on how many there are or on the batch (up to rounding). What is left out is as the run has it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lpl_jax import parallel
from lpl_jax.errors import InputError
from lpl_jax.evaluation.figures import captioned_rows
from lpl_jax.evaluation.prompts import read_prompts
from lpl_jax.io.atomic import atomic_open, write_json
from lpl_jax.io.jsons import read_json
from lpl_jax.io.locks import only_writers
from lpl_jax.io.paths import AnyPath
from lpl_jax.io.pictures import write_picture
from lpl_jax.runs import Run, checkpoints, open_run
from lpl_jax.tools import cli, flags
from lpl_jax.tools.compare_cards import short_names

MOST_PIXELS = 10**10  # of all images of a call
SLUG = 40  # characters of a prompt in a file name


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    flags.check_out(args)
    runs = [open_run(workdir) for workdir in args.workdir]
    if len(runs) == 1:
        draw(plan(runs[0], args, args.out or runs[0].workdir / "samples"), args)
        return 0
    if not args.out:
        raise InputError("pictures of several runs go to a folder of their own: give --out")
    if len(sides := {run.experiment.resolution for run in runs}) > 1:
        raise InputError(f"runs at {' and '.join(map(str, sorted(sides)))} px cannot be set side by side")
    if twice := {str(run.workdir) for run in runs if sum(run.workdir == other.workdir for other in runs) > 1}:
        raise InputError(f"--workdir {sorted(twice)[0]} is given twice: give different runs")
    names = [run.workdir.name for run in runs]
    if len(set(names)) < len(names):
        names = short_names([run.workdir for run in runs])
    # What one cannot draw is said before another is drawn.
    plans = [plan(run, args, args.out / name.replace("/", "_")) for name, run in zip(names, runs, strict=True)]
    with only_writers(args.out):  # of the picture of all; each run's folder has a lock of its own
        found = {name: draw(each, args) for name, each in zip(names, plans, strict=True)}
        if jax.process_index() == 0:
            with atomic_open(args.out / "grid.png") as file:
                side_by_side(found, args.count).save(file, "PNG")
            print(f"written to {args.out}; {args.out / 'grid.png'} has the runs side by side")
    return 0


class Drawn(NamedTuple):
    """Images of a run, uint8 (N, H, W, 3), and what each shows."""

    images: np.ndarray
    titles: list[str]


class Plan(NamedTuple):
    """What is to be drawn with a run, checked: labels or prompts, a title for each image, and what all depend on.

    options: of `Run.sampler`. provenance: for the files.
    """

    run: Run
    out: AnyPath
    shown: list
    titles: list[str]
    options: dict[str, Any]
    provenance: dict[str, Any]


def plan(run: Run, args, out: AnyPath) -> Plan:
    """What the command line asks for of one run. Raises InputError for what it cannot draw; nothing is made."""
    given = {name: getattr(args, name) for name in ("guidance", "steps", "sampler", "spacing")}
    sampling = run.sampling(**{name: value for name, value in given.items() if value is not None})
    shown, titles = _shown(run, args)
    options: dict[str, Any] = dict(step=run.step(args.checkpoint), weights=run.weights(args.weights), seed=args.seed)
    chosen: dict[str, Any] = {name: getattr(sampling, name) for name in given} | {
        "sampler": sampling.sampler or run.experiment.paradigm.samplers[0]
    }
    titles = [title for title in titles for _ in range(args.count)]
    if (pixels := len(titles) * run.experiment.resolution**2) > MOST_PIXELS:
        side = run.experiment.resolution
        raise InputError(
            f"{len(titles)} images of {side} px are {pixels:.1e} pixels, which are held until all are drawn; possible "
            f"are up to {MOST_PIXELS:.0e}: give a smaller --count or --limit"
        )
    provenance = {"run": str(run.workdir), "checkpoint": options["step"], "weights": options["weights"]}
    provenance |= chosen | {"seed": args.seed}
    provenance["fingerprint"] = checkpoints.fingerprint(run.checkpoints, options["step"])
    check_same(out, {**provenance, "shows": titles})
    return Plan(run, out, shown, titles, options | chosen, provenance)


def draw(planned: Plan, args) -> Drawn:
    """Draws what is planned and writes it."""
    run, out, shown, titles, options, provenance = planned
    mesh = parallel.make_mesh(parallel.MeshConfig())  # all devices there are, each with a part of every batch
    with only_writers(out):
        check_same(out, {**provenance, "shows": titles})
        print(f"drawing {len(titles)} images of step {options['step']}, weights {options['weights']}", flush=True)
        sample = run.sampler(batch_size=args.batch_size, mesh=mesh, **options)
        images = sample([each for each in shown for _ in range(args.count)])
        if jax.process_index() == 0:
            write(out, images, titles, provenance, args.count)
            print(f"written to {out}; {out / 'grid.png'} has all of them")
    return Drawn(images, titles)


def side_by_side(found: Mapping[str, Drawn], per_row: int) -> Image.Image:
    """For each title in turn a row of images of each run, (run -> images)."""
    rows, titles = [], []
    for start in range(0, len(next(iter(found.values())).titles), per_row):
        for name, drawn in found.items():
            rows.append(drawn.images[start : start + per_row])
            titles.append(f"{name}: {drawn.titles[start]}")
    return captioned_rows(np.concatenate(rows), titles, per_row)


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
        possible = f"give --label N, 0 to {len(run.class_names) - 1}, or the name of a class"
        if args.prompt or args.prompts:
            raise InputError(f"{run.workdir} is a run on classes: {possible}")
        if not args.label:
            raise InputError(f"nothing to draw: {possible}")
        labels = [run.label(text) for text in args.label]
        return labels, [run.class_title(label) for label in labels]
    if args.label:
        raise InputError(f"{run.workdir} is a run on text: give --prompt TEXT, or --prompts FILE")
    prompts = [*(args.prompt or ()), *(read_prompts(args.prompts, args.limit).lines if args.prompts else ())]
    if not prompts:
        raise InputError("nothing to draw: give --prompt TEXT, or --prompts FILE")
    return prompts, prompts


def prompt(given: str) -> str:
    """A prompt of the command line; an empty one is one, too."""
    return given and cli.text(given)


def parser() -> cli.Parser:
    """The flags of `lpl sample`."""
    result = cli.Parser(__doc__, prog="lpl sample")
    add = result.add_argument
    flags.add(result, "workdir", required=True, nargs="+", action="extend")
    add(
        "--prompt",
        action="append",
        type=prompt,
        metavar="TEXT",
        help="text of a run on captions; may be given several times",
    )
    add("--prompts", type=flags.path, metavar="PATH", help="text file of prompts, one a line, or a store with captions")
    flags.add(result, "limit")
    text = "class, by its number or name; may be given several times"
    add("--label", action="append", type=cli.text, metavar="CLASS", help=text)
    flags.add(result, "count", default=4)
    flags.add(result, "out", note="WORKDIR/samples; has to be given for several runs")
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
