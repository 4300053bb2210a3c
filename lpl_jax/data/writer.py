"""Writing a latent store, unit by unit, by one host or several, so that a killed write can be resumed.

A unit (see `examples`) becomes a shard: written under a temporary name, renamed, then recorded in a file of its own
beside it. A write takes the units that have no such record. Whoever finds all units recorded writes the report and the
manifest and removes the records.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.caption_encoder import CaptionEncoder, TextOptions
from lpl_jax.data.encode import Encoded, encode
from lpl_jax.data.examples import Example, Note, Skipped, Source, is_stream, work_units
from lpl_jax.data.listing import name_text
from lpl_jax.data.manifest import MANIFEST, PLAN, REPORT, Manifest, Shard
from lpl_jax.data.parts import (
    UNIT_RECORD,
    Report,
    UnitRecord,
    listed,
    read_plan,
    read_unit_records,
    with_shards,
    write_plan,
)
from lpl_jax.data.plan import check_count, check_same, plan_store
from lpl_jax.data.reading import load_units
from lpl_jax.data.records import faults, pack
from lpl_jax.data.skips import SkipLimit, kinds_of
from lpl_jax.data.store import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import PARTIAL, upload, write_json, write_text
from lpl_jax.io.faults import naming
from lpl_jax.io.locks import LOCK, only_writer
from lpl_jax.io.paths import AnyPath, PathLike, entries, is_remote, to_path

# Shards have the number of their host in their partial names, and JSON files those of `io.atomic`.
_OURS = re.compile(
    rf"(latents-\d{{5,}}-of-\d{{5,}}\.array_record|\.?(latents-\d{{5,}}-of-\d{{5,}}\.json|{MANIFEST}|{PLAN}|{REPORT}))"
    rf"((\.[\w-]+)?{PARTIAL})?"
)


def write_store(
    path: PathLike,
    source: Source,
    autoencoder: Autoencoder,
    *,
    text: TextOptions | None = None,
    batch_size: int = 64,
    dtype: str = "float16",
    shard_records: int = 16384,
    read_threads: int = 4,
    host_index: int = 0,
    host_count: int = 1,
    max_skipped: int | float | None = None,
    on_progress: Callable[[int], None] = lambda images: None,
    on_skipped: Callable[[Skipped], None] = lambda skipped: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> LatentStore:
    """Encodes every image of `source` into a latent store in the folder `path`, which may be remote, and opens it.

    A folder that already holds the complete store of the same source, crop and autoencoder is opened as it is; one that
    was begun is resumed, unit by unit. With several hosts each writes its part of the units into the same
    folder, and the one that is ready last completes the store; for the others the store that is returned is not
    `finished`.

    Args:
      text: how the captions of a source that has them are kept; None takes the defaults of `TextOptions`.
      batch_size: images encoded at once, over all local devices.
      dtype: "float16" (relative error 2^-11 per value, half the size) or "float32".
      shard_records: images per file, the last one excepted; a webdataset makes one file of each tar file.
      host_index, host_count: this host takes the units whose number leaves this remainder.
      max_skipped: images that may be skipped because they cannot be read or have no caption: a number, or a share
        of all (0.01, a float). None is 0 for sources of known length, 0.01 for streams.
      on_progress: called with 0 before the first image is read, when all else is found in order, and then with the
        number of images of each batch that is encoded; not called for a store that is opened as it is.
      on_skipped: called with each image that is skipped.
      on_note: called with what a source has to tell besides.

    What `inspect.verify` would find fault with is skipped and listed: the rule is `records.faults`.

    Nobody but the other hosts writes into the folder meanwhile: see `io.locks`.

    Raises:
      InputError: `path` holds another store or other files or is in use, the source has no image or more than
        `max_skipped` that cannot be used, or the resolution does not fit the autoencoder.
    """
    if batch_size < 1 or shard_records < 1:
        raise InputError(f"batch_size={batch_size}, shard_records={shard_records}: must be positive")
    if not 0 <= host_index < host_count:
        raise InputError(f"host_index={host_index} of host_count={host_count}: possible are 0 to host_count - 1")
    limit = SkipLimit(max_skipped if max_skipped is not None else 0.01 if is_stream(source) else 0)
    folder = to_path(path, "a latent store", remote=True)
    with only_writer(folder, host_index if host_count > 1 else None):
        captions = CaptionEncoder(text or TextOptions(), source.caption_columns) if source.caption_columns else None
        planned = plan_store(source, autoencoder, dtype, captions)
        if (folder / MANIFEST).is_file():
            store = LatentStore(folder)
            check_same(folder, store.manifest, planned)
            check_count(store, source)
            if (folder / PLAN).exists():  # whoever wrote the manifest was killed before all was removed
                _remove_plan(folder)
            return store
        if not is_stream(source):
            limit.foresee(source.unusable, len(source))
        units = work_units(source, shard_records)
        names = [unit.name for unit in units]
        _begin(folder, planned, names, host_index, host_count)
        done = read_unit_records(folder, names)
        limit.add(done)
        mine = [(number, units[number]) for number in range(host_index, len(units), host_count) if number not in done]
        on_progress(0)
        shards = _Shards(folder, planned, names, captions, host_index)
        loading = load_units(mine, threads=read_threads, ahead=max(batch_size, read_threads))
        with _tidied(folder, shards, alone=host_count == 1), contextlib.closing(loading) as loaded:
            for encoded in encode(loaded, autoencoder, batch_size=batch_size, dtype=dtype):
                _write(encoded, shards, limit, _Told(on_progress, on_skipped, on_note))
        return _finish(folder, planned, names, limit, source)


@contextlib.contextmanager
def _tidied(folder: AnyPath, shards: "_Shards", *, alone: bool) -> Iterator[None]:
    """Where the block fails, nothing is left but the units that are finished."""
    try:
        yield
    except BaseException:
        shards.close()
        if alone and not read_unit_records(folder, shards.units):  # the plan of nothing serves nobody
            _remove([folder / PLAN])
        raise


class _Told(NamedTuple):
    """Whom to tell what: see `write_store`."""

    progress: Callable[[int], None]
    skipped: Callable[[Skipped], None]
    note: Callable[[str], None]


def _write(encoded: Encoded, shards: "_Shards", limit: SkipLimit, told: _Told) -> None:
    """Hands what was encoded to the shards of its units."""
    examples = encoded.examples
    rows = iter(shards.rows(examples, encoded.moments) if examples else ())
    for unit, item in encoded.loaded:
        if isinstance(item, Note):
            told.note(item.text)
            continue
        if isinstance(item, Example):
            fault = shards.add(unit, item, next(rows))
            if fault is None:
                limit.seen += 1
                continue
            item = Skipped(item.key, shards.units[unit], f"{item.key}: {fault}")
        if isinstance(item, Skipped):
            item = item._replace(key=name_text(item.key), reason=name_text(item.reason))
            shards.skip(item)
            limit.skip(item)
            told.skipped(item)
        else:
            shards.finish(unit)
    if examples:
        told.progress(len(examples))


class _Shards:
    """The shard that is being written, and how records are laid out.

    Units come one after the other. A unit without records makes no file, but is recorded.
    """

    def __init__(
        self, folder: AnyPath, manifest: Manifest, units: Sequence[str], captions: CaptionEncoder | None, host: int
    ):
        self._folder, self._manifest, self.units = folder, manifest, units
        self._captions, self._suffix = captions, _suffix(host)
        # ArrayRecord writes local files only: a shard of a remote store is uploaded when it is complete.
        if is_remote(folder):
            self._scratch = tempfile.TemporaryDirectory()
            self._local = Path(self._scratch.name)
        else:
            self._local = folder
        self._writer: Any = None  # an ArrayRecordWriter, which has no types
        self._begin()

    def _begin(self) -> None:
        self._records, self._classes = 0, 0
        self._skipped: list[Skipped] = []
        self._keys: set[str] = set()

    def rows(self, examples: list[Example], moments: np.ndarray) -> np.ndarray:
        """The fixed parts (B,) of the records of some examples."""
        fixed = np.zeros(len(examples), self._manifest.record_dtype)
        fixed["label"] = [example.label for example in examples]
        fixed["control"] = [example.control for example in examples]
        fixed["moments"] = moments
        if self._captions is not None:
            for name, values in self._captions([example.captions for example in examples]).items():
                fixed[name] = values
        return fixed

    def add(self, unit: int, example: Example, row: np.void) -> str | None:
        """Writes a record, or says why it would be none."""
        key = name_text(example.key)
        for _, fault in faults(self._manifest, row, key, example.captions):
            return fault
        if key in self._keys:  # across units, keys differ because the source makes them so
            return "another image has this name"
        self._keys.add(key)
        with naming(self._partial(unit)):
            if self._writer is None:
                # One record per chunk for random access; half-precision noise does not compress.
                self._writer = ArrayRecordWriter(str(self._partial(unit)), "group_size:1,uncompressed")
            self._writer.write(pack(row, key, example.captions))
        self._records += 1
        self._classes = max(self._classes, int(row["label"]) + 1)
        return None

    def skip(self, skipped: Skipped) -> None:
        self._skipped.append(skipped)

    def finish(self, unit: int) -> None:
        """Gives the shard its name, and records the unit."""
        shard = None
        if self._writer is not None:
            with naming(self._partial(unit)):
                self._writer.close()
            self._writer = None
            shard = _publish(self._partial(unit), self._folder / self._name(unit), self._records)
        record = UnitRecord(self.units[unit], shard, tuple(map(listed, self._skipped)), self._classes)
        write_json(self._folder / self._name(unit).replace(".array_record", ".json"), record.to_dict())
        self._begin()

    def close(self) -> None:
        """Removes what was written of a unit that is not finished."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # on a full disk it cannot be closed; it is removed anyway
                self._writer.close()
            self._writer = None
            _remove(file for file in entries(self._folder) if file.name.endswith(self._suffix))

    def _name(self, unit: int) -> str:
        return f"latents-{unit:05d}-of-{len(self.units):05d}.array_record"

    def _partial(self, unit: int) -> Path:
        return self._local / (self._name(unit) + self._suffix)


def _suffix(host: int) -> str:
    return f".{host}{PARTIAL}"


def _publish(partial: Path, path: AnyPath, records: int) -> Shard:
    with partial.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = partial.stat().st_size
    if is_remote(path):
        upload(partial, path)
        partial.unlink()
    else:
        partial.replace(path)
    return Shard(path.name, records, size, sha256)


def _begin(folder: AnyPath, planned: Manifest, units: list[str], host: int, host_count: int):
    """Makes the folder with its plan, or checks that the plan it has is this one; removes what a killed write left."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [file.name for file in _files(folder) if not _OURS.fullmatch(file.name)]
    if foreign:
        raise InputError(f"{folder} holds other files ({foreign[0]}); give a new or empty folder for the latent store")
    begun = read_plan(folder)
    if begun is None:
        if host_count == 1:  # else they may be another host's, that was faster
            _remove(_files(folder))
        write_plan(folder, planned, units)
        return
    check_same(folder, begun.manifest, planned)
    if list(begun.units) != units:
        raise InputError(
            f"{folder} was begun with {len(begun.units)} parts, not these {len(units)}: give the same shard_records, "
            "or delete it"
        )
    suffix = PARTIAL if host_count == 1 else _suffix(host)
    _remove(file for file in entries(folder) if file.name.endswith(suffix))


def _files(folder: AnyPath) -> list[AnyPath]:
    """What is in the folder of a store, but for its locks."""
    return [file for file in entries(folder) if not file.name.startswith(LOCK)]


def _remove(files):
    for file in files:
        file.unlink(missing_ok=True)


def _finish(folder: AnyPath, planned: Manifest, units: Sequence[str], limit: SkipLimit, source: Source) -> LatentStore:
    """Completes the store where all its units are recorded."""
    try:
        done = read_unit_records(folder, units)
        if len(done) < len(units):
            return LatentStore(folder, partial=True)
        total = SkipLimit(limit.most)
        total.add(done)
        total.check(final=True)
        manifest, skipped = with_shards(planned, done), total.skipped
        if not manifest.shards:
            kinds = "".join(f"; {kind}" for kind in kinds_of(skipped))
            _remove_plan(folder)  # or it would refuse the corrected call
            raise InputError(f"{source.description}: nothing to encode, {len(skipped)} images were skipped{kinds}")
        counts = manifest.num_records, manifest.num_bytes, len(skipped)
        report = Report(manifest.num_records + len(skipped), *counts, manifest.shards, tuple(skipped))
        write_json(folder / REPORT, report.to_dict())
        write_text(folder / MANIFEST, manifest.to_json())
    except FileNotFoundError:  # another host was as far, and has removed the records
        return LatentStore(folder)
    _remove_plan(folder)
    return LatentStore(folder)


def _remove_plan(folder: AnyPath) -> None:
    """Of a store that is finished, or that would hold nothing; the plan last, as it says that there may be more."""
    _remove([*(file for file in entries(folder) if UNIT_RECORD.fullmatch(file.name)), folder / PLAN])
