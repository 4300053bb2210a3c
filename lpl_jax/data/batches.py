"""Batches of latents: a pure function of (seed, step), read ahead by Grain."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lpl_jax.data.store import LatentStore
from lpl_jax.errors import InputError

Batch = dict[str, np.ndarray]


def batches(
    store: LatentStore,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    control: bool = False,
    with_index: bool = False,
    read_threads: int = 2,
    read_ahead: int = 4,
    worker_processes: int = 0,
) -> Iterator[Batch]:
    """Endless batches for the steps start_step, start_step + 1, ...

    The records stream in epochs, each a permutation of its own of the whole store; step s takes the places from
    s * batch_size to (s + 1) * batch_size of that stream. An epoch need not end where a batch ends, and a batch larger
    than the store runs over several epochs. Nothing but (seed, step) decides what a batch holds: not where the run
    started, nor the number of hosts, threads or workers.

    Args:
      store: the `LatentStore`.
      batch_size: images in the global batch.
      flip: take the mirror image with probability 1/2, else never.
      process_index, process_count: this host's contiguous part of the global batch, as `jax.process_index()` counts.
      control: also yield "control" (B, 4) float32: height and width of the original image, top and left of the crop,
        of the image as it is taken (mirrored or not), in pixels; what a denoiser with `control` is given.
      with_index: also yield "index", the numbers of the records.
      read_threads, read_ahead: threads that read, and batches that they may be ahead of training.
      worker_processes: read in so many processes instead; 0 reads in threads of this one.

    Yields:
      {"mean": (B, h, w, C) float32, "logvar": (B, h, w, C) float32, "label": (B,) int32}: raw moments, from which
      `sample_posterior` draws; B = batch_size / process_count.

    Raises:
      InputError: an argument out of its range, a batch size that the number of hosts does not divide, or `control` of a
        store of format 1.
    """
    _check(batch_size, seed, process_index, process_count)
    _check_not_negative(
        start_step=start_step, read_threads=read_threads, read_ahead=read_ahead, worker_processes=worker_processes
    )
    if control:
        _check_control(store)
    reading = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=max(read_ahead, read_threads))
    steps = _steps(store, batch_size, seed, flip, process_index, process_count, control, with_index)
    stream = steps[start_step:].to_iter_dataset(reading)
    if worker_processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl's flags, which not every program parses
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=worker_processes))
    return iter(stream)


def sample_posterior(key: jax.Array, mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """A sample of N(mean, exp(logvar)), elementwise: a raw latent of the shape of `mean`, float32."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)


def _steps(store, batch_size, seed, flip, process_index, process_count, control, with_index) -> grain.MapDataset:
    """Step -> batch, as a Grain data set with random access.

    The stream of single records is the same on every host; cut into the hosts' parts, part p of step s is number
    s * process_count + p.
    """
    records = grain.MapDataset.range(len(store)).seed(seed).shuffle().repeat()
    moments = records.random_map(functools.partial(_read, store, flip))
    stack = functools.partial(_stack, control, with_index)
    # drop_remainder: the stream is endless, but Grain computes its number of batches, without it in floating point.
    parts = moments.batch(batch_size // process_count, drop_remainder=True, batch_fn=stack)
    return parts[process_index::process_count]


def _read(store: LatentStore, flip: bool, index: int, rng: np.random.Generator) -> dict[str, Any]:
    record = store[index]
    side = int(rng.integers(2)) if flip else 0
    control = None if record.control is None else record.control[side]
    moments = {"mean": record.mean[side], "logvar": record.logvar[side]}
    return {**moments, "label": record.label, "control": control, "index": index}


def _stack(control: bool, with_index: bool, rows: Sequence[dict[str, Any]]) -> Batch:
    batch = {name: np.empty((len(rows), *rows[0][name].shape), np.float32) for name in ("mean", "logvar")}
    for place, row in enumerate(rows):
        batch["mean"][place] = row["mean"]
        batch["logvar"][place] = row["logvar"]
    batch["label"] = np.array([row["label"] for row in rows], np.int32)
    if control:
        batch["control"] = np.array([row["control"] for row in rows], np.float32)
    if with_index:
        batch["index"] = np.array([row["index"] for row in rows], np.int64)
    return batch


def _check(batch_size: int, seed: int, process_index: int, process_count: int):
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size={batch_size}: must be a positive multiple of the {process_count} hosts")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index={process_index}: possible are 0 to {process_count - 1}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: possible are 0 to 2^32 - 1")


def _check_control(store: LatentStore):
    if not store.manifest.has_control:
        raise InputError(
            f"latent store {store.path}: its format {store.manifest.format} lacks the original size and the crop of "
            "each image, which control conditioning needs; delete it and prepare the store again"
        )


def _check_not_negative(**numbers: int):
    for name, value in numbers.items():
        if value < 0:
            raise InputError(f"{name}={value}: must not be negative")
