"""Named experiments one after the other: train, evaluate, and the paper's numbers beside ours.

    lpl sweep --rows 'table3_*' --stores /data/latents --config.evaluation.reference=/data/imagenet/val
    lpl sweep --rows 'table2_*' --stores /data/latents -- cc12m:--config.evaluation.reference=/data/cc12m/val
    lpl sweep --list

Flags of `lpl train` and `lpl eval` follow --, and may be for the rows of one data set, or with such names, alone:
cc12m:--config.evaluation.reference=/data/cc12m/val 'table5_latent_lpips*:--config.comparison.network=FILE'.
A row that another one starts from, or takes the weight of LPL from, is run before it. Rows that train the same, such as
the baselines of several tables, share one run, and its evaluation if that is the same too. What is done is not done
again: call it again after it was stopped. With --print the commands are printed instead, for a cluster; with --collect
only the tables are written:

    WORKDIR/NAME/            the run of a row, its evaluations in evaluation/
    WORKDIR/results.md, .csv all rows that were evaluated there, printed and measured
    WORKDIR/fluctuation.csv  how much metrics change from a checkpoint to the next, of rows evaluated over checkpoints
    WORKDIR/figure6.png      a figure's metrics over what is varied in it, and the rows' first samples in
                             figure6_samples.png
"""

import dataclasses
import difflib
import fnmatch
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lpl_jax.errors import InputError, some
from lpl_jax.io.atomic import write_json
from lpl_jax.io.paths import is_remote
from lpl_jax.tools import cli, config_file, flags

EVALUATED = "evaluated.json"
FLAG = re.compile(r"(?:(?P<rows>[^:=]+):)?(?P<flag>--[\w.]+=.*)", re.DOTALL)
REFERENCE = ("--config.evaluation.reference=", "--reference=")
SETTINGS = ("--config.evaluation.", "--config.sampling.")
EVALUATION_ONLY = (*SETTINGS, *REFERENCE, "--features=", "--checkpoint=", "--weights=", "--guidance=", "--steps=")
PERIODIC = "--config.evaluation.every="  # evaluations during training
COMMAND = (sys.executable, "-m", "lpl_jax")
OWN = ("--config=", "--workdir=", "--config.train.init_from=", "--out=", "--images=")
EVERY_AVERAGE = {"weights": "all"}  # the list of a row that has none
SIGNALLED = (130, 143)


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


# --- running them ---


def shown(command: Sequence[str]) -> str:
    """A command as a user gives it."""
    return shlex.join(["lpl", *command[len(COMMAND) :]])


def train(command: Sequence[str], row) -> int:
    """Trains a row; returns the exit status."""
    print(f"\n== {row.name}: {row.where}\n{shown(command)}", flush=True)
    return subprocess.run(command).returncode  # it resumes, and knows when it is done


def evaluate(command: Sequence[str], row, workdir: Path, run: str) -> int:
    """Evaluates a row unless that was done; returns the exit status."""
    from lpl_jax.runs import checkpoints

    folder = workdir / row.name
    trained, step = workdir / run / "checkpoints", checkpoints.latest_step(workdir / run / "checkpoints")
    state = {"command": list(command[len(COMMAND) :]), "step": step, "reference": _reference(command)}
    state["checkpoint"] = None if step is None else checkpoints.fingerprint(trained, step)
    if is_evaluated(folder, state):
        print(f"{row.name}: evaluated already")
        return 0
    print(f"\n== {row.name}: {row.where}\n{shown(command)}", flush=True)
    if status := subprocess.run(command).returncode:
        return status
    write_json(folder / EVALUATED, state, indent=None)
    return 0


def _reference(command: Sequence[str]) -> dict[str, str] | None:
    """Identity of the images that a command compares with, where it names some of this machine."""
    from lpl_jax.io.fingerprints import fingerprint_path

    given = [flag.partition("=")[2] for flag in command if flag.startswith(REFERENCE)]
    return fingerprint_path(given[-1]) if given and not is_remote(given[-1]) else None


def is_evaluated(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether the evaluation that is about to run was finished, of the same checkpoint."""
    marker = folder / EVALUATED
    return marker.is_file() and json.loads(marker.read_text()) == state


def run_all(rows: Sequence[Any], module: ModuleType, args, extra: Sequence[str], shared: Mapping[str, Shared]) -> int:
    """Trains and evaluates rows, or prints how; returns the exit status of the first that failed, else 0."""
    done: set[tuple[str, str]] = set()
    for row in rows:
        run, evaluated, *_ = shared[row.name]
        first = module.ROWS[evaluated]
        training = train_command(module.ROWS[run], args.config, args.workdir, args.stores, extra, shared)
        evaluation = evaluate_command(first, args.workdir, extra, run, module)
        steps = {("train", run): training, ("evaluate", evaluated): evaluation}
        steps = {step: command for step, command in steps.items() if step not in done}
        done |= steps.keys()
        if args.print:
            others = [f"the run of {run}"] * (run != row.name)
            others += [f"the evaluation of {evaluated}"] * (evaluated not in (row.name, run))
            print("; ".join([f"# {row.name}: {row.where}", *others]))
            print("".join(f"{shown(command)}\n" for command in steps.values()), end="")
            continue
        for (what, _), command in steps.items():
            status = (
                train(command, module.ROWS[run]) if what == "train" else evaluate(command, first, args.workdir, run)
            )
            if status:
                how = "was stopped; call again to resume" if status in SIGNALLED else "failed; what is done is kept"
                if status < 0:  # it could not say so itself
                    how = f"was killed by signal {-status}, perhaps for lack of memory; what is done is kept"
                failed = status > 0 and status not in SIGNALLED  # it has said why, in the one line that stderr is for
                print(f"sweep: {row.name} {how} (status {status})", file=sys.stdout if failed else sys.stderr)
                return status if status > 0 else 128 - status
    return 0


def listing(rows: Mapping[str, Any], shared: Mapping[str, Shared]) -> str:
    """All rows as a Markdown table."""
    lines = ["| paper | experiment | starts from | printed |", "|---|---|---|---|"]
    for row in rows.values():
        lists = "; ".join(f"`--{flag}={values}`" for flag, values in row.evaluate.items())
        start = f"`{row.init}`" if row.init else "scratch"
        if (step := row.changes.get("train.init_step")) is not None:
            start += f", step {step:,}"
        if shared[row.name].weight is not None:
            start += f"; weight of `{shared[row.name].weight}`"
        if shared[row.name].run != row.name:
            start = f"the run of `{shared[row.name].run}`"
        lines.append(f"| {row.where} | `{row.name}`{': ' + lists if lists else ''} | {start} | {printed(row) or '-'} |")
    return "\n".join(lines)


def printed(row) -> str:
    """The paper's numbers of a row."""
    values = [f"{name} {value:g}" for name, value in row.paper.items()]
    changes = [f"{name} {value:+g}" for name, value in row.gain.items()]
    if changes:
        values.append(f"{', '.join(changes)} against `{row.against}`")
    return ", ".join([*values, *(f"{value:g} {unit}" for unit, value in row.cost.items())])


def parser() -> cli.Parser:
    """The flags of `lpl sweep`."""
    result = cli.Parser(__doc__, prog="lpl sweep")
    add = result.add_argument
    add("--rows", nargs="+", metavar="NAME", help="names of experiments; * stands for anything")
    flags.add(result, "workdir", default=Path("runs/paper"))
    text = "folder of latent stores, one for each size and autoencoder"
    add("--stores", type=flags.path, metavar="FOLDER", help=text)
    add("--list", action="store_true", help="print all experiments and do nothing")
    add("--print", action="store_true", help="print the commands and do nothing")
    add("--collect", action="store_true", help="only make the tables of what is there")
    flags.add_config(result, default="paper")
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    argv, extra = _split(argv)
    args = parser().parse_args(argv)
    flags.check_local(args, "workdir")
    extra = [*args.overrides, *extra]
    _check_own(extra)
    if args.list + args.print + args.collect > 1:
        raise InputError("--list, --print and --collect do different things: give one of them")
    if ":" in args.config:
        raise InputError(f"--config {args.config}: give the file alone; --rows says which of its experiments")
    module = load(args.config)
    for rows in {match["rows"] for match in map(FLAG.fullmatch, extra) if match} - {None}:
        if not any(is_for(rows, row) for row in module.ROWS.values()):
            raise InputError(f"{rows}:--...: no row of {args.config} is of data set {rows!r} or has such a name")
    plan = share(module, extra)
    shared = plan.shared
    if args.list:
        print(listing(module.ROWS, shared))
        return 0
    if not (args.rows or args.collect):
        raise InputError("no experiments given: --rows NAME ..., or --list to see all")
    if args.collect and not args.workdir.is_dir():
        raise InputError(f"--workdir {args.workdir}: no such folder, nothing to collect")
    chosen, status = choose(module.ROWS, args.rows or ()), 0
    if not args.collect:
        if wrong := [row.name for row in chosen if row.name in plan.faults]:  # before weeks are spent on others
            raise InputError(f"{wrong[0]}: {plan.faults[wrong[0]]}")
        for note in notes(chosen, plan.experiments):
            print(f"sweep: {note}", file=sys.stderr)
        status = run_all(chosen, module, args, extra, shared)
    if not args.print:
        from lpl_jax.evaluation.collect import write_results

        evaluations = {name: each.evaluation for name, each in shared.items()}
        averages = {name: each.average for name, each in shared.items()}
        known, names = module.ROWS.values(), [row.name for row in chosen]
        print(write_results(known, args.workdir, evaluations, names, averages=averages))
    return status


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before and after `--`."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    extra = argv[end + 1 :]
    if odd := [argument for argument in extra if not FLAG.fullmatch(argument)]:
        raise InputError(
            f"after -- come flags with a value, [DATASET or ROWS:]--config.SECTION.FIELD=VALUE; got {odd[0]!r}"
        )
    return argv[:end], extra


def _check_own(extra: Sequence[str]) -> None:
    if own := [match[0] for match in map(FLAG.fullmatch, extra) if match and match["flag"].startswith(OWN)]:
        raise InputError(f"{own[0]}: the sweep gives each row its own")
