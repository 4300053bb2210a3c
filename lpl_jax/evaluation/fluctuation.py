"""How much metrics change from one checkpoint of a run to the next.

The paper says that LPL reduces this fluctuation (of FID, Fig. 14 to 18), and gives no number for it. Here are two: the
change between neighbours, which a curve that still falls has too, and the deviation of a checkpoint from the line
through its neighbours, which a straight curve does not have.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lpl_jax.evaluation.bootstrap import bootstrap_interval
from lpl_jax.evaluation.cards import METRICS, Card, Metric

LEAST = 3  # checkpoints: the first that has two neighbours
RESAMPLES = 1000


class Fluctuation(NamedTuple):
    """Of one metric over the checkpoints of a run.

    checkpoints: how many. change: mean absolute difference of neighbours. deviation: mean absolute distance of a value
    from the line through the two beside it.
    """

    checkpoints: int
    change: Metric
    deviation: Metric


def fluctuation(values: Mapping[int, float], *, seed: int = 0) -> Fluctuation | None:
    """Of the values by step; None of fewer than three.

    Intervals are 95 % bootstrap intervals over the differences, which are taken as independent, though neighbouring
    ones share a checkpoint.
    """
    if len(values) < LEAST:
        return None
    steps = np.array(sorted(values), np.float64)
    y = np.array([values[int(step)] for step in steps], np.float64)
    share = (steps[1:-1] - steps[:-2]) / (steps[2:] - steps[:-2])
    between = y[:-2] + share * (y[2:] - y[:-2])
    return Fluctuation(len(y), _mean(np.abs(np.diff(y)), seed), _mean(np.abs(y[1:-1] - between), seed))


def _mean(values: np.ndarray, seed: int) -> Metric:
    mean = float(values.mean())
    if len(values) < 2:
        return Metric(mean)
    return Metric(mean, *map(float, bootstrap_interval(values, seed=seed, resamples=RESAMPLES)))


def table(cards: Sequence[tuple[Mapping[str, Any], Card]]) -> list[dict[str, Any]]:
    """A row for each metric of each group of evaluations that differ in their checkpoint alone.

    cards: (what an evaluation is of, such as its row and average, without the checkpoint; its card).
    """
    groups: dict[tuple, list[Card]] = {}
    for about, card in cards:
        groups.setdefault(tuple(about.items()), []).append(card)
    rows = []
    for about, found in groups.items():
        for name in METRICS:
            known = {card.provenance["checkpoint.step"]: card.metrics[name].value for card in found
                     if name in card.metrics and "checkpoint.step" in card.provenance}  # fmt: skip
            if (of := fluctuation(known)) is None:
                continue
            row = {**dict(about), "metric": name, "checkpoints": of.checkpoints}
            for kind in ("change", "deviation"):
                metric = getattr(of, kind)
                row |= {kind: metric.value, f"{kind}_low": metric.low, f"{kind}_high": metric.high}
            rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """These rows as a Markdown table under a line that explains it; empty without rows."""
    if not rows:
        return ""
    about = [name for name in rows[0] if name not in Fluctuation._fields and not name.endswith(("_low", "_high"))]
    head = [*about, "checkpoints", "change between neighbours", "deviation from the line between neighbours"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row[name]) for name in (*about, "checkpoints")]
        for kind in ("change", "deviation"):
            low, high = row[f"{kind}_low"], row[f"{kind}_high"]
            cells.append(f"{row[kind]:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["Fluctuation: mean absolute values over the checkpoints, 95 % intervals.", "", *lines]) + "\n"
