"""Several evaluations in one table and one picture (as Fig. 8, 10 and 19 of the paper)."""

from collections.abc import Mapping, Sequence
from typing import Any

from lpl_jax.evaluation.cards import METRICS, Card, key_of
from lpl_jax.io.atomic import write_csv
from lpl_jax.io.paths import AnyPath, PathLike, to_path
from lpl_jax.io.pictures import write_figure


def write_sweep(results: Sequence[tuple[Mapping[str, Any], Card]], folder: PathLike) -> AnyPath:
    """sweep_KEY.csv, a row for each evaluation, and sweep_KEY.png, its metrics over what was varied; returns the first.

    KEY is a hash of the cards' provenance: another sweep writes other files.

    Args:
      results: (the settings, the card) of each evaluation; the same settings by name in all.
    """
    path = (
        to_path(folder, "--out", remote=True)
        / f"sweep_{key_of({'cards': [card.provenance for _, card in results]})}.csv"
    )
    rows = table(results)
    write_csv(path, rows)
    axis, *_ = varied(results) or [next(iter(results[0][0]))]
    draw(results, path.with_suffix(".png"), axis)
    return path


def table(results: Sequence[tuple[Mapping[str, Any], Card]]) -> list[dict[str, Any]]:
    """A row for each evaluation: its settings, then value and interval of every metric that any of them has."""
    names = [name for name in METRICS if any(name in card.metrics for _, card in results)]
    rows = []
    for settings, card in results:
        row = dict(settings)
        for name in names:
            metric = card.metrics.get(name)
            row |= {name: "", f"{name}_low": "", f"{name}_high": ""} if metric is None else {
                name: metric.value,
                f"{name}_low": "" if metric.low is None else metric.low,
                f"{name}_high": "" if metric.high is None else metric.high,
            }  # fmt: skip
        rows.append(row)
    return rows


def varied(results: Sequence[tuple[Mapping[str, Any], Card]]) -> list[str]:
    """The settings that are not the same in all, most values first."""
    first = results[0][0]
    counts = {name: len({settings[name] for settings, _ in results}) for name in first}
    return sorted((name for name, count in counts.items() if count > 1), key=lambda name: -counts[name])


def draw(
    results: Sequence[tuple[Mapping[str, Any], Card]],
    path: PathLike,
    axis_name: str,
    *,
    levels: Mapping[str, Card] | None = None,
) -> None:
    """A panel for each metric over one setting, a line for each combination of the others that vary, as a PNG.

    levels: title -> a card whose values are drawn as dashed lines across.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in METRICS if any(name in card.metrics for _, card in results)]
    others = [name for name in varied(results) if name != axis_name]
    lines: dict[str, list] = {}
    for settings, card in results:
        label = ", ".join(f"{name} {settings[name]}" for name in others)
        lines.setdefault(label, []).append((settings[axis_name], card.metrics))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.9 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, points in lines.items():
            known = [(x, found[name]) for x, found in points if name in found]
            places = [x for x, _ in known]
            (line,) = axis.plot(places, [metric.value for _, metric in known], marker="o", label=label or None)
            if all(metric.low is not None for _, metric in known):
                low, high = ([getattr(metric, end) for _, metric in known] for end in ("low", "high"))
                axis.fill_between(range(len(places)) if isinstance(places[0], str) else places, low, high, alpha=0.15,
                                  color=line.get_color())  # fmt: skip
        for number, (title, card) in enumerate((levels or {}).items()):
            if name in card.metrics:
                axis.axhline(card.metrics[name].value, linestyle="--", color=f"C{7 + number}", label=title)
        axis.set_title(METRICS[name][0], fontsize=9)
        axis.set_xlabel(axis_name)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    if any(lines) or levels:
        axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    write_figure(path, figure, 100)
    plt.close(figure)
