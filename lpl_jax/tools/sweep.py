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

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lpl_jax import stopping
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.io.jsons import read_json
from lpl_jax.io.locks import only_writer
from lpl_jax.io.paths import is_remote
from lpl_jax.tools import cli, flags
from lpl_jax.tools.rows import (
    COMMAND,
    FLAG,
    REFERENCE,
    Shared,
    choose,
    evaluate_command,
    is_for,
    load,
    notes,
    share,
    train_command,
)

EVALUATED = "evaluated.json"
OWN = ("--config=", "--workdir=", "--config.train.init_from=", "--out=", "--images=")
SIGNALLED = (130, 143)


def shown(command: Sequence[str]) -> str:
    """A command as a user gives it."""
    return shlex.join(["lpl", *command[len(COMMAND) :]])


def train(command: Sequence[str], row) -> int:
    """Trains a row; returns the exit status."""
    print(f"\n== {row.name}: {row.where}\n{shown(command)}", flush=True)
    return stopping.call(command)  # it resumes, and knows when it is done


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
    if status := stopping.call(command):
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
    return marker.is_file() and read_json(marker) == state


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
    add("--rows", nargs="+", type=cli.text, metavar="NAME", help="names of experiments; * stands for anything")
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
    flags.check_out(args, "workdir")
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
        if not args.print:
            check_evaluations(chosen, plan.experiments)
        for note in notes(chosen, plan.experiments):
            print(f"sweep: {note}", file=sys.stderr)
        with contextlib.nullcontext() if args.print else only_writer(args.workdir):
            status = run_all(chosen, module, args, extra, shared)
    if not args.print:
        from lpl_jax.evaluation.collect import write_results

        evaluations = {name: each.evaluation for name, each in shared.items()}
        averages = {name: each.average for name, each in shared.items()}
        known, names = module.ROWS.values(), [row.name for row in chosen]
        print(write_results(known, args.workdir, evaluations, names, averages=averages))
    return status


def check_evaluations(rows: Sequence[Any], experiments: Mapping[str, Any]) -> None:
    """Raises InputError for what an evaluation of the rows would not find, before weeks of training are spent."""
    from lpl_jax.evaluation.inputs import check_inputs

    checked = set()
    for row in rows:
        experiment = experiments[row.name]
        if (key := repr((experiment.evaluation, experiment.resolution))) not in checked:
            checked.add(key)
            try:
                check_inputs(experiment.evaluation, experiment.resolution)
            except InputError as error:
                raise InputError(f"{row.name}: {error}") from None


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
