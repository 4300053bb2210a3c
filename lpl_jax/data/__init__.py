"""Data: image sources, the latent store that they are encoded into once, and batches of it."""

from lpl_jax.data.batches import batches, sample_posterior
from lpl_jax.data.prepare import prepare
from lpl_jax.data.sources import Example, FolderSource, ImageSource, PhotoSource, Subset, TFDSSource, open_source
from lpl_jax.data.store import LatentStore, Manifest, Record, check_autoencoder
from lpl_jax.data.writer import write_store

__all__ = [
    "Example",
    "FolderSource",
    "ImageSource",
    "LatentStore",
    "Manifest",
    "PhotoSource",
    "Record",
    "Subset",
    "TFDSSource",
    "batches",
    "check_autoencoder",
    "open_source",
    "prepare",
    "sample_posterior",
    "write_store",
]
