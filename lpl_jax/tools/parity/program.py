"""Compare every frozen part with PyTorch on the same weights, and print a table.

    lpl parity                                     everything, on tiny random weights
    lpl parity samplers text                       some parts
    lpl parity --autoencoder FOLDER --out OUT      the weights in a folder; parity.json and parity.md in OUT

A network that is named is compared in place of tiny random ones, and the loss end to end on the autoencoder; TAESD's
.pth files count as one. Images are --resolution high and half as wide again. Status 1 if anything is out of tolerance.
"""

import importlib
import importlib.util
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from lpl_jax.errors import InputError
from lpl_jax.tools import cli, flags
from lpl_jax.tools.parity import report
from lpl_jax.tools.parity.comparison import Comparison, Group, Settings

# Part -> packages that it compares with.
PARTS = {
    "autoencoders": ("torch", "diffusers"),
    "loss": ("torch", "diffusers"),
    "denoisers": ("torch", "diffusers", "transformers"),
    "samplers": ("torch", "diffusers", "torchdiffeq"),
    "text": ("torch", "transformers"),
}
# Option -> parts that compare the weights it names.
PATHS = {"autoencoder": ("autoencoders", "loss"), "denoiser": ("denoisers",), "text": ("text",)}

# Lines and bars of theirs that would come between ours.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status: 1 if anything is out of its tolerance."""
    args = parser().parse_args(argv)
    parts = choose_parts(args.parts, {name: getattr(args, name) for name in PATHS})
    check_packages(parts)
    if args.out:
        flags.check_local(args, "out")
        report.check_folder(args.out)
    head = report.header(argv, args.seed)
    with tempfile.TemporaryDirectory() as scratch, jax.default_matmul_precision("highest"):
        paths = {name: getattr(args, name) for name in PATHS}
        settings = Settings(Path(scratch), resolution=args.resolution, seed=args.seed, **paths)
        rows = list(compare(parts, settings, debug=args.debug))
    print("\n" + report.markdown(head, rows))
    if args.out:
        report.save(args.out, head, rows)
        print(f"saved as {report.JSON} and {report.MARKDOWN} in {args.out}")
    return 0 if all(row.ok for row in rows) else 1


def parser() -> cli.Parser:
    """The flags of `lpl parity`."""
    result = cli.Parser(__doc__, prog="lpl parity")
    add = result.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to compare: {', '.join(PARTS)}. None given: all of them, or, "
        "if a network is named, those that it concerns")  # fmt: skip
    flags.add(result, "autoencoder")
    add("--denoiser", type=cli.text, metavar="FOLDER", help="an SD3 transformer in diffusers layout")
    add("--text", type=cli.text, metavar="FOLDER", help="a CLIP model in transformers layout")
    flags.add(result, "out")
    flags.add(result, "resolution", default=64)
    flags.add(result, "seed", default=0)
    return result


def choose_parts(named: Sequence[str], paths: dict[str, str | None]) -> list[str]:
    """The parts to run, in the order of PARTS. Raises InputError for an unknown one, and for a path that none uses."""
    if unknown := [part for part in named if part not in PARTS]:
        raise InputError(f"there is no part {unknown[0]!r}{cli.answer(unknown[0], PARTS)}")
    given = [option for option, path in paths.items() if path is not None]
    for option in given:
        if named and not set(named) & set(PATHS[option]):
            raise InputError(f"--{option} belongs to {' and '.join(PATHS[option])}; given with {', '.join(named)}")
    wanted = named or [part for option in given for part in PATHS[option]] or PARTS
    return [part for part in PARTS if part in wanted]


def check_packages(parts: Sequence[str]) -> None:
    """Raises InputError where a package that the parts compare with is not installed."""
    needed = dict.fromkeys(package for part in parts for package in PARTS[part])
    if absent := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise InputError(
            f"{', '.join(absent)} not installed, which {' and '.join(parts)} are compared with: "
            f"pip install {' '.join(absent)}, or pip install -r requirements/dev.txt"
        )


def compare(parts: Sequence[str], settings: Settings, debug: bool = False) -> Iterator[Comparison]:
    """All rows, with a line on stdout as each group is done. A group that crashes ends with a row that failed.

    Raises InputError, before the first comparison, for weights in `settings` that cannot be read.
    """
    for name, value in QUIET.items():  # read when the packages are imported
        os.environ.setdefault(name, value)
    modules = {part: importlib.import_module(f"lpl_jax.tools.parity.{part}") for part in parts}
    todo = [(part, group) for part, module in modules.items() for group in module.groups(settings)]
    for number, (part, group) in enumerate(todo, 1):
        started, rows = time.perf_counter(), []
        for row in run(group, debug):
            rows.append(row._replace(part=part, what=f"{group.name}: {row.what}"))
            yield rows[-1]
        failed = sum(not row.ok for row in rows)
        outcome = f"{failed} of {len(rows)} FAILED" if failed else f"{len(rows)} ok"
        print(
            f"[{number}/{len(todo)}] {part}: {group.name}: {outcome} ({time.perf_counter() - started:.1f} s)",
            flush=True,
        )


def run(group: Group, debug: bool = False) -> Iterator[Comparison]:
    """The group's rows; an exception becomes a last row without numbers, so that it does not hide the other groups."""
    try:
        yield from group.run()
    except Exception as error:
        if debug:
            traceback.print_exc()
        note = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Comparison("crashed", float("nan"), float("nan"), 0.0, 0, note=note)
