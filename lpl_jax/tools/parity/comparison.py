"""What is compared: settings of a run, one row of the table, and how its numbers are measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lpl_jax.errors import InputError

# Largest error as a share of the largest magnitude of the PyTorch side. float32 rounds at 6e-8; the sums of some tens
# of layers reach 1e-5 and gradients ten times that. bfloat16 rounds at 4e-3.
FORWARD, GRADIENT, TRAJECTORY, BFLOAT16 = 1e-4, 1e-3, 1e-5, 0.05
SIDE_UNIT = 32  # pixels: an autoencoder of factor 8 and patches of 2 x 2, on the width of 3/2 heights


@dataclass(frozen=True)
class Settings:
    """A run. Raises InputError for a resolution that cannot be used.

    Attributes:
      scratch: an empty folder for weights on their way between the frameworks.
      autoencoder, denoiser, text: folders whose weights are compared; None for tiny random ones.
      resolution: height of images in pixels, the width is half as much again; latents are 8 times smaller.
      seed: of random weights and inputs.
    """

    scratch: Path
    autoencoder: str | None = None
    denoiser: str | None = None
    text: str | None = None
    resolution: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.resolution < SIDE_UNIT or self.resolution % SIDE_UNIT:
            raise InputError(f"--resolution {self.resolution}: a positive multiple of {SIDE_UNIT} is needed")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: 0 or a positive integer is needed")

    def sides(self, factor: int) -> tuple[int, int]:
        """Height and width of images reduced by a factor."""
        return self.resolution // factor, self.resolution * 3 // 2 // factor


class Comparison(NamedTuple):
    """One row of the table."""

    what: str
    max_error: (
        float  # relative to the largest magnitude of the PyTorch side; if exact, the number of values that differ
    )
    mean_error: float  # relative likewise; if exact, the share of values that differ
    tolerance: float  # of max_error
    values: int  # how many were compared
    exact: bool = False
    part: str = ""
    note: str = ""  # why there are no numbers

    @property
    def ok(self) -> bool:
        """Whether the largest error is within the tolerance; NaN never is."""
        return self.values > 0 and bool(self.max_error <= self.tolerance)


class Group(NamedTuple):
    """Comparisons with common inputs, such as those of one autoencoder; they fail one by one or crash together."""

    name: str
    run: Callable[[], Iterable[Comparison]]


def close(what: str, ours, theirs, tolerance: float) -> Comparison:
    """Compares arrays, or sequences of arrays of which each is measured by its own largest magnitude.

    A value on either side that is not finite makes both errors NaN.

    Raises:
      ValueError: numbers of arrays, or shapes, that differ.
    """
    ours, theirs = ([np.asarray(a, np.float64) for a in _sequence(side)] for side in (ours, theirs))
    errors = []
    for mine, reference in zip(ours, theirs, strict=True):
        if mine.shape != reference.shape:
            raise ValueError(f"{what}: shape {mine.shape} here, {reference.shape} in PyTorch")
        finite = np.isfinite(mine).all() and np.isfinite(reference).all()
        scale = np.abs(reference).max() if finite else np.nan
        # An error from a reference of zeros counts in full.
        errors.append((np.abs(mine - reference) / (scale or 1.0)).ravel() if finite else np.full(mine.size, np.nan))
    errors = np.concatenate(errors)
    return Comparison(what, float(errors.max()), float(errors.mean()), tolerance, errors.size)


def equal(what: str, ours, theirs) -> Comparison:
    """Counts the values of two arrays (or sequences of arrays) that differ; other shapes differ in every value."""
    pairs = list(zip(map(np.asarray, _sequence(ours)), map(np.asarray, _sequence(theirs)), strict=True))
    different = sum(
        int(np.sum(mine != reference)) if mine.shape == reference.shape else max(reference.size, 1)
        for mine, reference in pairs
    )
    total = sum(reference.size for _, reference in pairs)
    return Comparison(what, different, different / max(total, 1), 0, total, exact=True)


def equal_by_name(what: str, ours: Mapping, theirs: Mapping) -> Comparison:
    """Counts the values that differ between named tensors; a tensor that one side lacks differs in every value."""
    names = sorted(ours.keys() | theirs.keys())
    nothing = np.zeros(0)
    rows = [equal(what, ours.get(name, nothing), theirs.get(name, nothing)) for name in names]
    different, total = sum(int(row.max_error) for row in rows), sum(row.values for row in rows)
    return Comparison(what, different, different / max(total, 1), 0, total, exact=True)


def _sequence(side) -> Sequence:
    return side if isinstance(side, list | tuple) else [side]
