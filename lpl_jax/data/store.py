"""The latent store: a folder of ArrayRecord shards and a manifest that says what is in them.

    DIR/manifest.json                         the `Manifest`; written last, so that a folder without it is not finished
    DIR/latents-00000-of-00002.array_record   one record per image: fixed layout (`Manifest.record_dtype`), then key
    DIR/latents-00001-of-00002.array_record   and captions
    DIR/report.json                           what was skipped, and a checksum of each shard

While a store is being written (see `writer`), `plan.json` stands in place of the manifest, and `latents-*.json` beside
each shard that is finished: `LatentStore(path, partial=True)` reads these.

The moments are raw (unscaled) posterior mean and log-variance of the image and of its mirror image. There is one
format, number 3; an older store is prepared again.

The folder may be remote (gs://, s3://). ArrayRecord reads local files only: a shard is copied to this machine when a
record of it is first wanted, or with all others by `LatentStore.fetch`.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.records import unpack
from lpl_jax.errors import InputError
from lpl_jax.io.copies import local_copy
from lpl_jax.io.fingerprints import fingerprint, fingerprint_texts, fingerprint_values
from lpl_jax.io.locks import writer_of
from lpl_jax.io.paths import AnyPath, PathLike, entries, is_remote, size_of, to_path
from lpl_jax.io.progress import progress_bar

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


class Record(NamedTuple):
    """An image of a store: mean and logvar (2, h, w, C), raw, [as is, mirrored]; class; name in the source.

    control: int32 (2, 4), [as is, mirrored] x [height and width of the original image, top and left of the crop], in
    pixels, as `Crop.with_control` counts them.
    captions, tokens: the text of each column, and its int32 (columns, T) numbers; () and None in a store without text.
    text_hidden, text_pooled: float16 (columns, T, D) and (columns, D'): outputs of the text tower; None without.
    """

    mean: np.ndarray
    logvar: np.ndarray
    label: int
    key: str
    control: np.ndarray
    captions: tuple[str, ...] = ()
    tokens: np.ndarray | None = None
    text_hidden: np.ndarray | None = None
    text_pooled: np.ndarray | None = None


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


class StoreIdentity(NamedTuple):
    """What a store is, wherever it lies; see `same_images`.

    records: fingerprint of its shards. images: of what they were made from and how, which a store that is still being
    written has from the beginning; None where that is not known by more than names. finished: as of the store. source:
    for people.
    """

    records: str
    images: str | None
    finished: bool
    source: str

    def same_images(self, other: "StoreIdentity") -> bool:
        """Whether the other one holds the same records, or was made, or is being made, of the same images alike."""
        return self.records == other.records or (self.images is not None and self.images == other.images)


class LatentStore:
    """A latent store, opened for random access; it can be pickled, and read from several threads.

    Args:
      path: its folder, which may be remote.
      partial: also open one that is still being written: the shards finished so far. `finished` tells which it is.

    Raises:
      InputError: no such folder, no manifest (not a store, or not finished), a shard that is missing or cut short; on
        access, a record whose bytes were changed.
    """

    def __init__(self, path: PathLike, *, partial: bool = False):
        self.path = to_path(path, "a latent store", remote=True)
        self.manifest, self.finished = _read_manifest(self.path, partial)
        for shard in self.manifest.shards:
            _check_shard(self.path / shard.file, shard)
        self._dtype, self._fields = self.manifest.record_dtype, self.manifest.field_names
        self._shards = [_Records(self.path / shard.file, shard.records) for shard in self.manifest.shards]
        *self._starts, _ = itertools.accumulate((shard.records for shard in self.manifest.shards), initial=0)

    def __len__(self) -> int:
        return self.manifest.num_records

    def __getitem__(self, index: int) -> Record:
        """Record `index`; the arrays are views of the bytes read, in the store's own type."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a store of {len(self)}")
        (data,) = self.read([index])
        fixed, key, captions = unpack(data, self._dtype, "surrogateescape")
        moments = fixed["moments"]

        def given(name: str) -> np.ndarray | None:
            return fixed[name] if name in self._fields else None

        text = given("tokens"), given("text_hidden"), given("text_pooled")
        return Record(moments[:, 0], moments[:, 1], int(fixed["label"]), key, fixed["control"], captions, *text)

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The bytes of records: first `record_dtype`, then key and captions."""
        found = []
        try:
            for index in indices:
                number = bisect.bisect_right(self._starts, index) - 1
                found.append(self._shards[number].source[index - self._starts[number]])
        except RuntimeError as error:  # ArrayRecord checks a hash of every chunk that it reads
            number = indices[len(found)]
            raise InputError(f"latent store {self.path}: record {number} cannot be read ({error})") from None
        return found

    def fetch(self) -> None:
        """Copies a remote store's shards to this machine, those that are not here yet, several at a time."""
        if is_remote(self.path):
            with ThreadPoolExecutor(8) as pool:
                copies = pool.map(lambda shard: shard.source, self._shards)
                list(progress_bar(copies, f"copy {self.path}", len(self._shards), leave=False, unit="shard"))

    def fixed(self, indices: Sequence[int]) -> np.ndarray:
        """The fixed parts of B records: (B,) of `Manifest.record_dtype`."""
        size = self._dtype.itemsize
        return np.frombuffer(b"".join([data[:size] for data in self.read(indices)]), self._dtype)

    @property
    def identity(self) -> StoreIdentity:
        """Of the records and of the images, not of the place."""
        manifest = self.manifest
        records = fingerprint_texts(str(self._dtype), *(f"{shard.records} {shard.sha256}" for shard in manifest.shards))
        text = manifest.text and dataclasses.asdict(dataclasses.replace(manifest.text, tokenizer="", encoder=None))
        made = {"source": manifest.source_fingerprint, "text": text}
        made |= {name: getattr(manifest, name) for name in ("weights_hash", "resolution", "crop", "dtype")}
        images = None if manifest.source_identity is None else fingerprint_values(made)
        return StoreIdentity(records, images, self.finished, manifest.source)

    @property
    def num_classes(self) -> int:
        """Classes of the images."""
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.manifest.class_names


class _Records:
    """The records of a shard, opened when the first one is wanted: until then it is no open file, and not copied."""

    def __init__(self, path: AnyPath, count: int):
        self._path, self._count = path, count

    @functools.cached_property
    def source(self) -> ArrayRecordDataSource:
        """The bytes of records by their number in the shard."""
        return ArrayRecordDataSource(f"{local_copy(self._path)}[0:{self._count}]")


def check_autoencoder(store: LatentStore, autoencoder: Autoencoder) -> None:
    """Raises an InputError that names both autoencoders unless the store was made with this one."""
    manifest, config = store.manifest, autoencoder.config
    made_with, given = manifest.weights_hash, fingerprint(autoencoder.params)
    if made_with != given:
        raise InputError(
            f"latent store {store.path} was made with autoencoder {manifest.autoencoder} (weights {made_with[:12]}), "
            f"not with {config.name} (weights {given[:12]}); prepare a store for {config.name} or configure the other"
        )
    for field in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if getattr(manifest, field) != getattr(config, field):
            raise InputError(
                f"latent store {store.path} was made with {field}={getattr(manifest, field)} of autoencoder "
                f"{manifest.autoencoder}, but {config.name} now has {field}={getattr(config, field)}"
            )


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


def _read_manifest(folder: AnyPath, partial: bool) -> tuple[Manifest, bool]:
    """The manifest, and whether the store is finished."""
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
        return _read_manifest(folder, partial)
    if not partial:
        raise InputError(
            f"latent store {folder}: is not finished, {len(done)} of its {len(units)} parts are there and it has no "
            f"{MANIFEST}; the same call of lpl prepare resumes it"
        )
    return with_shards(manifest, done), False


def _check_shard(path: AnyPath, shard: Shard):
    if not path.is_file():
        raise InputError(f"latent store {path.parent}: shard {path.name} is missing")
    size = size_of(path)
    if size != shard.bytes:
        raise InputError(
            f"latent store {path.parent}: shard {path.name} has {size} bytes instead of {shard.bytes}; "
            "it was cut short or changed, prepare the store again"
        )
