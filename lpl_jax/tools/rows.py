"""The rows of a file of experiments: which are chosen, what they share, and the flags and commands of each.

`lpl sweep` runs them.
"""

import dataclasses
import difflib
import fnmatch
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lpl_jax.errors import InputError, some
from lpl_jax.tools import config_file

FLAG = re.compile(r"(?:(?P<rows>[^:=]+):)?(?P<flag>--[\w.-]+=.*)", re.DOTALL)
REFERENCE = ("--config.evaluation.reference=", "--reference=")
SETTINGS = ("--config.evaluation.", "--config.sampling.")
EVALUATION_ONLY = (*SETTINGS, *REFERENCE, "--features=", "--checkpoint=", "--weights=", "--guidance=", "--steps=")
PERIODIC = "--config.evaluation.every="  # evaluations during training
COMMAND = (sys.executable, "-m", "lpl_jax")
EVERY_AVERAGE = {"weights": "all"}  # the list of a row that has none


class Shared(NamedTuple):
    """What a row shares with others.

    run: the first row that trains the same. evaluation: the first that is evaluated the same on that run. weight: the
    run whose weight of LPL it takes, None where it calibrates its own. average: the weights that it is sampled from.
    """

    run: str
    evaluation: str
    weight: str | None = None
    average: str | None = None


class Plan(NamedTuple):
    """All rows of a file: what they share, their experiments, and what is wrong with some, such as a missing field."""

    shared: dict[str, Shared]
    experiments: dict[str, Any]
    faults: dict[str, InputError]


def load(name: str) -> ModuleType:
    """A config file with `ROWS`: name -> row, with the attributes of those in the config paper."""
    module = config_file.module(name)
    if not isinstance(getattr(module, "ROWS", None), dict):
        raise InputError(f"config file {name} has no ROWS: a dict of named experiments is needed, as in paper")
    return module


def choose(rows: Mapping[str, Any], patterns: Sequence[str]) -> list[Any]:
    """The rows whose names match, and what they start from, each after the one that it needs."""
    chosen: dict[str, Any] = {}

    def add(name: str) -> None:
        if name not in chosen:
            for needed in (rows[name].init, rows[name].weight):
                if needed is not None:
                    add(needed)
            chosen[name] = rows[name]

    for pattern in patterns:
        names = [name for name in rows if fnmatch.fnmatch(name, pattern)]
        if not names:
            near = ", ".join(difflib.get_close_matches(pattern, rows, n=4, cutoff=0.5))
            raise InputError(f"no row is named {pattern!r}; {f'near to it: {near}; ' if near else ''}--list shows all")
        for name in names:
            add(name)
    return list(chosen.values())


# --- what rows share ---


def share(module: ModuleType, extra: Sequence[str] = ()) -> Plan:
    """What all rows share. Several tables have the same baseline.

    extra: the flags after `--`.

    Rows train the same where their configs differ in sampling and evaluation alone. A row that takes the weight of
    another and is like it otherwise is that one's run.
    """
    runs: dict[tuple[str, str | None], str] = {}
    evaluations: dict[str, str] = {}
    plan = Plan({}, {}, {})
    for name, row in module.ROWS.items():
        try:
            experiment, lists = resolve(module, row, extra)
        except InputError as error:
            plan.shared[name], plan.faults[name] = Shared(name, name), error
            continue
        plan.experiments[name] = experiment
        settings = dict(sampling=experiment.sampling, evaluation=experiment.evaluation)
        trained = {part: value for part, value in vars(experiment).items() if part not in settings}
        weight = experiment.train.weight_from
        if weight is not None:
            weight = plan.shared[weight].run if weight in plan.shared else weight
            trained["train"] = dataclasses.replace(experiment.train, weight_from=None)
        key = repr(trained)
        run = weight if weight and runs.get((key, None)) == weight else runs.setdefault((key, weight), name)
        first = evaluations.setdefault(repr((run, settings, lists)), name)
        average = experiment.sampling.weights or experiment.ema.first or "params"
        plan.shared[name] = Shared(run, first, None if run == weight else weight, average)
    for name, experiment in plan.experiments.items():
        if fault := _fault(module.ROWS[name], experiment, plan.experiments):
            plan.faults[name] = fault
    return plan


def _fault(row, experiment, experiments: Mapping[str, Any]) -> InputError | None:
    """What would stop a row after others were trained for it, or its evaluation after it was."""
    step, start = experiment.train.init_step, experiments.get(row.init)
    if step is not None and start is not None and step not in (kept := start.train.kept_steps()):
        return InputError(f"train.init_step={step}, but {row.init} keeps its checkpoints of steps {some(kept)}")
    try:
        experiment.evaluation.check_reference()
    except InputError as error:
        return error
    return None


def notes(rows: Sequence[Any], experiments: Mapping[str, Any]) -> list[str]:
    """What makes the numbers of rows other ones than the paper's, as the flags are."""
    printing = [row for row in rows if row.paper or row.gain]
    own = [row.name for row in printing if not row.training_set and not experiments[row.name].evaluation.reference]
    clip = [row.name for row in printing if "clip_score" in row.paper | row.gain]
    clip = [name for name in clip if not experiments[name].evaluation.clip]
    about = {
        "are compared with the images that they learn from, the paper's with validation images: give "
        "--config.evaluation.reference": own,
        "print a CLIPScore, for which --config.evaluation.clip and .prompts are missing": clip,
    }
    return [f"{len(found)} rows ({found[0]}, ...) {text}" for text, found in about.items() if found]


def resolve(module: ModuleType, row, extra: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The experiment of a row, with the flags that it is given, and its lists for `lpl eval`.

    Raises InputError for flags that are not known, and configs that cannot be.
    """
    from lpl_jax.experiment import build
    from lpl_jax.tools import evaluate, train

    config = module.get_config(row.name)
    if row.init is not None:
        config.train.init_from = row.init
    if row.weight is not None:
        config.train.weight_from = row.weight
    if given := training_flags(row, extra):
        args = train.parser().parse_args(["--config=its", "--workdir=own", *given])
        config_file.override(config, args.overrides)
    if config.lpl.weight is not None:  # of the file or of a flag
        config.train.weight_from = None
    lists = dict(row.evaluate)
    if given := evaluation_flags(row, extra):
        args = evaluate.parser().parse_args(given)
        config_file.override(config, args.overrides)
        lists = {name: getattr(args, name) for name in evaluate.LISTS if getattr(args, name)}
    return build(config), lists


def flags_of(row, extra: Sequence[str]) -> list[str]:
    """The flags after -- that a row takes: those for all, for its data set, or for names like its own."""
    found = []
    for match in filter(None, map(FLAG.fullmatch, extra)):
        everyones = match["rows"] in (None, row.dataset)
        if everyones and row.training_set and match["flag"].startswith(REFERENCE):
            continue  # it is compared with what it learned from, the default
        if everyones or is_for(match["rows"], row):
            found.append(match["flag"])
    return found


def is_for(rows: str, row) -> bool:
    """Whether a row is of this data set, or its name fits this pattern."""
    return rows == row.dataset or fnmatch.fnmatch(row.name, rows)


def training_flags(row, extra: Sequence[str]) -> list[str]:
    """Those for `lpl train`. Settings of evaluations are for it where some are made during training."""
    given = flags_of(row, extra)
    periodic = any(flag.startswith(PERIODIC) for flag in given)
    return [flag for flag in given if not flag.startswith(EVALUATION_ONLY) or (periodic and flag.startswith(SETTINGS))]


def evaluation_flags(row, extra: Sequence[str]) -> list[str]:
    """Those for `lpl eval`; given lists stand in place of the row's."""
    given = [flag for flag in flags_of(row, extra) if flag.startswith(EVALUATION_ONLY)]
    return [*(f"--{flag}={values}" for flag, values in (row.evaluate or EVERY_AVERAGE).items()), *given]


# --- commands ---


def train_command(row, file: str, workdir: Path, stores: Path | None, extra: Sequence[str], shared) -> list[str]:
    """The command that trains a row."""
    command = [*COMMAND, "train", f"--config={file}:{row.name}", f"--workdir={workdir / row.name}"]
    if row.init is not None:
        command.append(f"--config.train.init_from={workdir / shared[row.init].run}")
    if row.weight is not None:
        weight = shared[row.name].weight
        command.append(f"--config.train.weight_from={weight and workdir / weight}")
    if stores is not None:
        command.append(f"--config.data.store={stores / store_name(row)}")
    return command + training_flags(row, extra)


def store_name(row) -> str:
    """Of the latent store that a row reads: its data set (but for ImageNet), resolution and autoencoder."""
    name = f"{row.arguments.split(',')[0]}_{row.autoencoder.rsplit('/', 1)[-1]}"
    return name if row.dataset == "imagenet" else f"{row.dataset}_{name}"


def evaluate_command(row, workdir: Path, extra: Sequence[str], run: str, module: ModuleType) -> list[str]:
    """The command that evaluates a row on the run of its own or of another row."""
    from lpl_jax.evaluation.cards import FEATURES, FOLDER

    command = [*COMMAND, "eval", f"--workdir={workdir / run}"]
    if run != row.name:
        # Its own folder for cards; features and images that both need are computed once.
        command.append(f"--out={workdir / row.name / FOLDER}")
        command.append(f"--config.evaluation.cache={workdir / run / FOLDER / FEATURES}")
        theirs, ours = module.get_config(run), module.get_config(row.name)
        for section in ("sampling", "evaluation"):
            changed = {key: value for key, value in ours[section].items() if value != theirs[section][key]}
            command += [f"--config.{section}.{key}={value}" for key, value in changed.items()]
    return [*command, *evaluation_flags(row, extra)]
