"""Write the weights of a run out of its checkpoint, for others to read. docs/weights.md describes the layouts.

    lpl export --workdir RUN --out FOLDER                      for diffusers, where it has the class
    lpl export --workdir RUN --out FOLDER --layout lpl_jax     any model
    lpl export --workdir RUN --out FILE.safetensors            any model, in one file

Nothing is overwritten, and nothing appears under its name before all of it is written. `lpl import` is the other way.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

import lpl_jax
from lpl_jax import denoisers
from lpl_jax.denoisers.weights import WEIGHTS, check_target
from lpl_jax.runs import open_run
from lpl_jax.tools import cli, flags


def export(workdir: Path, path: Path, *, step: int | None, weights: str | None, layout: str | None) -> str:
    """Writes the model of a run to a folder or file (see `denoisers.save`), and returns a line that says what it is.

    step, weights: of the checkpoint, see `Run.params`.
    Raises InputError: whatever cannot be read, or cannot be written in this layout; nothing has been written then.
    """
    run = open_run(workdir)
    step, weights = run.step(step), run.weights(weights)
    about = {"version": lpl_jax.__version__, "step": step, "weights": weights}
    check_target(run.experiment.model, path, layout)
    params = run.params(step=step, weights=weights)
    layout = denoisers.save(run.experiment.model, params, path, layout=layout, about=about)
    return f"{path}: {layout} layout, {_count(params)}, step {step}, weights {weights}"


def _count(params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"


def parser() -> cli.Parser:
    """The flags of `lpl export`."""
    result = cli.Parser(__doc__, prog="lpl export")
    flags.add(result, "workdir", required=True)
    flags.add(result, "out", required=True)
    flags.add(result, "checkpoint", note="the newest")
    flags.add(result, "weights", note="the first average")
    text = "of the folder; files are lpl_jax (default: diffusers for a folder)"
    result.add_argument("--layout", **cli.one_of(WEIGHTS), help=text)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    print(export(args.workdir, args.out, step=args.checkpoint, weights=args.weights, layout=args.layout))
    return 0
