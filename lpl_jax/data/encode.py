"""Images -> posterior moments of both flips, in full batches over all local devices."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.sources import Example, ImageSource


@functools.partial(jax.jit, static_argnames="dtype")
def encode_flips(autoencoder: Autoencoder, images: jax.Array, dtype: str = "float32") -> jax.Array:
    """uint8 images (B, H, W, 3) -> raw moments (B, 2, 2, h, w, C): [as is, mirrored left to right] x [mean, logvar]."""
    images = images.astype(jnp.float32) / 127.5 - 1
    flips = jnp.stack([images, images[:, :, ::-1]])
    # One flip after the other: the memory of one batch, and the encoder is compiled once.
    moments = jax.lax.map(lambda flip: jnp.stack(autoencoder.encode(flip), axis=1), flips)
    return moments.swapaxes(0, 1).astype(dtype)


def encode_source(
    source: ImageSource, autoencoder: Autoencoder, *, batch_size: int, dtype: str, read_threads: int = 4
) -> Iterator[tuple[list[Example], np.ndarray]]:
    """Yields (examples, moments (len(examples), 2, 2, h, w, C) of type `dtype`) in the source's order.

    The batch size is rounded up to a multiple of the local devices and the last batch is padded, so that one program
    serves all. Images are read and decoded by threads; a batch is encoded while the next one is being read.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("data",))
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    autoencoder = jax.device_put(autoencoder, NamedSharding(mesh, PartitionSpec()))
    batch_size = -(-batch_size // len(devices)) * len(devices)

    def dispatch(examples: Sequence[Example]) -> jax.Array:
        images = np.stack([example.image for example in examples])
        padding = [(0, batch_size - len(examples))] + [(0, 0)] * 3
        return encode_flips(autoencoder, jax.device_put(np.pad(images, padding), over_devices), dtype)

    read_ahead = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=max(batch_size, read_threads))
    examples = iter(grain.MapDataset.source(source).to_iter_dataset(read_ahead))
    running = None
    while batch := list(itertools.islice(examples, batch_size)):
        # jit returns before the device is done: this batch runs while the previous one is being written.
        started = batch, dispatch(batch)
        if running is not None:
            yield _finished(*running)
        running = started
    if running is not None:
        yield _finished(*running)


def _finished(examples: list[Example], moments: jax.Array) -> tuple[list[Example], np.ndarray]:
    return examples, np.asarray(moments)[: len(examples)]
