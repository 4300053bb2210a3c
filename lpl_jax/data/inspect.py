"""Whether a latent store is complete and undamaged, and statistics of it."""

import collections
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lpl_jax.autoencoders import latent_scale
from lpl_jax.data.records import faults, unpack
from lpl_jax.data.store import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.io.copies import local_copy

CHUNK = 256  # records that are looked at together


@dataclass
class Findings:
    """What is wrong with a store: how often each kind of fault occurs, and the first ones in words."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    examples: list[str] = field(default_factory=list)
    most: int = 20

    def add(self, kind: str, name: str) -> None:
        """Counts a finding, and keeps the first few as examples."""
        self.counts[kind] += 1
        if len(self.examples) < self.most:
            self.examples.append(f"{kind}: {name}")


def verify(store: LatentStore, on_progress: Callable[[int], object] = lambda records: None) -> Findings:
    """Checks the checksum of every shard, and every record.

    A record has to be readable and finite, with label, tokens and captions as the manifest says, and its key unique.

    on_progress: called with the number of records of each chunk.
    """
    findings, keys = Findings(), set()
    for shard in store.manifest.shards:
        with local_copy(store.path / shard.file).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                findings.add("checksum", f"{shard.file} is not the file that was written")
    for start in range(0, len(store), CHUNK):
        indices = range(start, min(start + CHUNK, len(store)))
        for index, data in _readable(store, indices, findings):
            _check_record(store, index, data, keys, findings)
        on_progress(len(indices))
    return findings


def _readable(store: LatentStore, indices: range, findings: Findings) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the records that can be read."""
    try:
        yield from zip(indices, store.read(indices), strict=True)
    except InputError:
        for index in indices:
            try:
                yield index, store.read([index])[0]
            except InputError as error:
                findings.add("unreadable", str(error))


def _check_record(store: LatentStore, index: int, data: bytes, keys: set[bytes], findings: Findings) -> None:
    manifest = store.manifest
    size = manifest.record_dtype.itemsize
    if len(data) < size:
        findings.add("size", f"record {index} has {len(data)} bytes, at least {size} are needed")
        return
    try:
        row, key, captions = unpack(data, manifest.record_dtype)
    except UnicodeDecodeError:
        findings.add("text", f"record {index}: key or caption is no UTF-8")
        return
    name = f"record {index} ({key})"
    for kind, fault in faults(manifest, row, key, captions):
        findings.add(kind, f"{name}: {fault}")
    digest = hashlib.blake2b(key.encode(), digest_size=12).digest()  # millions of keys have to fit into memory
    if digest in keys:
        findings.add("duplicate key", name)
    keys.add(digest)


def statistics(store: LatentStore, records: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Statistics of a store, from this many of its records, drawn at random (None: all).

    Returns:
      "records", "bytes", "bytes_per_record", "skipped", "looked_at"; "class_counts" (num_classes,) of those looked at;
      "latent_mean", "latent_std" (C,): of scaled samples from the posterior, ideally 0 and 1; "posterior_std" (C,):
      mean deviation of these samples, scaled; "latent_absmax"; with captions, by column, "words", "tokens" (N,) and
      "truncated": share of captions that fill all their numbers.
    """
    manifest = store.manifest
    indices = np.arange(len(store))
    if records is not None and records < len(store):
        indices = np.sort(np.random.default_rng(seed).permutation(len(store))[:records])
    shift, scale = latent_scale(manifest)
    classes = np.zeros(max(1, manifest.num_classes), np.int64)
    sums = np.zeros((4, manifest.latent_channels))
    absmax, words, tokens = 0.0, [], []
    for start in range(0, len(indices), CHUNK):
        part = indices[start : start + CHUNK]
        fixed = store.fixed(part.tolist())
        mean, logvar = (fixed["moments"][:, 0, i].astype(np.float64) for i in range(2))
        latents, variance = (mean - shift) * scale, np.exp(logvar) * scale**2
        sums += [x.sum((0, 1, 2)) for x in (latents, latents**2 + variance, np.sqrt(variance), np.ones_like(latents))]
        absmax = max(absmax, float(np.abs(latents).max()))
        classes += np.bincount(fixed["label"].clip(0, len(classes) - 1), minlength=len(classes))
        if manifest.text:
            words += [[len(caption.split()) for caption in store[int(i)].captions] for i in part]
            tokens.append(1 + np.argmax(fixed["tokens"] == manifest.text.eos, axis=-1))
    first, second, deviation, count = sums
    found = {
        "records": len(store),
        "bytes": manifest.num_bytes,
        "bytes_per_record": manifest.num_bytes / max(1, len(store)),
        "skipped": manifest.skipped,
        "looked_at": len(indices),
        "class_counts": classes,
        "latent_mean": first / count,
        "latent_std": np.sqrt(second / count - (first / count) ** 2),
        "posterior_std": deviation / count,
        "latent_absmax": absmax,
    }
    if manifest.text:
        lengths = np.concatenate(tokens)
        full = lengths >= manifest.text.length
        for column, name in enumerate(manifest.text.columns):
            found[name] = {
                "words": np.array(words)[:, column],
                "tokens": lengths[:, column],
                "truncated": float(full[:, column].mean()),
            }
    return found
