"""The latent store: a folder of ArrayRecord shards and a manifest that says what is in them.

    DIR/manifest.json                         the `Manifest`; written last, so that a folder without it is no store
    DIR/latents-00000-of-00002.array_record   one record per image: fixed layout (`Manifest.record_dtype`), then key
    DIR/latents-00001-of-00002.array_record

The moments are raw (unscaled) posterior mean and log-variance of the image and of its mirror image. Stores of format 1,
which lack the original size and place of each crop, are still read.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from lpl_jax.autoencoders import Autoencoder, weights_hash
from lpl_jax.errors import InputError

FORMAT = 2
FORMATS = (1, 2)  # that can be read
MANIFEST = "manifest.json"
DTYPES = ("float16", "float32")


class Shard(NamedTuple):
    """A file of a store: its name, number of records and size in bytes."""

    file: str
    records: int
    bytes: int


class Record(NamedTuple):
    """An image of a store: mean and logvar (2, h, w, C), raw, [as is, mirrored]; class; name in the source.

    control: int32 (2, 4), [as is, mirrored] x [height and width of the original image, top and left of the crop], in
    pixels, as `Crop.with_control` counts them; None in a store of format 1.
    """

    mean: np.ndarray
    logvar: np.ndarray
    label: int
    key: str
    control: np.ndarray | None


@dataclass(frozen=True)
class Manifest:
    """What a latent store holds and how it was made.

    Attributes:
      autoencoder: name of the autoencoder, for people; `weights_hash` is its identity.
      resolution, crop: side of the encoded images in pixels, and the rule that made them square.
      dtype: type in which the moments are kept.
      source: description of the image source, for people; `source_fingerprint` is its identity.
      shards: the files, in order of the records.
      format: 2, or 1 for a store made before records had `control`.
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

    @property
    def num_records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one latent."""
        side = self.resolution // self.downsample
        return (side, side, self.latent_channels)

    @property
    def record_dtype(self) -> np.dtype:
        """Layout of the fixed part of a record: [flip][height, width, top, left] and [flip][mean, logvar] of moments.

        The key (UTF-8) follows it.
        """
        control = [("control", "<i4", (2, 4))] if self.has_control else []
        moments = ("moments", np.dtype(self.dtype).newbyteorder("<"), (2, 2, *self.latent_shape))
        return np.dtype([("label", "<i4"), *control, moments])

    @property
    def has_control(self) -> bool:
        """Whether records tell the original size and the place of the crop."""
        return self.format >= 2

    def to_json(self) -> str:
        counts = {"num_records": self.num_records, "num_bytes": self.num_bytes, "num_classes": self.num_classes}
        shards = [shard._asdict() for shard in self.shards]
        fields = {**dataclasses.asdict(self), "shards": shards}
        return json.dumps({"format": self.format, **counts, **fields}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Manifest":
        """The inverse of `to_json`; `path` is named in errors.

        Raises:
          InputError: not JSON, another format, a field that is missing, unknown or at odds with the others.
        """
        try:
            fields = json.loads(text)
            if fields["format"] not in FORMATS:
                known = " and ".join(map(str, FORMATS))
                raise InputError(f"{path}: store format {fields['format']}; this version reads formats {known}")
            counts = {name: fields.pop(name) for name in ("num_records", "num_bytes", "num_classes")}
            fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
            fields["class_names"] = tuple(fields["class_names"])
            manifest = cls(**fields)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a manifest of a latent store ({type(error).__name__}: {error})") from None
        manifest._check(counts, path)
        return manifest

    def _check(self, counts: dict[str, Any], path: Path):
        for name, value in counts.items():
            if getattr(self, name) != value:
                raise InputError(f"{path}: {name}={value}, but its other fields give {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise InputError(f"{path}: dtype={self.dtype!r}; possible: {', '.join(DTYPES)}")


class LatentStore:
    """A latent store, opened for random access; it can be pickled, and read from several threads.

    Raises:
      InputError: no such folder, no manifest (not a store, or not finished), a shard that is missing or cut short; on
        access, a record whose bytes were changed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        for shard in self.manifest.shards:
            _check_shard(self.path / shard.file, shard)
        self._dtype = self.manifest.record_dtype
        # The counts are given, so that no shard has to be opened before a record of it is wanted.
        self._records = ArrayRecordDataSource(
            [f"{self.path / shard.file}[0:{shard.records}]" for shard in self.manifest.shards]
        )

    def __len__(self) -> int:
        return self.manifest.num_records

    def __getitem__(self, index: int) -> Record:
        """Record `index`; the arrays are views of the bytes read, in the store's own type."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a store of {len(self)}")
        try:
            data = self._records[index]
        except RuntimeError as error:  # ArrayRecord checks a hash of every chunk that it reads
            raise InputError(f"latent store {self.path}: record {index} cannot be read ({error})") from None
        fixed = np.frombuffer(data, self._dtype, count=1)[0]
        moments, key = fixed["moments"], data[self._dtype.itemsize :].decode()
        control = fixed["control"] if self.manifest.has_control else None
        return Record(moments[:, 0], moments[:, 1], int(fixed["label"]), key, control)

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names


def check_autoencoder(store: LatentStore, autoencoder: Autoencoder) -> None:
    """Raises an InputError that names both autoencoders unless the store was made with this one."""
    manifest, config = store.manifest, autoencoder.config
    made_with, given = manifest.weights_hash, weights_hash(autoencoder)
    if made_with != given:
        raise InputError(
            f"latent store {store.path} was made with autoencoder {manifest.autoencoder} (weights {made_with[:12]}), "
            f"not with {config.name} (weights {given[:12]}); prepare a store for {config.name} or configure the other"
        )
    for field in ("scaling_factor", "shift_factor"):
        if getattr(manifest, field) != getattr(config, field):
            raise InputError(
                f"latent store {store.path} was made with {field}={getattr(manifest, field)} of autoencoder "
                f"{manifest.autoencoder}, but {config.name} now has {field}={getattr(config, field)}"
            )


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise InputError(f"latent store {folder}: no such folder; python -m lpl_jax.tools.prepare makes one")
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"latent store {folder}: has no {MANIFEST}, so it is no store or was not finished")
    return Manifest.from_json(path.read_text(), path)


def _check_shard(path: Path, shard: Shard):
    if not path.is_file():
        raise InputError(f"latent store {path.parent}: shard {path.name} is missing")
    size = path.stat().st_size
    if size != shard.bytes:
        raise InputError(
            f"latent store {path.parent}: shard {path.name} has {size} bytes instead of {shard.bytes}; "
            "it was cut short or changed, prepare the store again"
        )
