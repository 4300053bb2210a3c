"""Result cards: the numbers of one evaluation with all that produced them, as JSON and Markdown; and cards compared."""

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import lpl_jax
from lpl_jax.errors import InputError, some
from lpl_jax.io.atomic import write_json, write_text
from lpl_jax.io.fingerprints import fingerprint_values
from lpl_jax.io.jsons import checked, read_json, record, signed
from lpl_jax.io.npy import read_npy
from lpl_jax.io.paths import AnyPath, PathLike, to_path

FORMAT = 1
FOLDER = "evaluation"  # of a run: an evaluation in each folder in it, and its card there
FEATURES = "features"  # beside them: features that were computed
MAX_SAMPLES = 2**32  # bytes
SAMPLES = "samples.npy"  # beside a card: the first images, uint8 (N, H, W, 3)
# Name -> (title, which way is better).
METRICS = {
    "fid": ("FID", "lower"),
    "sfid": ("sFID", "lower"),
    "cfd": ("classifier Fréchet distance (not FID)", "lower"),
    "inception_score": ("Inception score", "higher"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "density": ("density", "higher"),
    "coverage": ("coverage", "higher"),
    "clip_score": ("CLIPScore", "higher"),
    "spectrum_low": ("spectrum error, low band (log10)", "lower"),
    "spectrum_middle": ("spectrum error, middle band (log10)", "lower"),
    "spectrum_high": ("spectrum error, high band (log10)", "lower"),
}
# Where something lies, for people: a fingerprint stands beside each.
PLACES = ("run", "images.source", "reference.source", "autoencoder", "text", "clip.source", "prompts.file")
# What has to be the same for the numbers of two cards to mean the same. The rest is what one compares.
COMPARABLE = ("num_images", "resolution", "features.", "clip.", "reference.", "metrics.", "prompts.")
# The same thing may lie elsewhere (hashes tell); intervals do not touch the values.
HARMLESS = ("reference.source", "clip.source", "prompts.file", "metrics.intervals")


class Metric(NamedTuple):
    """A number and the ends of its 95 % interval (None where none was computed)."""

    value: float
    low: float | None = None
    high: float | None = None


class _File(NamedTuple):
    """The object in card.json, see `Card`."""

    format: int
    metrics: Mapping[str, Metric]
    absent: Mapping[str, str]
    made: Mapping[str, str | int | float | bool | None]
    context: Mapping[str, Any]


class Card(NamedTuple):
    """The numbers of an evaluation and all that they depend on.

    metrics: by the names of `METRICS`. absent: metric -> why it is not there. provenance: what the numbers depend on,
    plain values by dotted name ("made" in the file). context: when, where and by which command and versions it was
    computed.
    """

    metrics: dict[str, Metric]
    absent: dict[str, str]
    provenance: dict[str, Any]
    context: dict[str, Any]


def context(command: Sequence[str]) -> dict[str, Any]:
    """When, by which command, on what and with which versions."""
    versions = {"python": platform.python_version(), "lpl_jax": lpl_jax.__version__}
    for name in ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": versions,
    }


def write_card(card: Card, folder: PathLike) -> AnyPath:
    """card.json and card.md in `folder`; returns the former's path."""
    folder = to_path(folder, "--out", remote=True)
    metrics = {name: metric._asdict() for name, metric in card.metrics.items()}
    fields = {"metrics": metrics, "absent": card.absent, "made": card.provenance, "context": card.context}
    path = folder / "card.json"
    write_text(folder / "card.md", markdown(card))
    write_json(path, signed({"format": FORMAT, **fields}))
    return path


def read_card(path: PathLike) -> Card:
    """A card from its card.json, or from the folder that holds it. Raises InputError where it is none."""
    path = to_path(path, "a result card", remote=True)
    path = path / "card.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such result card")
    raw = checked(read_json(path), str(path))
    if "format" not in raw:
        raise InputError(f"{path} is not a result card")
    if raw["format"] != FORMAT:
        raise InputError(f"{path}: result card of format {str(raw['format'])[:20]}; this version reads {FORMAT}")
    found = record(_File, raw, str(path))
    for name, metric in found.metrics.items():
        if metric.low is not None and metric.high is not None and metric.low > metric.high:
            raise InputError(f"{path}: {some([name])} has an interval from {metric.low} to {metric.high}")
    return Card(dict(found.metrics), dict(found.absent), dict(found.made), dict(found.context))


def read_samples(folder: AnyPath, card: Card) -> np.ndarray:
    """The first images of the evaluation in this folder, uint8 (N, H, W, 3), which has this card.

    Raises InputError where they are damaged, or not of the card's resolution.
    """
    path, side = folder / SAMPLES, card.provenance.get("resolution")
    images = read_npy(path, most=MAX_SAMPLES)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise InputError(f"{path} is an array {images.shape} of {images.dtype}: needed: (N, H, W, 3), uint8")
    if side is not None and images.shape[1:3] != (side, side):
        raise InputError(f"{path} has images of {images.shape[2]}x{images.shape[1]} pixels; its card says {side}")
    return images


def markdown(card: Card) -> str:
    """The card as a Markdown page."""
    lines = ["# Result card", "", "| metric | value | 95 % interval | better |", "|---|---|---|---|"]
    for name, metric in card.metrics.items():
        title, better = METRICS[name]
        interval = _interval(metric) or "-"
        lines.append(f"| {title} | {_number(metric.value)} | {interval} | {better} |")
    if card.absent:
        lines += ["", "Not computed:", ""]
        lines += [f"- {METRICS[name][0]}: {reason}" for name, reason in card.absent.items()]
    lines += ["", "| what made it | |", "|---|---|"]
    versions = card.context.get("versions", {})
    facts = card.provenance | {name: value for name, value in card.context.items() if name != "versions"}
    facts |= {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}
    lines += [f"| {name} | {_text(value)} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def compare(cards: Mapping[str, Card], *, same: bool = True) -> str:
    """Cards side by side as Markdown: their metrics, what differs in how they were made, and what is the same.

    cards: name -> card. A difference that keeps the numbers from being compared is marked with (!). same: also list
    what is the same in all.
    """
    names = list(cards)
    lines = [_row(["metric", *names]), _row(["---"] * (len(names) + 1))]
    for metric, (title, better) in METRICS.items():
        if any(metric in card.metrics for card in cards.values()):
            cells = [_cell(card.metrics.get(metric)) for card in cards.values()]
            lines.append(_row([f"{title} ({better} is better)", *cells]))
    fields = list(dict.fromkeys(field for card in cards.values() for field in card.provenance))
    values = {field: [_text(card.provenance.get(field, "-")) for card in cards.values()] for field in fields}
    differing = [field for field in fields if len(set(values[field])) > 1]
    lines += ["", "Made differently:" if differing else "All were made in the same way.", ""]
    if differing:
        lines += [_row(["", *names]), _row(["---"] * (len(names) + 1))]
        lines += [_row([f"{field} (!)" if matters(field) else field, *values[field]]) for field in differing]
        lines.append("")
    if wrong := [field for field in differing if matters(field)]:
        lines += [f"(!) Not comparable: {', '.join(wrong)} must be the same for the numbers to mean the same.", ""]
    alike = [field for field in fields if field not in differing]
    if same and alike:
        lines += ["Same in all:", "", *(f"- {field}: {values[field][0]}" for field in alike)]
    return "\n".join(lines) + "\n"


def key_of(provenance: Mapping[str, Any]) -> str:
    """A short hash of a card's provenance: other settings, another hash."""
    return fingerprint_values(provenance)[:6]


def matters(field: str) -> bool:
    """Whether cards that differ in this field of their provenance measure different things."""
    return field.startswith(COMPARABLE) and field not in HARMLESS


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    interval = _interval(metric)
    return _number(metric.value) + (f" ({interval})" if interval else "")


def _interval(metric: Metric) -> str:
    return "" if metric.low is None or metric.high is None else f"{_number(metric.low)} to {_number(metric.high)}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def _text(value) -> str:
    return str(value).replace("|", "\\|")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
