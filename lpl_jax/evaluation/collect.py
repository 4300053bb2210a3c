"""Cards of many runs in one table, with the numbers that the paper prints, and pictures of rows that form a figure."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lpl_jax.evaluation import fluctuation
from lpl_jax.evaluation.cards import FOLDER, METRICS, SAMPLES, Card, matters, read_card, read_samples
from lpl_jax.evaluation.figures import captioned_rows
from lpl_jax.evaluation.sweep import draw
from lpl_jax.io.atomic import write_csv, write_text
from lpl_jax.io.paths import AnyPath
from lpl_jax.io.pictures import write_picture

# What the lists of `lpl eval` vary, in a card.
VARIED = {
    "checkpoint": "checkpoint.step",
    "weights": "checkpoint.weights",
    "guidance": "sampling.guidance",
    "steps": "sampling.steps",
}
WEIGHTS = VARIED["weights"]
OWN = " *"  # marks a row's own weights in the table


class Figure(NamedTuple):
    """A figure of the paper: its metrics over one quantity.

    points: (settings, card), of which `axis` is one setting. levels: what they are compared with, by its title.
    samples: title -> the first images of an evaluation, (N, H, W, 3).
    """

    axis: str
    points: list[tuple[dict[str, Any], Card]]
    levels: dict[str, Card]
    samples: dict[str, np.ndarray]


def cards_of(run: AnyPath) -> list[tuple[AnyPath, Card]]:
    """(folder, card) of all evaluations of a run, the newest checkpoint last."""
    found = [(path.parent, read_card(path)) for path in sorted((run / FOLDER).glob("*/card.json"))]
    return sorted(found, key=lambda item: item[1].provenance.get("checkpoint.step", 0))


def write_results(
    known: Iterable[Any],
    workdir: AnyPath,
    evaluations: Mapping[str, str],
    chosen: Sequence[str] = (),
    *,
    averages: Mapping[str, str | None],
) -> str:
    """results.md and results.csv; for every figure among the rows its curves and samples as PNG.

    With rows that were evaluated over checkpoints also fluctuation.csv, see `evaluation.fluctuation`.

    Args:
      known: all rows, as in configs/paper.py; the tables have those that were evaluated, and `chosen`.
      evaluations: row -> the row whose evaluation it shares, or itself.
      averages: row -> the weights that are its own: those that figures show, and that changes are between.
    Returns the table as Markdown.
    """
    known = list(known)
    cards = {row.name: cards_of(workdir / row.name) for row in known}
    cards = {name: cards[name] or cards[evaluations[name]] for name in cards}
    rows = [row for row in known if cards[row.name] or row.name in chosen]
    found = {row.name: sorted(cards[row.name], key=lambda each, row=row: _order(row, each, averages)) for row in rows}
    baselines = {row.against: [card for _, card in cards[row.against]] for row in rows if row.against}
    metrics = [name for name in METRICS if any(name in row.paper | row.gain for row in rows) or _measured(found, name)]
    titles = [METRICS[name][0] for name in metrics]
    lines = ["| experiment | " + " | ".join(titles) + " | weights | evaluation |", "|" + "---|" * (len(metrics) + 3)]
    table = []
    for row in rows:
        for folder, card in found[row.name] or [(Path("not run"), None)]:
            base = _counterpart(row, card, baselines.get(row.against), averages) if card else None
            cells = " | ".join(f"{_printed(row, name)} / {_ours(name, card, base)}" for name in metrics)
            weights = card.provenance.get(WEIGHTS, "-") if card else "-"
            own = card is not None and weights == averages.get(row.name)
            lines.append(f"| {row.where} (`{row.name}`) | {cells} | {weights}{OWN * own} | {folder.name} |")
            line = {"name": row.name, "where": row.where, "evaluation": folder.name, "against": row.against}
            line |= {"weights": weights, "own_weights": averages.get(row.name)}
            line |= {f"paper_{name}": value for name, value in row.paper.items()}
            line |= {f"paper_change_{name}": value for name, value in row.gain.items()}
            table.append(line)
            if card is None:
                continue
            for name in metrics:
                if name in card.metrics:
                    line[name] = card.metrics[name].value
                if (change := _change(name, card, base)) is not None:
                    line[f"change_{name}"] = change
    head = (
        "Printed / measured here; in brackets the change from the row that it is compared with, where both were made "
        f"in the same way. Weights: the average that was sampled from;{OWN} are the row's own, which figures show and "
        "which are compared with the other row's own. Others are compared with the same average."
    )
    text = "\n".join([head, "", *lines]) + "\n"
    curves = [row for row in rows if "checkpoint" in row.evaluate]
    made = [({"row": row.name, "weights": card.provenance.get(WEIGHTS, "-")}, card)
            for row in curves for _, card in found[row.name]]  # fmt: skip
    if changes := fluctuation.table(made):
        write_csv(workdir / "fluctuation.csv", changes)
        text += "\n" + fluctuation.markdown(changes)
    write_text(workdir / "results.md", text)
    write_csv(workdir / "results.csv", table)
    for name, figure in figures(rows, found, baselines, averages).items():
        if len(figure.points) > 1:
            draw(figure.points, workdir / f"{name}.png", figure.axis, levels=figure.levels)
        shown = figure.samples
        if len(shown) > 1 and len({images.shape for images in shown.values()}) == 1:  # of the same noise and labels
            images = np.concatenate(list(shown.values()))
            picture = captioned_rows(images, list(shown), len(images) // len(shown))
            write_picture(workdir / f"{name}_samples.png", picture)
    return text


def figures(
    rows: Sequence[Any],
    found: Mapping[str, list],
    baselines: Mapping[str, list[Card]],
    averages: Mapping[str, str | None],
) -> dict[str, Figure]:
    """Figure -> what is known of it. A row is part of one by its `place`, or by the lists that it is evaluated with."""
    result: dict[str, Figure] = {}
    for row in rows:
        if not (found[row.name] and (row.place or row.evaluate)):
            continue
        axis = row.place[0] if row.place else next(iter(row.evaluate))
        figure = result.setdefault(row.figure, Figure(axis, [], {}, {}))
        alike = [(folder, card) for folder, card in found[row.name] if _shown(row, card, averages)]
        if figure.points:  # of numbers that cannot be compared, those like the first ones
            alike = [(folder, card) for folder, card in alike if _comparable(card) == _comparable(figure.points[0][1])]
        if not alike:
            continue
        folder, card = alike[-1]
        if row.place:
            figure.points.append(({axis: row.place[1]}, card))
            if base := _counterpart(row, card, baselines.get(row.against), averages):
                figure.levels[row.against] = base
        else:
            figure.points.extend(({"row": row.name} | _varied(row, each), each) for _, each in alike)
        if (folder / SAMPLES).is_file():
            figure.samples[row.where] = read_samples(folder, card)
    return result


def _varied(row, card: Card) -> dict[str, Any]:
    return {flag: card.provenance.get(VARIED[flag]) for flag in row.evaluate}


def _shown(row, card: Card, averages: Mapping[str, str | None]) -> bool:
    """Whether a card is of the row's own weights, or of those that it lists."""
    return "weights" in row.evaluate or card.provenance.get(WEIGHTS) in (None, averages.get(row.name))


def _order(row, evaluation: tuple[AnyPath, Card], averages) -> list[tuple[int, float]]:
    """The row's own weights come first; values that it lists in its order, others by size."""
    places: list[tuple[int, float]] = [(not _shown(row, evaluation[1], averages), 0)]
    for flag, value in _varied(row, evaluation[1]).items():
        listed, text = row.evaluate[flag].split(","), f"{value:g}" if isinstance(value, float) else str(value)
        number = value if isinstance(value, int | float) else 0
        places.append((listed.index(text), 0) if text in listed else (len(listed), number))
    return places


def _comparable(card: Card) -> dict[str, Any]:
    """What has to be the same for numbers to mean the same."""
    return {name: value for name, value in card.provenance.items() if matters(name)}


def _counterpart(row, card: Card, cards: list[Card] | None, averages: Mapping[str, str | None]) -> Card | None:
    """The newest of the cards whose numbers can be compared: made in the same way, of what the row lists too.

    The row's own weights are compared with the other's own, any others with the same.
    """
    weights = card.provenance.get(WEIGHTS)
    if "weights" not in row.evaluate and weights == averages.get(row.name):
        weights = averages.get(row.against)

    def way(each: Card) -> dict[str, Any]:
        sampling = {name: value for name, value in each.provenance.items() if name.startswith("sampling.")}
        varied = {name: value for name, value in _varied(row, each).items() if name != "weights"}
        return _comparable(each) | sampling | varied

    alike = (each for each in reversed(cards or []) if each.provenance.get(WEIGHTS, weights) == weights)
    return next((each for each in alike if way(each) == way(card)), None)


def _measured(found, name: str) -> bool:
    return any(name in card.metrics for cards in found.values() for _, card in cards)


def _printed(row, name: str) -> str:
    if name in row.paper:
        return f"{row.paper[name]:g}"
    return f"({row.gain[name]:+g})" if name in row.gain else "-"


def _ours(name: str, card: Card | None, base: Card | None) -> str:
    if card is None or name not in card.metrics:
        return "-"
    change = _change(name, card, base)
    return f"{card.metrics[name].value:.4g}" + ("" if change is None else f" ({change:+.3g})")


def _change(name: str, card: Card, base: Card | None) -> float | None:
    if base is None or name not in card.metrics or name not in base.metrics:
        return None
    return card.metrics[name].value - base.metrics[name].value
