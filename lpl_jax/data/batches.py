"""Batches of latents: a pure function of (seed, step), read ahead by Grain."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lpl_jax.data.store import LatentStore
from lpl_jax.errors import InputError

Batch = dict[str, np.ndarray]
MOMENTS = ("mean", "logvar")  # of a record, in their order
FIELD_TYPES = {"control": np.float32, "tokens": np.int32, "text_hidden": np.float16, "text_pooled": np.float16}


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
    text: bool = False,
    second_caption: float = 0.0,
    read_threads: int = 2,
    read_ahead: int = 4,
    worker_processes: int = 0,
) -> Iterator[Batch]:
    """Endless batches for the steps start_step, start_step + 1, ...

    The records stream in epochs, each a permutation of its own of the store; step s takes the draws from
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
      text: also yield "tokens" (B, T) int32, the ids of the caption, and where the store keeps outputs of the text
        tower "text_hidden" (B, T, D) and "text_pooled" (B, D') float16.
      second_caption: probability of taking the second caption column instead of the first, for each image anew.
      read_threads, read_ahead: threads that read, and batches that they may be ahead of training.
      worker_processes: read in so many processes instead; 0 reads in threads of this one.

    Yields:
      {"mean": (B, h, w, C) float32, "logvar": (B, h, w, C) float32, "label": (B,) int32}: raw moments, from which
      `sample_posterior` draws; B = batch_size / process_count.

    Raises:
      InputError: an argument out of its range, a batch size that the number of hosts does not divide, or `text` of a
        store that lacks it.
    """
    _check(batch_size, seed, process_index, process_count)
    _check_not_negative(
        start_step=start_step, read_threads=read_threads, read_ahead=read_ahead, worker_processes=worker_processes
    )
    if not len(store):
        raise InputError(f"latent store {store.path}: holds no image yet")
    if text or second_caption:
        _check_text(store, second_caption)
    reading = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=max(read_ahead, read_threads))
    draw = functools.partial(_draw, flip, second_caption)
    read = functools.partial(_read, store, _fields(store, control, text), with_index)
    steps = _steps(len(store), batch_size, seed, process_index, process_count, draw, read)
    stream = steps[start_step:].to_iter_dataset(reading)
    if worker_processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl's flags, which not every program parses
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=worker_processes))
    return iter(stream)


def sample_posterior(key: jax.Array, *, mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """A sample of N(mean, exp(logvar)), elementwise: a raw latent of the shape of `mean`, float32."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)


class _Draw(NamedTuple):
    """A draw from the stream of records: which one, mirrored (1) or not (0), and which caption column."""

    record: int
    side: int
    column: int


def _steps(count, batch_size, seed, process_index, process_count, draw, read) -> grain.MapDataset:
    """Step -> batch, as a Grain data set with random access.

    The stream of single draws is the same on every host; cut into the hosts' parts, part p of step s is number
    s * process_count + p. `read` makes a batch of the draws of one.
    """
    draws = _draws(count, seed, draw)
    # drop_remainder: the stream is endless, but Grain computes its number of batches, without it in floating point.
    parts = draws.batch(batch_size // process_count, drop_remainder=True, batch_fn=read)
    return parts[process_index::process_count]


def _draws(count, seed, draw) -> grain.MapDataset:
    """The endless stream of single draws, with random access."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat().random_map(draw)


def _draw(flip: bool, second_caption: float, index: int, rng: np.random.Generator) -> _Draw:
    side = int(rng.integers(2)) if flip else 0
    return _Draw(index, side, int(rng.random() < second_caption) if second_caption else 0)


def _fields(store: LatentStore, control: bool, text: bool) -> tuple[str, ...]:
    """Fields of the records that a batch holds beside moments and label."""
    wanted = ("control",) * control + ("tokens", "text_hidden", "text_pooled") * text
    return tuple(name for name in wanted if name in store.manifest.field_names)


def _read(store: LatentStore, fields: tuple[str, ...], with_index: bool, draws: Sequence[_Draw]) -> Batch:
    index, side, column = np.array(draws, np.int64).T
    records = store.fixed(index)
    rows = np.arange(len(draws))
    batch = {name: records["moments"][rows, side, part].astype(np.float32) for part, name in enumerate(MOMENTS)}
    batch["label"] = records["label"].astype(np.int32)
    for name in fields:
        batch[name] = records[name][rows, side if name == "control" else column].astype(FIELD_TYPES[name], copy=False)
    if with_index:
        batch["index"] = index
    return batch


def _check(batch_size: int, seed: int, process_index: int, process_count: int):
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size={batch_size}: must be a positive multiple of the {process_count} hosts")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index={process_index}: possible are 0 to {process_count - 1}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: possible are 0 to 2^32 - 1")


def _check_text(store: LatentStore, second_caption: float):
    text = store.manifest.text
    if text is None:
        raise InputError(
            f"latent store {store.path}: holds no captions; prepare one of a source that has them (a webdataset, or a "
            "folder with data.caption_key)"
        )
    if not 0 <= second_caption <= 1:
        raise InputError(f"second_caption={second_caption}: must be a probability, 0 to 1")
    if second_caption and len(text.columns) < 2:
        raise InputError(
            f"second_caption={second_caption}: latent store {store.path} has one caption column, "
            f"{', '.join(text.columns)}; prepare it with a second one"
        )


def _check_not_negative(**numbers: int):
    for name, value in numbers.items():
        if value < 0:
            raise InputError(f"{name}={value}: must not be negative")
