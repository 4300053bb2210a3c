"""The report: what was run, the table, and the files that keep both."""

import datetime
import importlib.metadata
import importlib.util
import math
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

import lpl_jax
from lpl_jax.errors import InputError
from lpl_jax.io import outputs
from lpl_jax.io.atomic import write_json, write_text
from lpl_jax.tools.parity.comparison import Comparison

JSON, MARKDOWN = "parity.json", "parity.md"
PACKAGES = ("jax", "flax", "numpy", "torch", "diffusers", "transformers", "torchdiffeq")
COLUMNS = ("part", "what was compared", "max error", "mean error", "tolerance", "verdict")


def header(argv: Sequence[str], seed: int) -> dict:
    """What a reader needs in order to run it again: command, versions, device, date (UTC), seed."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        "command": shlex.join(["lpl", "parity", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{device.platform} ({device.device_kind})",
        "seed": seed,
        "versions": {"lpl_jax": lpl_jax.__version__, "python": platform.python_version(), **versions},
    }


def markdown(head: dict, rows: Sequence[Comparison]) -> str:
    """Header, table and result; readable in a terminal, too."""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [f"`{head['command']}`", ""]
    lines += [f"{head['date']}, {head['platform']}, {head['device']}, seed {head['seed']}. {versions}.", ""]
    return "\n".join([*lines, table(rows), "", result(rows)])


def table(rows: Sequence[Comparison]) -> str:
    """A Markdown table with aligned columns, a line for each comparison."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cells(row: Comparison) -> tuple[str, ...]:
    what = f"{row.what} ({row.note})" if row.note else row.what
    if row.exact:
        numbers = f"{int(row.max_error)} of {row.values}", f"{row.mean_error:.1e}" if row.max_error else "0", "0"
    else:
        numbers = f"{row.max_error:.1e}", f"{row.mean_error:.1e}", f"{row.tolerance:.2g}"
    return row.part, what.replace("|", "/"), *numbers, verdict(row)


def verdict(row: Comparison) -> str:
    """Whether a comparison is within its tolerance, in a word."""
    return "ok" if row.ok else "FAIL"


def result(rows: Sequence[Comparison]) -> str:
    """The last line: how many were compared, and how many failed."""
    failed = sum(not row.ok for row in rows)
    return f"{len(rows)} comparisons, " + (f"{failed} FAILED." if failed else "all within their tolerances.")


def check_folder(folder: Path) -> None:
    """Raises InputError where it holds a report already, or cannot be written into; makes nothing."""
    for name in (JSON, MARKDOWN):
        if (folder / name).exists():
            raise InputError(f"{folder / name} exists: choose another folder for --out")
    outputs.check_folder(folder, "--out")


def save(folder: Path, head: dict, rows: Sequence[Comparison]) -> None:
    """Writes parity.json (numbers that are not finite as null) and parity.md."""
    records = [{"part": row.part, **row._asdict(), "verdict": verdict(row)} for row in rows]
    for record in records:
        record |= {
            name: None for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
        }
    content = {**head, "result": result(rows), "rows": records}
    write_json(folder / JSON, content, allow_nan=False)
    write_text(folder / MARKDOWN, markdown(head, rows) + "\n")
