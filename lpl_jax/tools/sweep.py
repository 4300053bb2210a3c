"""Named experiments one after the other: train, evaluate, and the paper's numbers beside ours.

    python -m lpl_jax.tools.sweep --rows 'table3_*' --workdir runs/paper --stores /data/latents \
        -- --config.evaluation.reference=/data/imagenet/val

Behind -- a flag may be for the rows of one data set, or with such names, alone:
cc12m:--config.evaluation.reference=/data/cc12m/val 'table5_latent_lpips*:--config.comparison.network=FILE'.
A row that another one starts from is run before it. Rows that train the same, such as the baselines of several tables,
share one run. What is done is not done again: call it again after it was stopped. With --print the commands are printed
instead, for a cluster; with --collect only the tables are made:

    WORKDIR/NAME/            the run of a row, its evaluations in evaluation/
    WORKDIR/results.md, .csv the rows, printed and measured
    WORKDIR/figure6.png      a figure's metrics over what is varied in it, and the rows' first samples in
                             figure6_samples.png
"""

import dataclasses
import fnmatch
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lpl_jax.errors import InputError
from lpl_jax.tools import cli

EVALUATED = "evaluated.json"
EVALUATIONS, FEATURES = "evaluation", "features"  # where eval.py keeps cards, and features beside them
FLAG = re.compile(r"(?:(?P<rows>[^:=]+):)?(?P<flag>--[\w.]+=.*)", re.DOTALL)
EVALUATION_ONLY = ("--config.evaluation.", "--config.sampling.", "--features", "--reference")


def load(path: Path) -> ModuleType:
    """A config file with `ROWS`: name -> row, with the attributes of those in configs/paper.py."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a config file with ROWS, such as configs/paper.py")
    sys.path.insert(0, str(path.resolve().parents[1]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "ROWS", None), dict):
        raise InputError(f"{path} has no ROWS: a dict of named experiments is needed")
    return module


def shared_runs(module: ModuleType) -> dict[str, str]:
    """Row -> the first row that trains the same, itself included: several tables have the same baseline.

    Rows train the same where their configs differ in sampling and evaluation alone.
    """
    from lpl_jax.training import build

    first: dict[str, str] = {}
    runs = {}
    for name, row in module.ROWS.items():
        config = module.get_config(name)
        if row.init is not None:
            config.train.init_from = row.init
        try:
            experiment = dataclasses.replace(build(config), sampling=None, evaluation=None)
            runs[name] = first.setdefault(repr(experiment), name)
        except InputError:  # something has to be given first
            runs[name] = name
    return runs


def choose(rows: Mapping[str, Any], patterns: Sequence[str]) -> list[Any]:
    """The rows whose names match, and what they start from, each behind the one that it needs."""
    chosen: dict[str, Any] = {}

    def add(name: str) -> None:
        if name not in chosen:
            if rows[name].init is not None:
                add(rows[name].init)
            chosen[name] = rows[name]

    for pattern in patterns:
        names = [name for name in rows if fnmatch.fnmatch(name, pattern)]
        if not names:
            raise InputError(f"no row is named {pattern!r}; possible: {', '.join(rows)}")
        for name in names:
            add(name)
    return list(chosen.values())


def listing(rows: Mapping[str, Any], runs: Mapping[str, str]) -> str:
    """All rows as a Markdown table."""
    lines = ["| paper | experiment | starts from | printed |", "|---|---|---|---|"]
    for row in rows.values():
        lists = "; ".join(f"`--{flag}={values}`" for flag, values in row.evaluate.items())
        start = f"`{row.init}`" if row.init else "scratch"
        if runs[row.name] != row.name:
            start = f"the run of `{runs[row.name]}`"
        lines.append(f"| {row.where} | `{row.name}`{': ' + lists if lists else ''} | {start} | {printed(row) or '-'} |")
    return "\n".join(lines)


def printed(row) -> str:
    """The paper's numbers of a row."""
    values = [f"{name} {value:g}" for name, value in row.paper.items()]
    changes = [f"{name} {value:+g}" for name, value in row.gain.items()]
    if changes:
        values.append(f"{', '.join(changes)} against `{row.against}`")
    return ", ".join([*values, *(f"{value:g} {unit}" for unit, value in row.cost.items())])


def train_command(row, file: Path, workdir: Path, stores: Path | None, extra: Sequence[str], runs) -> list[str]:
    """The command that trains a row."""
    command = [sys.executable, "train.py", f"--config={file}:{row.name}", f"--workdir={workdir / row.name}"]
    if row.init is not None:
        command.append(f"--config.train.init_from={workdir / runs[row.init]}")
    if stores is not None:
        command.append(f"--config.data.store={stores / store_name(row)}")
    return command + [argument for argument in flags_of(row, extra) if not argument.startswith(EVALUATION_ONLY)]


def store_name(row) -> str:
    """Of the latent store that a row reads: its data set (but for ImageNet), resolution and autoencoder."""
    name = f"{row.arguments.split(',')[0]}_{row.autoencoder.rsplit('/', 1)[-1]}"
    return name if row.dataset == "imagenet" else f"{row.dataset}_{name}"


def flags_of(row, extra: Sequence[str]) -> list[str]:
    """The flags behind -- that a row takes: those for all, for its data set, or for names like its own."""
    found = [FLAG.fullmatch(argument) for argument in extra]
    return [match["flag"] for match in found if match["rows"] is None or is_for(match["rows"], row)]


def is_for(rows: str, row) -> bool:
    """Whether a row is of this data set, or its name fits this pattern."""
    return rows == row.dataset or fnmatch.fnmatch(row.name, rows)


def evaluate_command(row, workdir: Path, extra: Sequence[str], run: str, module: ModuleType) -> list[str]:
    """The command that evaluates a row on the run of its own or of another row."""
    command = [sys.executable, "eval.py", f"--workdir={workdir / run}"]
    if run != row.name:
        # Its own place for cards; features and images that both need are made once.
        command.append(f"--out={workdir / row.name / EVALUATIONS}")
        command.append(f"--config.evaluation.cache={workdir / run / EVALUATIONS / FEATURES}")
        theirs, ours = module.get_config(run), module.get_config(row.name)
        for section in ("sampling", "evaluation"):
            changed = {key: value for key, value in ours[section].items() if value != theirs[section][key]}
            command += [f"--config.{section}.{key}={value}" for key, value in changed.items()]
    lists = [f"--{flag}={values}" for flag, values in row.evaluate.items()]
    wanted = [argument for argument in flags_of(row, extra) if argument.startswith(EVALUATION_ONLY)]
    return [*command, *lists, *wanted]


def is_evaluated(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether the evaluation that is about to be made was finished, of the same checkpoint."""
    marker = folder / EVALUATED
    return marker.is_file() and json.loads(marker.read_text()) == state


def train(command: Sequence[str], row) -> int:
    """Trains a row; returns the exit status."""
    print(f"\n== {row.name}: {row.where}\n{shlex.join(command)}", flush=True)
    return subprocess.run(command).returncode  # it resumes, and knows when it is done


def evaluate(command: Sequence[str], row, workdir: Path, run: str) -> int:
    """Evaluates a row unless that was done; returns the exit status."""
    from lpl_jax.training import checkpoints

    folder = workdir / row.name
    state = {"command": list(command[1:]), "step": checkpoints.latest_step(workdir / run / "checkpoints")}
    if is_evaluated(folder, state):
        print(f"{row.name}: evaluated already")
        return 0
    print(f"\n== {row.name}: {row.where}\n{shlex.join(command)}", flush=True)
    if status := subprocess.run(command).returncode:
        return status
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATED).write_text(json.dumps(state))
    return 0


def main(argv: Sequence[str]) -> int:
    argv, extra = _split(argv)
    parser = cli.parser(__doc__.splitlines()[0])
    parser.prog = "python -m lpl_jax.tools.sweep"
    parser.epilog = (
        "Arguments behind -- go to train.py and eval.py; cc12m:--FLAG=VALUE is for rows of CC12M, "
        "'table5_*:--FLAG=VALUE' for rows with such names."
    )
    parser.add_argument("--rows", nargs="+", help="names of experiments; * stands for anything")
    parser.add_argument("--list", action="store_true", help="print all experiments and do nothing")
    parser.add_argument("--file", type=Path, default=Path("configs/paper.py"), help="config file that has them")
    parser.add_argument("--workdir", type=Path, default=Path("runs/paper"), help="folder of the runs and tables")
    parser.add_argument("--stores", type=Path, help="folder of latent stores, one for each size and autoencoder")
    parser.add_argument("--print", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--collect", action="store_true", help="only make the tables of what is there")
    args = parser.parse_args(argv)
    module = load(args.file)
    known, runs = module.ROWS, shared_runs(module)
    for rows in {match["rows"] for match in map(FLAG.fullmatch, extra)} - {None}:
        if not any(is_for(rows, row) for row in known.values()):
            raise InputError(f"{rows}:--...: no row of {args.file} is of data set {rows!r} or has such a name")
    if args.list:
        print(listing(known, runs))
        return 0
    if not args.rows:
        raise InputError("no experiments given: --rows NAME ..., or --list to see all")
    rows = choose(known, args.rows)
    trained = set()
    for row in () if args.collect else rows:
        run = runs[row.name]
        training = train_command(known[run], args.file, args.workdir, args.stores, extra, runs)
        evaluation = evaluate_command(row, args.workdir, extra, run, module)
        if args.print:
            commands = [evaluation] if run in trained else [training, evaluation]
            print(f"# {row.name}: {row.where}" + ("" if run == row.name else f"; the run of {run}"))
            print("\n".join(shlex.join(["python", *command[1:]]) for command in commands))
        else:
            status = 0 if run in trained else train(training, known[run])
            if status := status or evaluate(evaluation, row, args.workdir, run):
                print(f"sweep: {row.name} ended with status {status}; call again to go on", file=sys.stderr)
                return status
        trained.add(run)
    if not args.print:
        from lpl_jax.evaluation.collect import write_results

        print(write_results(rows, args.workdir, runs))
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before and behind `--`."""
    argv = list(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    extra = argv[place + 1 :]
    if odd := [argument for argument in extra if not FLAG.fullmatch(argument)]:
        raise InputError(
            f"behind -- stand flags with a value, [DATASET or ROWS:]--config.SECTION.FIELD=VALUE; got {odd[0]!r}"
        )
    return argv[:place], extra


if __name__ == "__main__":
    cli.run_main(main)
