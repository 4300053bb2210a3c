"""Make a latent store and show how far it is."""

import time
from pathlib import Path

from tqdm import tqdm

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.sources import ImageSource
from lpl_jax.data.store import LatentStore
from lpl_jax.data.writer import write_store


def prepare(
    source: ImageSource, autoencoder: Autoencoder, out: str | Path, *, progress: bool = True, **options
) -> LatentStore:
    """Writes a latent store with a progress bar, says what came out, and opens it.

    Args:
      progress: show the bar and print the closing line.
      options: of `lpl_jax.data.write_store`, whose errors these are.
    """
    start, encoded, bar = time.perf_counter(), 0, None

    def count(images: int):
        nonlocal encoded, bar
        if bar is None:  # the first call comes when nothing but an image can be wrong: other errors show no bar
            bar = tqdm(total=len(source), desc="prepare", unit="img", leave=False, disable=not progress)
        encoded += images
        bar.update(images)

    try:
        store = write_store(out, source, autoencoder, on_progress=count, **options)
        if bar is not None:
            bar.leave = True  # after an error, none is left behind
    finally:
        if bar is not None:
            bar.close()
    if progress:
        print(_summary(store, encoded, time.perf_counter() - start))
    return store


def _summary(store: LatentStore, encoded: int, seconds: float) -> str:
    manifest = store.manifest
    done = f"{encoded / seconds:.1f} img/s, {seconds:.1f} s" if encoded else "was complete already, nothing encoded"
    shards = len(manifest.shards)
    return (
        f"{store.path}: {len(store)} images of {manifest.num_classes} classes at {manifest.resolution} px, "
        f"{manifest.num_bytes / 1e6:.1f} MB in {shards} shard{'s' * (shards > 1)} "
        f"({manifest.num_bytes / len(store):.0f} bytes per image); {done}"
    )
