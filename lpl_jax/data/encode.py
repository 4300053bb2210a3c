"""Images -> posterior moments of both flips, in full batches over all local devices."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.examples import Example
from lpl_jax.data.reading import Loaded


class Encoded(NamedTuple):
    """A run of loaded items, in order, and the moments (B, 2, 2, h, w, C) of the B examples among them."""

    loaded: list[Loaded]
    moments: np.ndarray

    @property
    def examples(self) -> list[Example]:
        """Those that were encoded, in order."""
        return [entry.item for entry in self.loaded if isinstance(entry.item, Example)]


@functools.partial(jax.jit, static_argnames="dtype")
def encode_flips(autoencoder: Autoencoder, images: jax.Array, dtype: str = "float32") -> jax.Array:
    """uint8 images (B, H, W, 3) -> raw moments (B, 2, 2, h, w, C): [as is, mirrored left to right] x [mean, logvar]."""
    images = images.astype(jnp.float32) / 127.5 - 1
    flips = jnp.stack([images, images[:, :, ::-1]])
    # One flip after the other: the memory of one batch, and the encoder is compiled once.
    moments = jax.lax.map(lambda flip: jnp.stack(autoencoder.encode(flip), axis=1), flips)
    return moments.swapaxes(0, 1).astype(dtype)


def encode(loaded: Iterator[Loaded], autoencoder: Autoencoder, *, batch_size: int, dtype: str) -> Iterator[Encoded]:
    """Encodes the examples of a stream in full batches, across the ends of units; what else is in it passes through.

    The batch size is rounded up to a multiple of the local devices and the last batch is padded, so that one program
    serves all. A batch is encoded while the next one is being read.
    """
    # One encoding serves every later run, and rounding to bfloat16 would stay in it: this is done once, in float32.
    autoencoder = autoencoder.with_dtype("float32")
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("data",))
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    autoencoder = jax.device_put(autoencoder, NamedSharding(mesh, PartitionSpec()))
    batch_size = -(-batch_size // len(devices)) * len(devices)

    def dispatch(entries: Sequence[Loaded]) -> jax.Array | None:
        images = [entry.item.image for entry in entries if isinstance(entry.item, Example)]
        if not images:
            return None
        padding = [(0, batch_size - len(images))] + [(0, 0)] * 3
        return encode_flips(autoencoder, jax.device_put(np.pad(np.stack(images), padding), over_devices), dtype)

    running = None
    for entries in _runs(loaded, batch_size):
        # jit returns before the device is done: this batch runs while the previous one is being written.
        started = entries, dispatch(entries)
        if running is not None:
            yield _finished(*running)
        running = started
    if running is not None:
        yield _finished(*running)


def _runs(loaded: Iterator[Loaded], batch_size: int) -> Iterator[list[Loaded]]:
    """Runs with `batch_size` examples each, the last one excepted.

    The end of a unit never begins a run: it comes with the unit's last example, so that a unit that fills its batches
    is finished with them.
    """
    entries, count = [], 0
    for entry in loaded:
        is_example = isinstance(entry.item, Example)
        if is_example and count == batch_size:
            yield entries
            entries, count = [], 0
        entries.append(entry)
        count += is_example
    if entries:
        yield entries


def _finished(entries: list[Loaded], moments: jax.Array | None) -> Encoded:
    encoded = Encoded(entries, np.zeros(0))
    return encoded if moments is None else Encoded(entries, np.asarray(moments)[: len(encoded.examples)])
