"""What eval.py does: evaluations of a run's checkpoints, or of a set of images, and cards compared."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from lpl_jax import distributed
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards
from lpl_jax.evaluation.evaluate import summary
from lpl_jax.evaluation.of_images import evaluate_images, save_statistics
from lpl_jax.evaluation.of_run import Lists, evaluate_run
from lpl_jax.experiment import build, to_dict
from lpl_jax.runs import open_run
from lpl_jax.tools import config_file
from lpl_jax.tools.compare_cards import compare

LISTS = {
    "checkpoints": "steps of checkpoints, or all (the newest)",
    "weights": "params, or names of averages such as 0.9999 (the first average)",
    "guidance": "guidance scales (sampling.guidance)",
    "steps": "numbers of sampling steps (sampling.steps)",
}


def define_flags(values: flags.FlagValues) -> None:
    """eval.py's own flags."""
    text = functools.partial(flags.DEFINE_string, default=None, flag_values=values)
    text("workdir", help="folder of a run: evaluate its checkpoints")
    text("images", help="folder of images, .npz or .npy: evaluate these")
    text("out", help="folder for cards, pictures and features")
    text("features", help="inception or classifier, short for --config.evaluation.features")
    text("reference", help="short for --config.evaluation.reference")
    flags.DEFINE_integer("resolution", None, "bring --images to this size first", flag_values=values)
    text("statistics", help="write means and covariances of --images to this .npz, to be a reference later")
    for name, help_text in LISTS.items():
        flags.DEFINE_list(name, None, f"comma-separated {help_text}", flag_values=values)
    distributed.define_flags(values)


def main(argv: Sequence[str], base: ConfigDict) -> int:
    """Arguments of eval.py without the program's name -> exit status.

    base: the config where neither one nor a run is given.
    """
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    config, values = config_file.parse(argv, define_flags, _default_config(argv, base))
    distributed.initialize_from(values)
    if bool(values.workdir) == bool(values.images):
        raise InputError("give one of --workdir RUN (evaluate its checkpoints) and --images SET (evaluate these)")
    for name in ("features", "reference"):
        if getattr(values, name) is not None:
            config.evaluation[name] = getattr(values, name)
    experiment = build(config)
    command = ["python", *cards.command_line(argv)]
    if values.images:
        if used := [name for name in LISTS if getattr(values, name)]:
            raise InputError(f"--{used[0]} is for runs; --images takes images as they are")
        if values.statistics:
            return save_statistics(values.images, experiment, Path(values.statistics))
        results = evaluate_images(values.images, experiment, values.out, command, values.resolution)
    elif values.resolution or values.statistics:
        raise InputError("--resolution and --statistics are for --images")
    else:
        given = {name: getattr(values, name) for name in LISTS}
        lists = Lists(
            None if given["checkpoints"] == ["all"] else _numbers(given, "checkpoints", int),
            given["weights"] or (),
            _numbers(given, "guidance", float),
            _numbers(given, "steps", int),
        )
        results = evaluate_run(open_run(values.workdir), experiment, lists, out=values.out, command=command)
    if jax.process_index() == 0:
        print(summary(results))
    return 0


def _default_config(argv: Sequence[str], base: ConfigDict) -> ConfigDict:
    """Without --config: that of the run in --workdir, or the base config."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "workdir" and (equals or index + 1 < len(argv)):
            return _config_of(Path(value if equals else argv[index + 1]), base)
    return base


def _config_of(workdir: Path, base: ConfigDict) -> ConfigDict:
    """A run's config over the base one, which knows the types of the fields that the run leaves out."""
    config = ConfigDict(base)
    with config.unlocked(), config.ignore_type():
        for section, value in to_dict(open_run(workdir).experiment).items():
            if not isinstance(value, dict):
                config[section] = value
                continue
            for name, field in value.items():
                if field is not None:
                    config[section][name] = field
    return config


def _numbers(lists: dict, name: str, kind: type) -> list:
    try:
        return [kind(text) for text in lists.get(name) or []]
    except ValueError:
        needed = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name}={','.join(lists[name])}: comma-separated {needed} are needed") from None
