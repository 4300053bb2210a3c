"""What a latent store says of itself: its manifest, and what stands in its place while the store is being written."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.io.locks import writer_of
from lpl_jax.io.paths import AnyPath, entries

FORMAT = 3
MANIFEST = "manifest.json"
PLAN = "plan.json"
REPORT = "report.json"
UNIT_RECORD = re.compile(r"latents-(\d{5,})-of-(\d{5,})\.json")
DTYPES = ("float16", "float32")


class Shard(NamedTuple):
    """A file of a store: its name, number of records, size in bytes, and SHA-256."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TextInfo:
    """How captions became numbers.

    Attributes:
      tokenizer, fingerprint: what it was loaded from, for people, and its identity.
      length: T, token ids of a caption, with start, end and padding.
      vocab_size: token ids are below it.
      eos: number of the token that ends a caption.
      columns: names of the caption columns.
      encoder, layer: text tower whose outputs are kept too, for people, and which of its states ("last" or
        "penultimate"); None where only token ids are kept.
      encoder_fingerprint: the tower's identity, of `text.tower_fingerprint`.
      hidden_dim, pooled_dim: widths of these outputs; 0 where there are none.
    """

    tokenizer: str
    fingerprint: str
    length: int
    vocab_size: int
    eos: int
    columns: tuple[str, ...]
    encoder: str | None = None
    layer: str | None = None
    encoder_fingerprint: str | None = None
    hidden_dim: int = 0
    pooled_dim: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a latent store holds, and its provenance.

    Attributes:
      autoencoder: name of the autoencoder, for people; `weights_hash` is its identity.
      resolution, crop: side of the encoded images in pixels, and the rule that made them square.
      dtype: type in which the moments are kept.
      source: description of the image source, for people; `source_fingerprint` is its identity.
      source_identity: that by parts, see `data.examples`; None of a store that was made before these were noted, whose
        source_fingerprint knows names alone.
      shards: the files, in order of the records.
      text: how its captions became numbers; None for a store without captions.
      skipped: images that were left out, listed in the report.
      latents_mean, latents_std: of the autoencoder, as its scaling_factor and shift_factor.
      format: `FORMAT`.
    """

    autoencoder: str
    weights_hash: str
    scaling_factor: float
    shift_factor: float
    latent_channels: int
    downsample: int
    resolution: int
    crop: str
    dtype: str
    class_names: tuple[str, ...]
    source: str
    source_fingerprint: str
    shards: tuple[Shard, ...] = ()
    flips: bool = True
    format: int = FORMAT
    text: TextInfo | None = None
    skipped: int = 0
    source_identity: Mapping[str, str] | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @property
    def num_records(self) -> int:
        """Images in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Classes of the images."""
        return len(self.class_names)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one latent."""
        side = self.resolution // self.downsample
        return (side, side, self.latent_channels)

    @property
    def record_dtype(self) -> np.dtype:
        """Layout of the fixed part of a record; key and captions (UTF-8, with zero bytes between them) follow it.

        [flip][height, width, top, left], [flip][mean, logvar] of moments, and tokens (and outputs of the text tower)
        of each caption column.
        """
        moments = ("moments", np.dtype(self.dtype).newbyteorder("<"), (2, 2, *self.latent_shape))
        return np.dtype([("label", "<i4"), ("control", "<i4", (2, 4)), moments, *self._text_fields()])

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields of `record_dtype`."""
        return self.record_dtype.names or ()

    def _text_fields(self) -> list[tuple]:
        text = self.text
        if text is None:
            return []
        columns = len(text.columns)
        fields = [
            ("tokens", "<i4", (columns, text.length)),
            ("text_hidden", "<f2", (columns, text.length, text.hidden_dim)),
            ("text_pooled", "<f2", (columns, text.pooled_dim)),
        ]
        return [field for field in fields if 0 not in field[2]]

    def to_json(self) -> str:
        """The text of manifest.json."""
        counts = {"num_records": self.num_records, "num_bytes": self.num_bytes, "num_classes": self.num_classes}
        shards = [shard._asdict() for shard in self.shards]
        fields = {**dataclasses.asdict(self), "shards": shards}
        return json.dumps({"format": self.format, **counts, **fields}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: AnyPath) -> "Manifest":
        """The inverse of `to_json`; `path` is named in errors.

        Raises:
          InputError: not JSON, another format, a field that is missing, unknown or at odds with the others.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                found = fields["format"]
                raise InputError(f"{path}: store format {found}, this version has format {FORMAT}: prepare it again")
            counts = {name: fields.pop(name) for name in ("num_records", "num_bytes", "num_classes")}
            fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
            fields["class_names"] = tuple(fields["class_names"])
            for name in ("latents_mean", "latents_std"):
                if fields.get(name) is not None:
                    fields[name] = tuple(fields[name])
            if (info := fields.get("text")) is not None:
                fields["text"] = TextInfo(**{**info, "columns": tuple(info["columns"])})
            manifest = cls(**fields)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a manifest of a latent store ({type(error).__name__}: {error})") from None
        manifest._check(counts, path)
        return manifest

    def _check(self, counts: dict[str, Any], path: AnyPath):
        for name, value in counts.items():
            if getattr(self, name) != value:
                raise InputError(f"{path}: {name}={value}, but its other fields give {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise InputError(f"{path}: dtype={self.dtype!r}; possible: {', '.join(DTYPES)}")


def read_plan(folder: AnyPath) -> tuple[Manifest, list[str]] | None:
    """The manifest, without shards, of a store that is being written in this folder, and the names of its units."""
    path = folder / PLAN
    try:
        plan = json.loads(path.read_text())
        return Manifest.from_json(json.dumps(plan["manifest"]), path), plan["units"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not the plan of a latent store ({type(error).__name__}: {error})") from None


def read_unit_records(folder: AnyPath) -> dict[int, dict[str, Any]]:
    """Unit number -> what was written when the unit was finished.

    "unit", "shard" (None: no record), "classes" (the highest label and one) and "skipped".
    """
    found = {}
    for path in entries(folder):
        if match := UNIT_RECORD.fullmatch(path.name):
            found[int(match[1])] = json.loads(path.read_text())
    return found


def shards_of(unit_records: dict[int, dict[str, Any]]) -> tuple[Shard, ...]:
    """The shards of units that are finished, in order of the units."""
    found = [unit_records[number]["shard"] for number in sorted(unit_records)]
    return tuple(Shard(**shard) for shard in found if shard is not None)


def with_shards(planned: Manifest, unit_records: dict[int, dict[str, Any]]) -> Manifest:
    """A manifest that was planned, of what is there: of classes that nobody has named, as many as there are labels."""
    skipped = sum(len(record["skipped"]) for record in unit_records.values())
    classes = max((record.get("classes", 0) for record in unit_records.values()), default=0)
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
        return Manifest.from_json(path.read_text(), path), True
    plan, writer = read_plan(folder), writer_of(folder)
    if writer and not (partial and plan):
        raise InputError(f"latent store {folder}: is just being written by {writer}")
    if plan is None:
        raise InputError(f"latent store {folder}: has no {MANIFEST}, so it is no store or was not finished")
    manifest, units = plan
    try:
        done = read_unit_records(folder)
    except FileNotFoundError:  # the store was finished just now, and its unit records removed
        return read_manifest(folder, partial=partial)
    if not partial:
        raise InputError(
            f"latent store {folder}: is not finished, {len(done)} of its {len(units)} parts are there and it has no "
            f"{MANIFEST}; the same call of lpl prepare resumes it"
        )
    return with_shards(manifest, done), False
