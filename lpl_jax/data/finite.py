"""Whether the numbers in a latent store are finite: looked at once, before anything learns from them."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lpl_jax.data.records import unpack
from lpl_jax.data.store import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.io.progress import progress_bar

CHUNK = 64  # neighbouring records that a thread reads in one go
MOST_BYTES = 64 * 2**30  # that a process looks at; of more it takes chunks at equal distances
MOST_NAMED = 6  # records; with so many it is clear that the store is spoilt
# Type -> its bits as whole numbers, which of them are not the sign, and those of infinity: what is not finite is as
# large or larger. That is as fast as memory is read, at half precision too.
BITS = {
    np.dtype("<f2"): (np.dtype("<u2"), 0x7FFF, 0x7C00),
    np.dtype("<f4"): (np.dtype("<u4"), 0x7FFFFFFF, 0x7F800000),
}


def check_finite(
    store: LatentStore, *, part: tuple[int, int] = (0, 1), most: int = MOST_BYTES, threads: int = 4
) -> None:
    """Looks through the moments and the outputs of the text tower of all records that are there.

    Args:
      part: (i, n): the i-th of n equal parts, where several processes share the work.
      most: bytes to look at; where the part has more, it is looked at here and there.
      threads: that read and look.

    Raises:
      InputError: values that are infinite or undefined, with the keys and shards of the first such records; or records
        that cannot be read.
    """
    chunks = list(_chunks(len(store), store.manifest.record_bytes, part, most))
    look, bad = _look(store), []
    total = sum(map(len, chunks)) * store.manifest.record_bytes
    bar = progress_bar(total=total, desc="look through the store", unit="B", unit_scale=True, leave=False, delay=2)
    with ThreadPoolExecutor(threads) as pool, bar:
        pending: collections.deque = collections.deque()
        for chunk in [*chunks, *[None] * threads]:
            if chunk is not None:
                pending.append((len(chunk), pool.submit(look, chunk)))
            if pending and (chunk is None or len(pending) > 2 * threads):
                records, found = pending.popleft()
                bad += found.result()
                bar.update(records * store.manifest.record_bytes)
            if len(bad) >= MOST_NAMED:
                break
        while pending and len(bad) < MOST_NAMED:
            bad += pending.popleft()[1].result()
    if bad:
        names = ", ".join(_name(store, index) for index in bad[:MOST_NAMED])
        more = "at least " if len(bad) >= MOST_NAMED else ""
        raise InputError(
            f"latent store {store.path}: {more}{len(bad)} of {len(store)} records have values that are not finite: "
            f"{names}; lpl store verify lists all: prepare it again"
        )


def _chunks(count: int, size: int, part: tuple[int, int], most: int) -> Iterator[range]:
    """The records to look at, in runs of neighbours."""
    index, parts = part
    first, end = count * index // parts, count * (index + 1) // parts
    starts = range(first, end, CHUNK)
    fitting = max(1, most // (CHUNK * size))
    for number in range(min(fitting, len(starts))):
        start = starts[number * len(starts) // min(fitting, len(starts))]
        yield range(start, min(start + CHUNK, end))


def _look(store: LatentStore) -> Callable[[range], list[int]]:
    """function(numbers of records) -> those that are not finite."""
    dtype = store.manifest.record_dtype
    places = []
    for name in ("moments", "text_hidden", "text_pooled"):
        if dtype.fields is not None and name in dtype.fields:
            kind, offset = dtype.fields[name][:2]
            base, shape = kind.subdtype or (kind, ())
            places.append((offset, int(np.prod(shape)), *BITS[base]))

    def finite(data: bytes) -> bool:
        for offset, count, unsigned, magnitude, infinite in places:
            if (np.frombuffer(data, unsigned, count, offset) & magnitude).max() >= infinite:
                return False
        return True

    return lambda chunk: [index for index, data in zip(chunk, store.read(chunk), strict=True) if not finite(data)]


def _name(store: LatentStore, index: int) -> str:
    """A record by its key, and where it is."""
    _, key, _ = unpack(store.read([index])[0], store.manifest.record_dtype, "backslashreplace")
    shown = key if key.isprintable() else ascii(key)
    return f"{shown[:80]} (record {index} in {store.shard_of(index)})"
