"""Evaluate the checkpoints of a run, or a set of images, against real images.

    lpl eval --workdir runs/lpl --reference /data/imagenet/val
    lpl eval --workdir runs/lpl --checkpoint 10000,20000 --weights params,0.9999
    lpl eval --images samples/ --reference /data/imagenet/val --out results/theirs

The sections sampling, mesh and evaluation of the config count; what the images depend on besides is the run's own.
Features that were computed are not computed again. `lpl compare` sets the cards that it leaves side by side.
"""

from collections.abc import Sequence
from typing import cast

import jax
from ml_collections import ConfigDict

from lpl_jax.configs import base
from lpl_jax.errors import InputError
from lpl_jax.evaluation.evaluate import summary
from lpl_jax.evaluation.metrics import DISTANCES
from lpl_jax.evaluation.of_images import evaluate_images, save_statistics
from lpl_jax.evaluation.of_run import Lists, evaluate_run
from lpl_jax.experiment import build, to_dict
from lpl_jax.io.outputs import check_file
from lpl_jax.io.paths import PathLike
from lpl_jax.runs import open_run
from lpl_jax.tools import cli, config_file, flags

# Flags that are fields of the config.
FIELDS = (("evaluation", "features"), ("evaluation", "reference"), ("data", "max_pixels"), ("data", "max_bytes"))
LISTS = ("checkpoint", "weights", "guidance", "steps")  # flags that take several values


def parser() -> cli.Parser:
    """The flags of `lpl eval`."""
    result = cli.Parser(__doc__, prog="lpl eval")
    add = result.add_argument
    flags.add(result, "workdir")
    flags.add(result, "images")
    flags.add(result, "out", note="WORKDIR/evaluation")
    add("--reference", type=cli.text, metavar="SET",
        help="real images, or .npz statistics (runs: the images that the run learns from)")  # fmt: skip
    add("--features", **cli.one_of(DISTANCES), help="inception: FID; classifier: ours, for comparisons only")
    flags.add(result, "resolution", note="as --images are")
    add("--statistics", type=flags.path, metavar="FILE.npz",
        help="only write means and covariances of --images, as pytorch-fid and ADM have them")  # fmt: skip
    flags.add(result, "max-pixels", note="data.max_pixels")
    flags.add(result, "max-bytes", note="data.max_bytes")
    flags.add_config(result, note="that of the run, or base")
    # Every combination of these is evaluated, with a table and curves.
    lists = result.add_argument_group("of a run; with several values, each combination is evaluated")
    flags.add(lists, "checkpoint", several=True, words=("all",), note="the newest")
    flags.add(lists, "weights", several=True, words=("all",), note="sampling.weights, else the first average")
    flags.add(lists, "guidance", several=True, note="sampling.guidance")
    flags.add(lists, "steps", several=True, note="sampling.steps")
    flags.add_processes(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    if bool(args.workdir) == bool(args.images):
        raise InputError("give one of --workdir RUN (evaluate its checkpoints) and --images SET (evaluate these)")
    flags.check_out(args)
    if args.statistics:
        check_file(args.statistics, "--statistics")
    config = config_file.given(args, _config_of(args.workdir) if args.workdir else base.get_config())
    flags.join_processes(args)
    for section, name in FIELDS:
        if getattr(args, name) is not None:
            config.update_from_flattened_dict({f"{section}.{name}": getattr(args, name)})
    experiment = build(config)
    command = ["lpl", "eval", *argv]
    lists = {name: getattr(args, name) for name in LISTS}
    if args.images:
        if used := [name for name, values in lists.items() if values]:
            raise InputError(f"--{used[0]} is for runs; --images takes images as they are")
        if args.statistics:
            return save_statistics(args.images, experiment, args.statistics)
        results = evaluate_images(args.images, experiment, args.out, command, args.resolution)
    elif args.resolution or args.statistics:
        raise InputError("--resolution and --statistics are for --images")
    else:
        chosen = Lists(**{name: values for name, values in lists.items() if values})
        results = evaluate_run(open_run(args.workdir), experiment, chosen, out=args.out, command=command)
    if jax.process_index() == 0:
        print(summary(results))
    return 0


def _config_of(workdir: PathLike) -> ConfigDict:
    """A run's config over the base one, which knows the types of the fields that the run leaves out."""
    config = base.get_config()
    with config.unlocked(), config.ignore_type():
        for section, value in to_dict(open_run(workdir).experiment).items():
            if not isinstance(value, dict):
                config[section] = value
                continue
            for name, field in value.items():
                if field is not None:
                    cast(ConfigDict, config[section])[name] = field
    return config
