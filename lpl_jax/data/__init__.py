"""Data: image sources, the latent store that they are encoded into once, and batches of it."""

from lpl_jax.data.batches import batches, sample_posterior
from lpl_jax.data.caption_encoder import TextOptions
from lpl_jax.data.examples import Example, ImageSource, Source, StreamSource
from lpl_jax.data.manifest import Manifest, TextInfo
from lpl_jax.data.prepare import prepare
from lpl_jax.data.sources import (
    FolderSource,
    PhotoSource,
    Subset,
    TFDSSource,
    WebDatasetSource,
    check_outside,
    indexed,
    open_source,
)
from lpl_jax.data.store import LatentStore, Record, check_autoencoder
from lpl_jax.data.writer import write_store

__all__ = [
    "Example",
    "FolderSource",
    "ImageSource",
    "LatentStore",
    "Manifest",
    "PhotoSource",
    "Record",
    "Source",
    "StreamSource",
    "Subset",
    "TFDSSource",
    "TextInfo",
    "TextOptions",
    "WebDatasetSource",
    "batches",
    "check_autoencoder",
    "check_outside",
    "indexed",
    "open_source",
    "prepare",
    "sample_posterior",
    "write_store",
]
