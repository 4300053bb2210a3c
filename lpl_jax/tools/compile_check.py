"""What a run's training step takes on each device of a machine that is not there: memory, operations, communication.

    lpl compile-check --config imagenet:512,lpl --topology v5e-16 --config.mesh.fsdp=16
    lpl compile-check --config quickstart:lpl --topology cpu:8

The step is the training loop's own, in full size, compiled ahead of time: no TPU, no data set and no weights are
needed, and nothing of full size is allocated. For TPUs libtpu has to be installed: pip install "lpl_jax[tpu-compile]".
What the numbers mean: docs/scaling.md.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpl_jax import stopping
from lpl_jax.cost import plan
from lpl_jax.cost import topology as topologies
from lpl_jax.cost.topology import GIB, MESSAGES, Topology
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.io.jsons import read_json
from lpl_jax.io.outputs import check_file
from lpl_jax.tools import cli, config_file, flags

# Set in the process that compiles, whose environment fits the topology; JAX is imported there only.
CHILD = "LPL_JAX_COMPILE_FOR"
# There too: folder that the compiler writes its plans into, where code generation is left out.
PLANS = "LPL_JAX_PLANS"
PARTS = (
    16  # of the state on a slice: widths of the models have no factor 256, and over so many most would stay replicated
)
SHOWN = 4  # of the arrays that the partitioner copies to every device


def parser() -> cli.Parser:
    """The flags of `lpl compile-check`."""
    result = cli.Parser(__doc__, prog="lpl compile-check")
    add = result.add_argument
    add("--topology", type=cli.text, metavar="NAME", help="v5e:4x4, v5p:2x2x4 (chips along each axis), v5e-16, v5p-16 "
        "(the cloud's names), or cpu:8 (emulated devices)")  # fmt: skip
    flags.add(result, "batch-size", note="train.batch_size")
    add("--find-batch", action="store_true", help="the largest batch that fits: compiled, not only computed")
    add("--codegen", action="store_true", help="compile to the end; for TPUs the report is else made as soon as memory "
        "is planned, before machine code is generated: seconds in place of minutes")  # fmt: skip
    add("--json", type=flags.local_path, metavar="FILE", help="write the report there")
    add("--hlo", type=flags.local_path, metavar="FILE", help="write the text of the optimised program there")
    text = "measure the tiny step that tests/guard compares with, and keep its values; stands alone"
    add("--update-guard", type=flags.path, metavar="FILE", help=text)
    flags.add_config(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status: 0, or 1 where the step does not fit."""
    args = parser().parse_args(argv)
    if args.update_guard:
        return update_guard(args.update_guard, argv)
    config = config_file.given(args)
    if args.topology is None:
        raise InputError("no topology given: --topology v5e-16, or cpu:8 for emulated devices")
    for name in ("json", "hlo"):
        if (path := getattr(args, name)) is not None:
            check_file(path, f"--{name}")
    topology = topologies.parse(args.topology)
    if topology.platform == "tpu":
        topologies.check_libtpu()
    # The loop that looks for a batch compiles in processes of its own.
    planning = topology.platform == "tpu" and not args.codegen and not args.find_batch
    if os.environ.get(CHILD) != topology.name:
        return _in_child(topology, argv, planning)
    report = check(config, topology, argv, batch=args.batch_size, find=args.find_batch, hlo=args.hlo)
    print(text(report), end="")
    if args.json:
        write_json(args.json, report)
        print(f"written to {args.json}")
    status = 1 if report["fits"] is False else 0
    if planning:  # the compiler is still at work
        sys.stdout.flush()
        os._exit(status)
    return status


def _in_child(topology: Topology, argv: Sequence[str], planning: bool = False, **options) -> int:
    environment = os.environ | topologies.environment(topology) | {CHILD: topology.name}
    command = [sys.executable, "-m", "lpl_jax", "compile-check", *argv]
    with tempfile.TemporaryDirectory() as folder:
        messages = Path(folder) / "messages"
        environment |= {MESSAGES: str(messages)}
        if planning:
            plans = Path(folder) / "plans"
            plans.mkdir()
            asked = f"{environment.get('XLA_FLAGS', '')} {plan.flags(plans, 'train_step')}".strip()
            environment |= {"XLA_FLAGS": asked, PLANS: str(plans)}
        status = stopping.call(command, env=environment, **options)
        if messages.exists() and (left := messages.read_text(errors="replace").strip()):
            raise InputError(f"the compiler ended the process (status {status}): {left.splitlines()[-1]}")
    return status


def update_guard(file: Path, argv: Sequence[str]) -> int:
    """Writes the values of `cost.guard` and prints what changed."""
    topology = topologies.parse("cpu:8")
    if os.environ.get(CHILD) != topology.name:
        # As the tests have it: machine code is not optimised, which no value depends on.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        return _in_child(topology, argv)
    from lpl_jax.cost import guard

    print("\n".join(guard.write(file) or ["nothing changed"]))
    return 0


def check(
    config,
    topology: Topology,
    argv: Sequence[str] = (),
    *,
    batch: int | None = None,
    find: bool = False,
    hlo: Path | None = None,
) -> dict[str, Any]:
    """The report of a ConfigDict's step, see `cost.compile_report`; with `find` of the largest batch that fits.

    argv: what this program was called with. hlo: file that the text of the optimised program goes to, the last one
    where several are compiled.

    The process has to have the topology's environment. Raises InputError for a config that is not possible.
    """
    import dataclasses

    from lpl_jax import parallel
    from lpl_jax.cost import compile_report
    from lpl_jax.cost.architectures import open_autoencoder, open_text
    from lpl_jax.experiment import build, resolve

    config = config.copy_and_resolve_references()
    with config.unlocked():
        for start in ("init_from", "init_step", "weight_from"):  # what a run starts from costs nothing
            config.train[start] = None
        config.train.batch_size = batch or config.train.batch_size
    experiment = build(config, platform=topology.platform)
    autoencoder, note = open_autoencoder(experiment)
    tower = open_text(experiment)
    experiment = resolve(experiment, autoencoder.config, tower.clip.config.text if tower else None)
    head = {
        "given": topology.text,
        "autoencoder": f"{note}; computes in {autoencoder.config.dtype}",
        "dtype": experiment.model.dtype,
    }

    folder = os.environ.get(PLANS)

    def measure(images: int) -> dict[str, Any]:
        if find:
            print(f"compiling for a batch of {images}", file=sys.stderr, flush=True)
        if find and topology.platform == "tpu":
            return _report_of_child(topology, argv, images)
        train = dataclasses.replace(experiment.train, batch_size=images)
        return compile_report.compile_report(
            dataclasses.replace(experiment, train=train),
            autoencoder,
            topology,
            tower,
            hlo_file=hlo,
            plan_folder=None if folder is None else Path(folder),
        )

    if not find:
        return head | measure(experiment.train.batch_size)
    shards = parallel.batch_shards(parallel.make_mesh(experiment.mesh, topologies.devices(topology)))
    largest, tried = compile_report.find_batch(measure, experiment.train.batch_size, shards)
    report = next((each for each in tried if each["batch_size"] == largest), tried[0])
    plans = {each["batch_size"]: each["memory"].get("peak") for each in tried}
    return head | report | {"largest_batch": largest, "plans": plans}


def _report_of_child(topology: Topology, argv: Sequence[str], images: int) -> dict[str, Any]:
    """The report at another batch size, of a process of its own, as one that plans has to end."""
    planning = "--codegen" not in argv
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        other = [flag for flag in argv if flag != "--find-batch"]
        other += [f"--batch-size={images}", f"--json={report}"]  # the last of a flag counts
        status = _in_child(topology, other, planning, stdout=subprocess.DEVNULL)
        if not report.exists():
            raise InputError(f"--find-batch: a batch of {images} could not be compiled (status {status})")
        return read_json(report)


# --- text ---


def text(report: dict[str, Any]) -> str:
    """The report as lines for a reader."""
    lines = [
        f"{report['given']}; mesh {', '.join(f'{axis} {size}' for axis, size in report['mesh'].items())}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"{report['resolution']} px, batch {report['batch_size']}, {report['batch_size'] / report['devices']:g} images "
        f"for each device, {report['decoded']} of the batch decoded; denoiser in {report['dtype']}",
        f"autoencoder {report['autoencoder']}",
        "",
        *_memory(report),
    ]
    if "flops" in report:
        lines += ["", *_operations(report), "", *_communication(report)]
    if "plans" in report:
        lines += ["", *_largest(report)]
    return "\n".join(lines) + "\n"


def _memory(report):
    memory, hbm = report["memory"], report["hbm"]
    verdict = {True: "fits", False: "DOES NOT FIT", None: "memory of the device unknown"}[report["fits"]]
    limit = "" if hbm is None else f" of {_size(hbm)}"
    lines = ["memory of each device"]
    if "argument" in memory:
        lines += [
            f"  arguments    {_size(memory['argument'])}, of which state {_size(report['state'])}",
            f"  temporaries  {_size(memory['temp'])}",
            f"  output       {_size(memory['output'])}, of which {_size(memory['alias'])} take the arguments' place",
        ]
    if memory:
        lines.append(f"  peak         {_size(memory['peak'])}{limit}: {verdict}")
    elif report["fits"] is False:
        lines.append(f"  state alone  {_size(report['state'])}{limit}: {verdict}; nothing was compiled")
    else:
        lines.append("  the backend has no plan")
    copies = report["mesh"]["data"]
    if copies > 1 and hbm is not None and (report["fits"] is False or report["state"] > hbm / 4):
        parts = min(PARTS, report["devices"])
        lines.append(
            f"  the mesh keeps {copies} copies of the state; --config.mesh.data=-1 --config.mesh.fsdp={parts} splits "
            f"it over {parts} devices: about {_size(report['state_whole'] / parts)} on each"
        )
    fsdp, parts = report["mesh"]["fsdp"], report["mesh"]["fsdp"] * report["mesh"]["tensor"]
    if fsdp > 1 and hbm is not None and report["state"] > max(hbm / 4, 2 * report["state_whole"] / parts):
        lines.append(
            f"  much of the state stays replicated, as few of its sizes are multiples of fsdp={fsdp}: try fewer parts, "
            f"--config.mesh.data=-1 --config.mesh.fsdp={PARTS}"
        )
    return lines


def _operations(report):
    names = {
        "analytic": "formulas, nothing computed again (docs/flops.md)",
        "traced": "traced program, with what remat computes again",
        "compiled": "compiled program, products and convolutions, bodies of loops as often as they run",
        "xla": "XLA's own count: bodies of loops once, so too low where layers are scanned",
    }
    unit, name_of_unit = (1e12, "TFLOP") if report["flops"]["traced"] >= 1e12 else (1e9, "GFLOP")
    lines = [f"operations of a step on each device, {name_of_unit}"]
    for name, title in names.items():
        if report["flops"][name] is not None:
            lines.append(f"  {report['flops'][name] / unit:10,.3f}  {title}")
    if report["kernels"]:
        kernels = f"{report['kernels']} calls of kernels, {report['flops']['kernels'] / unit:,.3f} as traced"
        lines.append(f"  of the compiled program {kernels}: XLA does not see inside")
    if report["unknown_loops"]:
        lines.append(f"  {report['unknown_loops']} loops of unknown length, counted once (for each iteration)")
    return lines


def _communication(report):
    lines = ["collectives of a step on each device"]
    for kind, total in report["collectives"].items():
        lines.append(f"  {kind:20} {total['count']:6}  {_size(total['bytes'])}")
    if not report["collectives"]:
        lines.append("  none")
    copied = report["rematerializations"]
    lines += [
        "",
        f"partitioner: {len(copied)} involuntary full rematerializations (0 expected); instructions that the compiler "
        f"repeats to save memory: {report['recomputed']}",
        *(f"  {each}" for each in copied[:SHOWN]),
        f"compiled in {report['compile_seconds']:.1f} s"
        + ("" if report["code"] else ", up to the memory plan: no machine code (--codegen)"),
    ]
    return lines


def _largest(report):
    limit = report["hbm"]
    lines = ["batch   for each device   peak"]
    for batch, peak in report["plans"].items():
        size = "not compiled: the state alone is too large" if peak is None else _size(peak)
        lines.append(
            f"{batch:<8}{batch / report['devices']:<18g}{size}{' (too large)' if peak and peak > limit else ''}"
        )
    found = report["largest_batch"]
    if not found:
        return [*lines, "no batch fits"]
    following = found + report["mesh"]["data"] * report["mesh"]["fsdp"]
    open_end = "" if following in report["plans"] else f" (the search ended before {following} was tried)"
    return [*lines, f"largest batch that fits: {found}{open_end}"]


def _size(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 2**10:,.2f} KiB"
