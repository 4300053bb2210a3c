"""Make a latent store and show how far it is."""

import time

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.examples import Source, is_stream
from lpl_jax.data.manifest import REPORT
from lpl_jax.data.parts import read_report
from lpl_jax.data.skips import kinds_of
from lpl_jax.data.store import LatentStore
from lpl_jax.data.writer import write_store
from lpl_jax.io.paths import PathLike
from lpl_jax.io.progress import progress_bar, tell


def prepare(
    source: Source, autoencoder: Autoencoder, out: PathLike, *, progress: bool = True, **options
) -> LatentStore:
    """Writes a latent store with a progress bar, says what came out and what was skipped, and opens it.

    Args:
      progress: show the bar and print the closing lines. What the source tells is printed anyway.
      options: of `lpl_jax.data.write_store`, whose errors these are.
    """
    start, encoded, skipped, bar, begun = time.perf_counter(), 0, 0, None, None
    hosts = options.get("host_count", 1)
    total = None if is_stream(source) or hosts > 1 else len(source)

    def count(images: int):
        nonlocal encoded, bar, begun
        if bar is None:  # the first call comes when nothing but an image can be wrong: other errors show no bar
            bar = progress_bar(total=total, desc="prepare", unit="img", leave=False, disable=not progress)
        encoded += images
        bar.update(images)
        if images and begun is None:  # the rate is that after the first batch, for which the encoder was compiled
            begun = time.perf_counter(), images

    def skip(_):
        nonlocal skipped
        skipped += 1
        if bar is not None:
            bar.set_postfix(skipped=skipped, refresh=False)

    told = dict(on_progress=count, on_skipped=skip, on_note=tell)
    try:
        store = write_store(out, source, autoencoder, **told, **options)
        if bar is not None:
            bar.leave = True  # after an error, none is left behind
    finally:
        if bar is not None:
            bar.close()
    if progress:
        print(_summary(store, _rate(encoded, start, begun)))
        if store.finished and store.manifest.skipped:
            for kind in kinds_of(read_report(store.path).skipped_images):
                print(f"skipped: {kind}")
    return store


def _rate(encoded: int, start: float, begun: tuple[float, int] | None) -> str:
    now = time.perf_counter()
    if begun is None:
        return "was complete already, nothing encoded"
    first_end, first = begun
    rest = f", {(encoded - first) / (now - first_end):.1f} img/s after the first batch" if encoded > first else ""
    return f"{encoded} encoded in {now - start:.1f} s, {encoded / (now - start):.1f} img/s{rest}"


def _summary(store: LatentStore, done: str) -> str:
    manifest = store.manifest
    if not store.finished:
        return (
            f"{store.path}: this host's part is there ({done}); {len(store)} images in {len(manifest.shards)} shards "
            "so far, other hosts are still writing"
        )
    shards, classes = len(manifest.shards), manifest.num_classes
    text = f", {len(manifest.text.columns)} captions each" if manifest.text else ""
    kinds = f"{classes} class{'es' * (classes > 1)}"
    seen = f" of {len(store) + manifest.skipped} seen" if manifest.skipped else ""
    skipped = f"; {manifest.skipped} skipped, listed in {REPORT}" if manifest.skipped else ""
    return (
        f"{store.path}: {len(store)} images{seen} of {kinds} at {manifest.resolution} px{text}, "
        f"{manifest.num_bytes / 1e6:.1f} MB in {shards} shard{'s' * (shards > 1)} "
        f"({manifest.num_bytes / len(store):.0f} bytes per image){skipped}; {done}"
    )
