"""Memory and operations of the paper's comparison losses (Table 5) and decoder blocks (Fig. 7), for a TPU slice.

    python -m benchmarks.paper_costs [--out FOLDER] [--only NAME ...]

Each is an experiment of configs/paper.py that `lpl compile-check` compiles for a v5e-16: 512 px, 16 images a chip,
latents cached, XLA's attention, state split over the chips, networks in bfloat16; with LPL 5 of 16 images are decoded,
the paper's share, in Table 5 by the asymmetric autoencoder (App. A.4) and in Fig. 7 by SDXL's. Nothing runs, so there
is no throughput. Needs what compile_check needs; half a minute a row.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, compile_table
from lpl_jax.configs import paper
from lpl_jax.cost.topology import GIB

BASE = "throughput_l2"  # decodes nothing: the same program for every autoencoder, and for Fig. 7 the one of no blocks
COMPARED = [name for name in paper.ROWS if name.startswith("throughput_")]
BLOCKS = [name for name in paper.ROWS if name.startswith("figure7_")]
SLICE, RESOLUTION = "v5e-16", 512
BATCH = compile_table.IMAGES[RESOLUTION] * compile_table.CHIPS[SLICE]
DECODED = BATCH * compile_table.DECODED // 16
KEPT = ("batch_size", "decoded", "mesh", "memory", "state", "hbm", "fits", "flops", "collectives", "versions")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_costs", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the dated result")
    parser.add_argument("--only", nargs="+", help="these rows, and the one they are compared with")
    args = parser.parse_args(argv)
    names = [name for name in COMPARED + BLOCKS if not args.only or name in (BASE, *args.only)]
    rows = {}
    for name in names:
        rows[name] = measure(name)
        print(line(name, rows[name], rows[BASE]), flush=True)
    result = {"date": common.today(), "command": command(BASE), "machine": common.machine(), "rows": rows}
    print("\n" + table(rows) + f"\nwritten to {common.write(result, 'paper_costs', args.out)}")
    return 0


def command(name: str) -> list[str]:
    """Of `lpl compile-check`."""
    row, extra = paper.ROWS[name], []
    if row.changes.get("comparison.kind") == "latent_lpips":
        extra.append("--config.comparison.network=any")  # its weights are not needed, only their shapes
    if "lpl" in row.arguments.split(","):
        extra.append(f"--config.loss.lpl_capacity={DECODED}")
    return [f"--config=paper:{name}", *compile_table.slice_flags(SLICE, BATCH), *extra]


def measure(name: str) -> dict[str, Any]:
    """What compile_check says of a row."""
    report = compile_table.compiled(command(name))
    if report is None:
        raise SystemExit(f"{name} was not compiled")
    return {key: report[key] for key in KEPT if key in report} | {"compared": paper.ROWS[name].where}


def line(name: str, report: dict[str, Any], base: dict[str, Any]) -> str:
    """A row of the table."""
    peak, first = (each["memory"]["peak"] for each in (report, base))
    operations, without = (each["flops"]["traced"] for each in (report, base))
    cost = paper.ROWS[name].cost
    printed = ", ".join(f"{value:g} {unit}" for unit, value in cost.items()) or "-"
    return (
        f"| {report['compared']} | `{name}` | {printed} | {peak / GIB:.2f} | {peak / first:.2f} | "
        f"{operations / 1e12:.1f} | {operations / without:.2f} |"
    )


def table(rows: dict[str, dict[str, Any]]) -> str:
    """All rows as Markdown."""
    head = "| paper | experiment | printed | peak, GiB a chip | ratio | TFLOP a chip and step | ratio |"
    return "\n".join([head, "|" + "---|" * 7, *(line(name, row, rows[BASE]) for name, row in rows.items())]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
