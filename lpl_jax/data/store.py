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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.manifest import Shard
from lpl_jax.data.parts import read_manifest
from lpl_jax.data.records import unpack
from lpl_jax.errors import InputError
from lpl_jax.io.copies import local_copy
from lpl_jax.io.fingerprints import fingerprint, fingerprint_texts, fingerprint_values
from lpl_jax.io.paths import AnyPath, PathLike, is_remote, size_of, to_path
from lpl_jax.io.progress import progress_bar


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
        self.manifest, self.finished = read_manifest(self.path, partial=partial)
        self.check_files()
        self._dtype, self._fields = self.manifest.record_dtype, self.manifest.field_names
        self._shards = [_Records(self.path / shard.file, shard.records) for shard in self.manifest.shards]
        *self._starts, _ = itertools.accumulate((shard.records for shard in self.manifest.shards), initial=0)

    def check_files(self) -> None:
        """Raises an InputError where a shard is missing, or has another size than the manifest says.

        A file that is open is read on when it is removed, and what was read ahead when it is cut short: whoever reads
        for weeks asks from time to time.
        """
        for shard in self.manifest.shards:
            _check_shard(self.path / shard.file, shard)

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
        found, size = [], self._dtype.itemsize
        for index in indices:
            number = bisect.bisect_right(self._starts, index) - 1
            try:
                data = self._shards[number].source[index - self._starts[number]]
            except InputError:
                raise
            except Exception as error:  # ArrayRecord checks a hash of every chunk; each layer of it has other errors
                raise self._unreadable(index, str(error)) from None
            if len(data) < size:
                raise self._unreadable(index, f"it has {len(data)} of {size} bytes or more; was its file cut short?")
            found.append(data)
        return found

    def _unreadable(self, index: int, reason: str) -> InputError:
        shown = " ".join(reason.split())[:200]
        return InputError(f"latent store {self.path}: record {index} cannot be read ({self.shard_of(index)}: {shown})")

    def shard_of(self, index: int) -> str:
        """Name of the file that holds a record."""
        return self.manifest.shards[bisect.bisect_right(self._starts, index) - 1].file

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
        """The bytes of records by their number in the shard. Raises InputError unless it has as many as are said."""
        source = ArrayRecordDataSource(str(local_copy(self._path)))
        if len(source) != self._count:
            raise InputError(f"{self._path} has {len(source)} records, not the {self._count} that the store says")
        return source


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


def _check_shard(path: AnyPath, shard: Shard):
    if not path.is_file():
        raise InputError(f"latent store {path.parent}: shard {path.name} is missing")
    size = size_of(path)
    if size != shard.bytes:
        raise InputError(
            f"latent store {path.parent}: shard {path.name} has {size} bytes instead of {shard.bytes}; "
            "it was cut short or changed, prepare the store again"
        )
