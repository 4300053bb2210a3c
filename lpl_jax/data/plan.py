"""What a latent store is to hold, and whether one that is there holds it."""

from dataclasses import replace

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data.caption_encoder import CaptionEncoder
from lpl_jax.data.examples import Source, is_stream
from lpl_jax.data.listing import name_text
from lpl_jax.data.manifest import DTYPES, Manifest
from lpl_jax.data.store import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint
from lpl_jax.io.paths import AnyPath


def plan_store(source: Source, autoencoder: Autoencoder, dtype: str, captions: CaptionEncoder | None) -> Manifest:
    """The manifest of the store to be written, without its shards."""
    config, resolution = autoencoder.config, source.crop.resolution
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}; possible: {', '.join(DTYPES)}")
    autoencoder.check_side(resolution)
    if not is_stream(source) and not len(source):
        raise InputError(f"{source.description}: nothing to encode")
    return Manifest(
        autoencoder=config.name,
        weights_hash=fingerprint(autoencoder.params),
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor,
        latents_mean=config.latents_mean,
        latents_std=config.latents_std,
        latent_channels=config.latent_channels,
        downsample=config.downsample,
        resolution=resolution,
        crop=str(source.crop),
        dtype=dtype,
        class_names=tuple(map(name_text, source.class_names)),
        source=source.description,
        source_fingerprint=source.fingerprint,
        source_identity=dict(source.identity),
        text=None if captions is None else captions.info,
    )


def check_same(folder: AnyPath, found: Manifest, planned: Manifest) -> None:
    """Raises an InputError unless the store holds what is planned; names and shard sizes may differ."""
    differences = [
        (name, have, want)
        for name, have, want, same in (
            ("autoencoder", found.autoencoder, planned.autoencoder, found.weights_hash == planned.weights_hash),
            ("resolution", found.resolution, planned.resolution, found.resolution == planned.resolution),
            ("crop", found.crop, planned.crop, found.crop == planned.crop),
            ("dtype", found.dtype, planned.dtype, found.dtype == planned.dtype),
            ("source", found.source, planned.source, found.source_fingerprint == planned.source_fingerprint),
            ("text", found.text, planned.text, _text_identity(found) == _text_identity(planned)),
        )
        if not same
    ]
    if differences:
        name, have, want = differences[0]
        if name == "source" and have == want:
            _refuse_changed(folder, found, planned)
        raise InputError(
            f"{folder} already holds another latent store ({name} {have}, not {want}); "
            "give another folder or delete this one"
        )


def _refuse_changed(folder: AnyPath, found: Manifest, planned: Manifest):
    """Raises the InputError of a source that reads the same, but is not what it was."""
    before, now = found.source_identity, planned.source_identity or {}
    what = "delete this store, or give another folder"
    if before is None:
        reason = "an earlier version made it, which noted their names alone: whether they are the same cannot be told"
    elif changed := [part for part in (*before, *now) if part in before and part in now and before[part] != now[part]]:
        reason = f"these have changed since: other {', '.join(dict.fromkeys(changed))}"
        if changed == ["change times"]:
            what += " (a store made with --identity content goes by their content alone)"
    else:
        reason = f"it tells them by their {', '.join(before.keys() - now.keys())}: give the same --identity"
    raise InputError(f"{folder} already holds a latent store of {found.source}, but {reason}; {what}")


def _text_identity(manifest: Manifest):
    return manifest.text and replace(manifest.text, tokenizer="", encoder=None)


def check_count(store: LatentStore, source: Source) -> None:
    """Raises an InputError unless a finished store has as many images as the source, skipped ones included."""
    have = len(store) + store.manifest.skipped
    want = None if is_stream(source) else len(source) + len(source.unusable)
    if want is not None and have != want:
        raise InputError(
            f"{store.path} already holds another latent store (number of images {have}, not {want}); "
            "give another folder or delete this one"
        )
