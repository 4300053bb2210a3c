"""Writing a latent store: shards under temporary names, the manifest last."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lpl_jax.autoencoders import Autoencoder, weights_hash
from lpl_jax.data.encode import encode_source
from lpl_jax.data.sources import Example, ImageSource
from lpl_jax.data.store import DTYPES, MANIFEST, LatentStore, Manifest, Shard
from lpl_jax.errors import InputError

PARTIAL = ".partial"
_OURS = re.compile(rf"latents-\d{{5}}-of-\d{{5}}\.array_record({PARTIAL})?|{MANIFEST}{PARTIAL}")


def write_store(
    path: str | Path,
    source: ImageSource,
    autoencoder: Autoencoder,
    *,
    batch_size: int = 64,
    dtype: str = "float16",
    shard_records: int = 16384,
    read_threads: int = 4,
    on_progress: Callable[[int], None] = lambda images: None,
) -> LatentStore:
    """Encodes every image of `source` into a new latent store in the folder `path`, and opens it.

    A folder that already holds the complete store of the same source, crop and autoencoder is opened as it is; what an
    killed write left is replaced. A write that fails removes its files.

    Args:
      batch_size: images encoded at once, over all local devices.
      dtype: "float16" (relative error 2^-11 per value, half the size) or "float32".
      shard_records: images per file, the last one excepted.
      on_progress: called with 0 before the first image is read, when all else is found in order, and then with the
        number of images of each batch that is encoded; not called for a store that is opened as it is.

    Raises:
      InputError: `path` holds another store or other files, the source has no image or one that cannot be read, or the
        resolution does not fit the autoencoder.
    """
    folder = Path(path)
    planned = _plan(source, autoencoder, dtype)
    if batch_size < 1 or shard_records < 1:
        raise InputError(f"batch_size={batch_size}, shard_records={shard_records}: must be positive")
    if (folder / MANIFEST).is_file():
        store = LatentStore(folder)
        _check_same(store, planned, len(source))
        return store
    _clear(folder)
    on_progress(0)
    batches = encode_source(source, autoencoder, batch_size=batch_size, dtype=dtype, read_threads=read_threads)
    records = _records(batches, planned.record_dtype, on_progress)
    counts = [min(shard_records, len(source) - start) for start in range(0, len(source), shard_records)]
    try:
        shards = tuple(_write_shard(folder, index, len(counts), count, records) for index, count in enumerate(counts))
        _write_manifest(folder, replace(planned, shards=shards))
    except BaseException:  # Ctrl-C too: without a manifest nothing can be done with the shards
        _remove_files(folder)
        raise
    return LatentStore(folder)


def _plan(source: ImageSource, autoencoder: Autoencoder, dtype: str) -> Manifest:
    """The manifest of the store to be written, without its shards."""
    config, resolution = autoencoder.config, source.crop.resolution
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}; possible: {', '.join(DTYPES)}")
    if resolution % config.downsample:
        raise InputError(
            f"resolution={resolution}: autoencoder {config.name} needs a multiple of {config.downsample} pixels"
        )
    if not len(source):
        raise InputError(f"{source.description}: nothing to encode")
    return Manifest(
        autoencoder=config.name,
        weights_hash=weights_hash(autoencoder),
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor,
        latent_channels=config.latent_channels,
        downsample=config.downsample,
        resolution=resolution,
        crop=str(source.crop),
        dtype=dtype,
        class_names=tuple(source.class_names),
        source=source.description,
        source_fingerprint=source.fingerprint,
    )


def _check_same(store: LatentStore, planned: Manifest, num_records: int):
    """Raises an InputError unless the store holds what is planned; names and shard sizes may differ."""
    found = store.manifest
    differences = [
        (what, have, want)
        for what, have, want, same in (
            ("autoencoder", found.autoencoder, planned.autoencoder, found.weights_hash == planned.weights_hash),
            ("resolution", found.resolution, planned.resolution, found.resolution == planned.resolution),
            ("crop", found.crop, planned.crop, found.crop == planned.crop),
            ("dtype", found.dtype, planned.dtype, found.dtype == planned.dtype),
            ("source", found.source, planned.source, found.source_fingerprint == planned.source_fingerprint),
            ("number of images", len(store), num_records, len(store) == num_records),
        )
        if not same
    ]
    if differences:
        what, have, want = differences[0]
        raise InputError(
            f"{store.path} already holds another latent store ({what} {have}, not {want}); "
            "give another folder or delete this one"
        )


def _clear(folder: Path):
    """Makes the folder, and removes what an unfinished write left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [file.name for file in folder.iterdir() if not _OURS.fullmatch(file.name)]
    if foreign:
        raise InputError(f"{folder} holds other files ({foreign[0]}); give a new or empty folder for the latent store")
    _remove_files(folder)


def _remove_files(folder: Path):
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name):
            file.unlink()


def _records(batches: Iterator[tuple[list[Example], np.ndarray]], dtype: np.dtype, on_progress) -> Iterator[bytes]:
    for examples, moments in batches:
        _check_finite(examples, moments)
        on_progress(len(examples))
        fixed = np.zeros(len(examples), dtype)
        fixed["label"] = [example.label for example in examples]
        fixed["control"] = [example.control for example in examples]
        fixed["moments"] = moments
        for example, row in zip(examples, fixed, strict=True):
            yield row.tobytes() + example.key.encode()


def _check_finite(examples: list[Example], moments: np.ndarray):
    broken = ~np.isfinite(moments).reshape(len(examples), -1).all(axis=1)
    if broken.any():
        key = examples[int(broken.argmax())].key
        raise InputError(f"{key}: its latent is not finite in {moments.dtype}; possible: dtype float32, other weights")


def _write_shard(folder: Path, index: int, num_shards: int, count: int, records: Iterator[bytes]) -> Shard:
    name = f"latents-{index:05d}-of-{num_shards:05d}.array_record"
    partial = folder / (name + PARTIAL)
    # One record per chunk for random access; half-precision noise does not compress.
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for _ in range(count):
            writer.write(next(records))
    finally:
        writer.close()
    size = partial.stat().st_size
    partial.replace(folder / name)
    return Shard(name, count, size)


def _write_manifest(folder: Path, manifest: Manifest):
    partial = folder / (MANIFEST + PARTIAL)
    partial.write_text(manifest.to_json())
    partial.replace(folder / MANIFEST)
