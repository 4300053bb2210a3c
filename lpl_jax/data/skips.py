"""How many images may be skipped while a store is written."""

from dataclasses import dataclass, field
from typing import Any

from lpl_jax.data.examples import Skipped
from lpl_jax.errors import InputError

EARLIEST = 1000  # images before a share is judged, except at the end


@dataclass
class SkipLimit:
    """Counts images and skipped ones, and raises an InputError where these are more than `most`.

    most: a number of images (int), checked at every one, or a share of all (float, 0.01), checked from `EARLIEST`
    images on and at the end.
    """

    most: int | float
    seen: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self):
        share = isinstance(self.most, float)
        if self.most < 0 or (share and self.most > 1):
            raise InputError(f"max_skipped={self.most}: must be a number of images or a share, 0.0 to 1.0")

    def add(self, unit_records: dict[int, dict[str, Any]]) -> None:
        """Counts units that were finished before."""
        for record in unit_records.values():
            self.seen += record["shard"]["records"] if record["shard"] else 0
            self.skipped += [Skipped(entry["key"], record["unit"], entry["reason"]) for entry in record["skipped"]]

    def skip(self, skipped: Skipped) -> None:
        """Counts an image that is skipped. Raises InputError where it is one too many."""
        self.skipped.append(skipped)
        self.check()

    def check(self, final: bool = False) -> None:
        """Raises an InputError where too many were skipped; `final`: all images were seen."""
        count = len(self.skipped)
        images = self.seen + count
        if isinstance(self.most, float):
            if not (final or images >= EARLIEST) or count <= self.most * images:
                return
        elif count <= self.most:
            return
        last = self.skipped[-1]
        if self.most == 0:
            raise InputError(f"{last.reason} (max_skipped, a number or a share, passes over such images)")
        raise InputError(
            f"{count} of {images} images cannot be used, more than max_skipped={self.most}; the last one, in "
            f"{last.unit}: {last.reason}"
        )


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
