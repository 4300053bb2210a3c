"""Cards of many runs in one table, with the numbers that the paper prints, and pictures of rows that form a curve."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lpl_jax.evaluation.cards import METRICS, Card, Metric, read_card
from lpl_jax.evaluation.sweep import draw


def cards_of(run: Path) -> list[tuple[str, Card]]:
    """(name, card) of all evaluations of a run, the newest checkpoint last."""
    found = [(path.parent.name, read_card(path)) for path in sorted((run / "evaluation").glob("*/card.json"))]
    return sorted(found, key=lambda item: item[1].made.get("checkpoint.step", 0))


def write_results(rows: Sequence[Any], workdir: Path) -> str:
    """results.md and results.csv of the rows, and a picture for every group of rows that differ in one number.

    rows: as in configs/paper.py: with name, where, paper.
    Returns the table as Markdown.
    """
    found = {row.name: cards_of(workdir / row.name) for row in rows}
    metrics = [name for name in METRICS if any(name in row.paper for row in rows) or _measured(found, name)]
    lines = [
        "| experiment | " + " | ".join(METRICS[name][0] for name in metrics) + " | evaluation |",
        "|" + "---|" * (len(metrics) + 2),
    ]
    table = []
    for row in rows:
        for evaluation, card in found[row.name] or [("not run", None)]:
            cells = [_beside(row.paper.get(name), card.metrics.get(name) if card else None) for name in metrics]
            lines.append(f"| {row.where} (`{row.name}`) | " + " | ".join(cells) + f" | {evaluation} |")
            ours = {name: card.metrics[name].value for name in metrics if card and name in card.metrics}
            paper = {f"paper_{name}": value for name, value in row.paper.items()}
            table.append({"name": row.name, "where": row.where, "evaluation": evaluation} | paper | ours)
    text = "\n".join(["Printed / measured here.", "", *lines]) + "\n"
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "results.md").write_text(text)
    with (workdir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in table for name in line)))
        writer.writeheader()
        writer.writerows(table)
    for prefix, points in curves(rows, found).items():
        draw(points, workdir / f"{prefix}.png", prefix)
    return text


def curves(rows: Iterable[Any], found: dict[str, list]) -> dict[str, list[tuple[dict[str, Any], Card]]]:
    """prefix -> (setting, card) of rows named PREFIX and a number, such as figure6_tau3, where two or more were run."""
    groups: dict[str, list] = {}
    for row in rows:
        match = re.fullmatch(r"(.*\D)(\d+(?:\.\d+)?)", row.name)
        if match and found[row.name]:
            groups.setdefault(match[1], []).append(({match[1]: float(match[2])}, found[row.name][-1][1]))
    return {prefix: sorted(points, key=lambda p: p[0][prefix]) for prefix, points in groups.items() if len(points) > 1}


def _measured(found, name: str) -> bool:
    return any(name in card.metrics for cards in found.values() for _, card in cards)


def _beside(printed: float | None, ours: Metric | None) -> str:
    left = "-" if printed is None else f"{printed:g}"
    right = "-" if ours is None else f"{ours.value:.4g}"
    return f"{left} / {right}"
