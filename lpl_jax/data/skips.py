"""How many images may be skipped while a store is written, and what kinds of them there were."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lpl_jax.data.examples import Skipped
from lpl_jax.data.parts import UnitRecord
from lpl_jax.errors import InputError

EARLIEST = 1000  # images before a share is judged, except at the end
MOST_KINDS = 8


@dataclass
class SkipLimit:
    """Counts images and skipped ones, and raises an InputError where these are more than `most`.

    Those that are `tolerated` are listed with the others, but not counted here.

    most: a number of images (int), checked at every one, or a share of all (float, 0.01), checked from `EARLIEST`
    images on and at the end.
    """

    most: int | float
    seen: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    _counted: list[Skipped] = field(default_factory=list)

    def __post_init__(self):
        share = isinstance(self.most, float)
        if self.most < 0 or (share and self.most > 1):
            raise InputError(f"max_skipped={self.most}: must be a number of images or a share, 0.0 to 1.0")

    def add(self, unit_records: Mapping[int, UnitRecord]) -> None:
        """Counts units that were finished before."""
        for record in unit_records.values():
            self.seen += record.shard.records if record.shard else 0
            for image in record.skipped:
                self._list(Skipped(unit=record.unit, **image._asdict()))

    def skip(self, skipped: Skipped) -> None:
        """Counts an image that is skipped. Raises InputError where it is one too many."""
        self._list(skipped)
        self.check()

    def foresee(self, unusable: Sequence[tuple[str, str]], images: int) -> None:
        """Raises an InputError where too many files are known to be unusable before any of so many images is read."""
        count = len(unusable)
        if not count or count <= (self.most * (count + images) if isinstance(self.most, float) else self.most):
            return
        kinds = "; ".join(kinds_of([Skipped(key, "", reason) for key, reason in unusable]))
        raise InputError(
            f"{count} of {count + images} files cannot be used, more than max_skipped={self.most} (a number or a "
            f"share): {kinds}"
        )

    def check(self, final: bool = False) -> None:
        """Raises an InputError where too many were skipped; `final`: all images were seen."""
        count = len(self._counted)
        images = self.seen + count
        if isinstance(self.most, float):
            if not (final or images >= EARLIEST) or count <= self.most * images:
                return
        elif count <= self.most:
            return
        last = self._counted[-1]
        if self.most == 0:
            raise InputError(f"{last.reason} (max_skipped, a number or a share, passes over such images)")
        raise InputError(
            f"{count} of {images} images cannot be used, more than max_skipped={self.most}; the last one, in "
            f"{last.unit}: {last.reason}"
        )

    def _list(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        if not skipped.tolerated:
            self._counted.append(skipped)


def kinds_of(skipped: Iterable[Skipped]) -> list[str]:
    """A line for each kind of reason: how many, the reason, and one of the keys; the most frequent ones first."""
    counts, examples = Counter(), {}
    for entry in skipped:
        reason = entry.reason.rpartition(entry.key)[2].lstrip(": ") or entry.reason
        kind = re.sub(r"[0-9]+|'[^']*'| \(.*\)", "", reason)  # numbers, names and details differ from file to file
        counts[kind] += 1
        examples.setdefault(kind, (reason, entry.key))
    lines = [
        f"{count} {examples[kind][0]}, such as {examples[kind][1]}" for kind, count in counts.most_common(MOST_KINDS)
    ]
    left = len(counts) - len(lines)
    return [*lines, f"and {left} more kinds"] if left else lines


def parse_limit(text: str) -> int | float:
    """A number of images ("100"), or a share of them ("0.01" and "1%").

    Raises:
      InputError: something else.
    """
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise InputError(f"max_skipped={text}: give a number of images, or a share such as 0.01 or 1%") from None
