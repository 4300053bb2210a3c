"""The table of docs/scaling.md: what full-size steps take on TPU slices, compiled one by one.

    python -m benchmarks.compile_table --results benchmarks/results/compile.json --run
    python -m benchmarks.compile_table --results benchmarks/results/compile.json

    --results FILE      JSON with what was compiled; the table is made of it
    --run               compile what is missing there, each in a process of its own; may be stopped and called again
    --only TEXT         with --run: cells whose name has all of these words, such as "paper796 512 lpl"
    --debug             show the traceback of an error

A cell is a model, an image side, a loss and a slice; the denoiser and the autoencoder compute in bfloat16, the state is
split over 16 chips at most, and attention is XLA's own, whose operations can be counted. Needs what `compile_check`
needs, and takes a minute for a cell.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpl_jax.cost.topology import GIB
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.tools import cli, compile_check

MODELS = ("paper796", "xl_two_stream")
RESOLUTIONS = (256, 512)
SLICES = ("v5e-16", "v5e-256", "v5p-16", "v6e-16")
CHIPS = {"v5e-16": 16, "v5e-256": 256, "v5p-16": 8, "v6e-16": 16}
# Images for each chip; the batch of the paper's runs at 256 px would leave 4 to a chip of v5e-256.
IMAGES = {256: 64, 512: 16}
IMAGES_OF_256_CHIPS = {256: 16, 512: 16}
# Decoded images out of 16: the paper's share is 0.307.
DECODED = 5
LOSSES = {"none": "", "lpl": "lpl", "economical": "lpl,economical"}
SHOWN = {"lpl": f"{DECODED} of 16", "economical": "economical"}
# The economical setting's memory is shown on one slice.
ECONOMICAL_SLICES = ("v5e-16",)


@dataclass(frozen=True)
class Cell:
    """One step to compile."""

    model: str
    resolution: int
    loss: str
    slice: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.resolution} {self.loss} {self.slice}"

    @property
    def batch(self) -> int:
        images = IMAGES_OF_256_CHIPS if CHIPS[self.slice] == 256 else IMAGES
        return images[self.resolution] * CHIPS[self.slice]

    @property
    def arguments(self) -> list[str]:
        """Of `compile_check`."""
        config = ",".join(filter(None, (str(self.resolution), self.model, LOSSES[self.loss])))
        result = [
            f"--config=configs/imagenet.py:{config}",
            *slice_flags(self.slice, self.batch),
        ]
        if self.loss == "lpl":
            result.append(f"--config.loss.lpl_capacity={self.batch * DECODED // 16}")
        return result


def slice_flags(name: str, batch: int) -> list[str]:
    """Of `compile_check`, for the steps that are compared with each other."""
    return [
        f"--topology={name}",
        f"--batch-size={batch}",
        "--config.mesh.data=-1",
        f"--config.mesh.fsdp={min(compile_check.PARTS, CHIPS[name])}",
        "--config.autoencoder.dtype=bfloat16",
        "--config.model.attention=xla",
    ]


def cells() -> list[Cell]:
    """All of the table; a slice after another, whose lines are then whole."""
    return [
        Cell(model, resolution, loss, each)
        for each in SLICES
        for model in MODELS
        for resolution in reversed(RESOLUTIONS)
        for loss in LOSSES
        if loss != "economical" or each in ECONOMICAL_SLICES
    ]


def main(argv: Sequence[str]) -> int:
    """Arguments without the program's name -> exit status."""
    parser = cli.parser(__doc__.splitlines()[0])
    parser.add_argument("--results", required=True, help="JSON with what was compiled")
    parser.add_argument("--run", action="store_true", help="compile what is missing there")
    parser.add_argument("--only", default="", help="with --run: cells whose name has all of these words")
    values = parser.parse_args(argv)
    file = Path(values.results)
    if values.run:
        run(file, values.only.split())
    print(table(read(file)), end="")
    return 0


def read(file: Path) -> dict[str, Any]:
    """Reports by the name of the cell; none where there is no file."""
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"--results {file} is damaged: {error}") from None


def run(file: Path, words: Sequence[str] = ()) -> None:
    """Compiles the cells that the file lacks, and keeps each report there as soon as it is made."""
    wanted = [cell for cell in cells() if set(words) <= set(cell.name.split())]
    if not wanted:
        raise InputError(f"--only {' '.join(words)!r}: no cell has these words; the first is {cells()[0].name!r}")
    for cell in wanted:
        if cell.name in read(file):
            continue
        print(f"{cell.name}", flush=True)
        report = compiled(cell.arguments)
        if report is None:
            print(f"{cell.name}: not compiled", flush=True)
            continue
        found = {"command": cell.arguments, **report}
        # Read again: another process may have added to it in the meantime.
        write_json(file, read(file) | {cell.name: found})


def compiled(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The report of `compile_check`; None where nothing could be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if compile_check.main([*arguments, f"--json={report}"]) not in (0, 1) or not report.exists():
            return None
        return json.loads(report.read_text())


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each model, image side, slice and loss, with the step without LPL beside it."""
    lines = [
        "| model | px | slice | images a chip | LPL | state | peak, GiB | with LPL | ratio | HBM | collectives, GiB "
        "| with LPL | TFLOP a chip | with LPL | ratio | formulas |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells():
        if cell.loss != "none":
            base = replace(cell, loss="none")
            lines.append(_line(cell, results.get(base.name), results.get(cell.name)))
    return "\n".join(lines) + "\n"


def _line(cell: Cell, without: dict | None, with_lpl: dict | None) -> str:
    both = [without, with_lpl]
    either = without or with_lpl or {}

    def values(read):
        return [None if each is None or read(each) is None else read(each) for each in both]

    def cell_of(value, form=".2f"):
        return "-" if value is None else f"{value:{form}}"

    def ratio(pair):
        return "-" if None in pair else f"{pair[1] / pair[0]:.2f}"

    peaks = values(lambda each: each["memory"].get("peak"))
    traffic = values(lambda each: sum(kind["bytes"] for kind in each.get("collectives", {}).values()))
    operations = values(lambda each: each.get("flops", {}).get("compiled"))
    formulas = values(lambda each: each.get("flops", {}).get("traced"))
    marks = ["" if each is None or each["fits"] else " (does not fit)" for each in both]
    columns = [
        cell.model,
        str(cell.resolution),
        cell.slice,
        str(cell.batch // CHIPS[cell.slice]),
        SHOWN[cell.loss],
        cell_of(either.get("state", 0) / GIB if either else None),
        *(cell_of(None if peak is None else peak / GIB) + mark for peak, mark in zip(peaks, marks, strict=True)),
        ratio(peaks),
        cell_of(either["hbm"] / GIB if either else None),
        *(cell_of(None if total is None else total / GIB) for total in traffic),
        *(cell_of(None if count is None else count / 1e12, ".1f") for count in operations),
        ratio(operations),
        ratio(formulas),
    ]
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    cli.run_main(main)
