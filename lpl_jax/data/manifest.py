"""What a latent store says of itself: its manifest."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.fields import above, one_of, whole
from lpl_jax.io.jsons import Count, Digest, FileName, checked, record, signed

FORMAT = 3
MANIFEST = "manifest.json"
PLAN = "plan.json"
REPORT = "report.json"
DTYPES = ("float16", "float32")
MAX_RECORD = 2**30  # bytes: a latent of 4096 x 4096 with four channels
MAX_COLUMNS = 64  # of captions

Positive: TypeAlias = Annotated[int, whole(1, 2**63 - 1)]
Side: TypeAlias = Annotated[int, whole(1, 2**16)]  # pixels, or tokens
Width: TypeAlias = Annotated[int, whole(0, 2**16)]  # of states of a text tower


class Shard(NamedTuple):
    """A file of a store: its name, number of records, size in bytes, and SHA-256."""

    file: FileName
    records: Positive
    bytes: Count
    sha256: Digest


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
    length: Side
    vocab_size: Annotated[int, whole(1, 2**31 - 1)]
    eos: Count
    columns: tuple[str, ...]
    encoder: str | None = None
    layer: str | None = None
    encoder_fingerprint: str | None = None
    hidden_dim: Width = 0
    pooled_dim: Width = 0


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
    scaling_factor: Annotated[float, above(0, 1e30)]
    shift_factor: float
    latent_channels: Annotated[int, whole(1, 2**12)]
    downsample: Side
    resolution: Side
    crop: str
    dtype: Annotated[str, one_of(*DTYPES)]
    class_names: tuple[str, ...]
    source: str
    source_fingerprint: str
    shards: tuple[Shard, ...] = ()
    flips: Literal[True] = True
    format: int = FORMAT
    text: TextInfo | None = None
    skipped: Count = 0
    source_identity: Mapping[str, str] | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[Annotated[float, above(0, 1e30)], ...] | None = None

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
    def record_bytes(self) -> int:
        """Bytes of the fixed part of a record."""
        text, numbers = self.text, 4 * math.prod(self.latent_shape)
        size = 4 * (1 + 2 * 4) + numbers * (2 if self.dtype == "float16" else 4)
        if text is None:
            return size
        return size + len(text.columns) * (text.length * (4 + 2 * text.hidden_dim) + 2 * text.pooled_dim)

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

    def to_dict(self) -> dict[str, Any]:
        """The object in manifest.json: the fields, what follows from them, and a checksum of all."""
        counts = {name: getattr(self, name) for name in COUNTS}
        shards = [shard._asdict() for shard in self.shards]
        fields = {**dataclasses.asdict(self), "shards": shards}
        return signed({"format": self.format, **counts, **fields})

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> "Manifest":
        """The inverse of `to_dict`; `where` it was read is named in errors.

        Raises:
          InputError: another format, a checksum of something else, a field that is missing, unknown, or cannot be.
        """
        if not isinstance(raw, dict) or "format" not in raw:
            raise InputError(f"{where}: not a manifest of a latent store")
        if raw["format"] != FORMAT:
            found = str(raw["format"])[:20]
            raise InputError(f"{where}: store format {found}, this version has format {FORMAT}: prepare it again")
        fields = checked(raw, where)
        counts = record(_Counts, {name: fields.pop(name) for name in COUNTS if name in fields}, where)
        manifest = record(cls, fields, where)
        if problem := next(manifest._problems(counts), None):
            raise InputError(f"{where}: {problem}")
        return manifest

    def _problems(self, counts: "_Counts") -> Iterator[str]:
        """What the fields contradict each other in."""
        for name, value in counts._asdict().items():
            if getattr(self, name) != value:
                yield f"{name}={value}, but its other fields give {getattr(self, name)}"
        if self.resolution % self.downsample:
            yield f"resolution={self.resolution} is no multiple of downsample={self.downsample}"
        if (self.latents_mean is None) != (self.latents_std is None):
            yield "latents_mean without latents_std, or the other way round"
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name) or ()) not in (0, self.latent_channels):
                yield f"{name} has {len(getattr(self, name))} numbers for {self.latent_channels} channels"
        names = [shard.file for shard in self.shards]
        if len(set(names)) < len(names) or set(names) & {MANIFEST, PLAN, REPORT}:
            yield "a shard is named twice, or is a file of another kind"
        yield from self._text_problems()
        if (size := self.record_bytes) > MAX_RECORD:
            yield f"records of {size:,} bytes: at most {MAX_RECORD:,} are possible"
        elif small := next((shard for shard in self.shards if shard.bytes < shard.records * size), None):
            yield f"shard {small.file} has {small.bytes} bytes, too few for {small.records} records of {size}"

    def _text_problems(self) -> Iterator[str]:
        text = self.text
        if text is None:
            return
        if not text.columns or len(set(text.columns)) < len(text.columns) or len(text.columns) > MAX_COLUMNS:
            yield f"text.columns are {len(text.columns)}, or one is named twice: 1 to {MAX_COLUMNS} are possible"
        if text.eos >= text.vocab_size:
            yield f"text.eos={text.eos} is not below text.vocab_size={text.vocab_size}"


class _Counts(NamedTuple):
    """What a manifest says besides its fields, though it follows from them."""

    num_records: int
    num_bytes: int
    num_classes: int


COUNTS = _Counts._fields
