"""What stands beside the manifest of a latent store: the report, and while it is being written plan and unit records.

All of them hold a checksum of themselves, as the manifest does (`io.jsons.signed`).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lpl_jax.data.examples import Skipped
from lpl_jax.data.manifest import MANIFEST, PLAN, REPORT, Manifest, Shard
from lpl_jax.data.records import MOST_CLASSES
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.io.jsons import MAX_LARGE, Count, checked, read_json, record, signed
from lpl_jax.io.locks import writer_of
from lpl_jax.io.paths import AnyPath, entries

UNIT_RECORD = re.compile(r"latents-(\d{5,})-of-(\d{5,})\.json")


class SkippedImage(NamedTuple):
    """What a unit's record says of an image that was skipped; see `examples.Skipped`."""

    key: str
    reason: str
    tolerated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As it is listed."""
        return {"key": self.key, "reason": self.reason} | ({"tolerated": True} if self.tolerated else {})


def listed(skipped: Skipped) -> SkippedImage:
    """What the record of its unit says of an image."""
    return SkippedImage(skipped.key, skipped.reason, skipped.tolerated)


class UnitRecord(NamedTuple):
    """What is written when a unit is finished.

    Attributes:
      unit: its name. shard: its file; None where it has no record. classes: the highest label and one. skipped: images.
    """

    unit: str
    shard: Shard | None
    skipped: tuple[SkippedImage, ...]
    classes: Count = 0

    def to_dict(self) -> dict[str, Any]:
        """The object in its file."""
        skipped = [image.to_dict() for image in self.skipped]
        return signed({**self._asdict(), "shard": self.shard and self.shard._asdict(), "skipped": skipped})


class Plan(NamedTuple):
    """What a store that is being written is to become: its manifest without shards, and the names of its units."""

    manifest: Manifest
    units: tuple[str, ...]


def write_plan(folder: AnyPath, manifest: Manifest, units: Sequence[str]) -> None:
    """Writes the plan of a store into its folder."""
    write_json(folder / PLAN, signed({"manifest": manifest.to_dict(), "units": list(units)}))


def read_plan(folder: AnyPath) -> Plan | None:
    """The plan of a store that is being written in this folder; None where there is none."""
    path = folder / PLAN
    try:
        plan = record(_RawPlan, _read(path), str(path))
    except FileNotFoundError:
        return None
    return Plan(Manifest.from_dict(plan.manifest, f"{path}: manifest"), plan.units)


class _RawPlan(NamedTuple):
    manifest: dict[str, Any]
    units: tuple[str, ...]


def read_unit_records(folder: AnyPath, units: Sequence[str]) -> dict[int, UnitRecord]:
    """Unit number -> what was written when the unit was finished.

    units: the names of all units of the store.

    Raises:
      InputError: one that is damaged, or of another unit. FileNotFoundError: the store was finished meanwhile.
    """
    found = {}
    for path in entries(folder):
        if match := UNIT_RECORD.fullmatch(path.name):
            number = int(match[1])
            found[number] = record(UnitRecord, _read(path), str(path))
            shard, where = found[number].shard, f"{number:05d}-of-{len(units):05d}"
            if path.stem != f"latents-{where}" or number >= len(units) or found[number].unit != units[number]:
                raise InputError(f"{path}: it is of another store, whose units are not these {len(units)}")
            if shard and shard.file != f"{path.stem}.array_record":
                raise InputError(f"{path}: it names another shard, {shard.file}")
    return found


def _read(path: AnyPath) -> dict[str, Any]:
    """The object in a file that may be gone; raises FileNotFoundError where it is."""
    try:
        return checked(read_json(path, most=MAX_LARGE), str(path))
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise


class Report(NamedTuple):
    """What report.json says of a store that is finished."""

    seen: Count
    records: Count
    bytes: Count
    skipped: Count
    shards: tuple[Shard, ...]
    skipped_images: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """The object in report.json."""
        images = [{"unit": each.unit, **listed(each).to_dict()} for each in self.skipped_images]
        shards = [shard._asdict() for shard in self.shards]
        return signed({**self._asdict(), "shards": shards, "skipped_images": images})


def read_report(folder: AnyPath) -> Report:
    """The report of a store. Raises InputError where it is damaged."""
    path = folder / REPORT
    report = record(Report, checked(read_json(path, most=MAX_LARGE), str(path)), str(path))
    if report.skipped != len(report.skipped_images) or report.seen != report.records + report.skipped:
        raise InputError(f"{path}: it counts {report.skipped} skipped images and lists {len(report.skipped_images)}")
    return report


def shards_of(unit_records: Mapping[int, UnitRecord]) -> tuple[Shard, ...]:
    """The shards of units that are finished, in order of the units."""
    found = [unit_records[number].shard for number in sorted(unit_records)]
    return tuple(shard for shard in found if shard is not None)


def with_shards(planned: Manifest, unit_records: Mapping[int, UnitRecord]) -> Manifest:
    """A manifest that was planned, of what is there: of classes that nobody has named, as many as there are labels."""
    skipped = sum(len(record.skipped) for record in unit_records.values())
    classes = max((record.classes for record in unit_records.values()), default=0)
    if not planned.class_names and classes > MOST_CLASSES:
        raise InputError(f"{classes:,} classes: at most {MOST_CLASSES:,} that have no names are possible")
    names = planned.class_names or tuple(map(str, range(classes)))
    return dataclasses.replace(planned, shards=shards_of(unit_records), skipped=skipped, class_names=names)


def read_manifest(folder: AnyPath, *, partial: bool) -> tuple[Manifest, bool]:
    """The manifest, and whether the store is finished.

    partial: also of a store that is still being written.

    Raises:
      InputError: no store there, or one that is not finished and `partial` is not given.
    """
    if not folder.is_dir():
        raise InputError(f"latent store {folder}: no such folder; lpl prepare makes one")
    path = folder / MANIFEST
    if path.is_file():
        return Manifest.from_dict(read_json(path, most=MAX_LARGE), str(path)), True
    plan, writer = read_plan(folder), writer_of(folder)
    if writer and not (partial and plan):
        raise InputError(f"latent store {folder}: is just being written by {writer}")
    if plan is None:
        raise InputError(f"latent store {folder}: has no {MANIFEST}, so it is no store or was not finished")
    try:
        done = read_unit_records(folder, plan.units)
    except FileNotFoundError:  # the store was finished just now, and its unit records removed
        return read_manifest(folder, partial=partial)
    if not partial:
        raise InputError(
            f"latent store {folder}: is not finished, {len(done)} of its {len(plan.units)} parts are there and it has "
            f"no {MANIFEST}; the same call of lpl prepare resumes it"
        )
    return with_shards(plan.manifest, done), False
