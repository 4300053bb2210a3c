"""What a run reads: its latent store, which is prepared where there is none, and its batches."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from lpl_jax import distributed, parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import LatentStore, Source, TextOptions, batches, check_autoencoder, check_outside, prepare
from lpl_jax.data.configured import data_source
from lpl_jax.data.examples import is_stream
from lpl_jax.data.finite import check_finite
from lpl_jax.data.manifest import MANIFEST, PLAN
from lpl_jax.errors import InputError, some
from lpl_jax.experiment.build import Experiment
from lpl_jax.io.locks import only_writer
from lpl_jax.io.paths import AnyPath, to_path
from lpl_jax.runs.workdir import CLASSES, read_classes, read_inputs
from lpl_jax.text import TextConditioner, WordTokenizer, tower_fingerprint


def open_store(
    experiment: Experiment,
    autoencoder: Autoencoder,
    workdir: AnyPath,
    text: TextConditioner | None = None,
    tokenizer: WordTokenizer | None = None,
) -> LatentStore:
    """The configured latent store, checked; prepared from the source where it does not exist.

    text, tokenizer: of a run on text.
    """
    data, resolution = experiment.data, experiment.resolution
    path = to_path(data.store, "data.store", remote=True) if data.store else workdir / "latents"
    # Where there is a plan, too, whoever wrote it was killed while it tidied up.
    finished = (path / MANIFEST).exists() and (jax.process_count() > 1 or not (path / PLAN).exists())
    if not path.exists() or (data.store is None and not finished):
        if jax.process_count() > 1:
            raise InputError(f"latent store {path} does not exist: make it first, lpl prepare")
        if experiment.text is not None and data.source == "photos":
            raise InputError(
                f"latent store {path} does not exist, and data.source='photos' has no captions to make it from: give "
                "the store that was prepared, or another source"
            )
        if data.store:  # it may be a mistake
            print(f"{path}: no latent store there; it is prepared from data.source={data.source}", flush=True)
        check_outside(data.source, path)
        source = data_source(experiment)
        check_source(experiment, source)
        with only_writer(path):
            prepare(source, autoencoder, path, text=_text_options(experiment))
    store = LatentStore(path, partial=data.unfinished)
    check_autoencoder(store, autoencoder)
    if store.manifest.resolution != resolution:
        raise InputError(f"latent store {path} holds {store.manifest.resolution} px images; resolution={resolution}")
    if experiment.text is not None:
        assert text is not None and tokenizer is not None
        check_captions(experiment, store, text, tokenizer)
    else:
        _check_classes(experiment, store, workdir)
    store.fetch()
    look_through(store, workdir)
    return store


def look_through(store: LatentStore, workdir: AnyPath) -> None:
    """Raises an InputError, in all processes, where records are not finite; each looks at its share of them.

    A run whose `inputs.json` says that these records were looked through does not do it again.
    """
    known = read_inputs(workdir)
    if known is not None and known.finite and known.store.records == store.identity.records:
        return
    part = jax.process_index(), jax.process_count()
    distributed.on_all(lambda: check_finite(store, part=part))


def check_source(experiment: Experiment, source: Source) -> None:
    """Raises an InputError for a source of which the store would not be one of this run: before it is made."""
    columns, text = source.caption_columns, experiment.text
    if text is None:
        if not is_stream(source):  # how many classes these have is known when all is read
            _check_count(experiment, source.class_names, f"data.source={experiment.data.source}")
    elif not columns:
        raise InputError(f"text.source={text.source!r}, but data.source={experiment.data.source} has no captions")
    elif text.second_caption and len(columns) < 2:
        raise InputError(
            f"text.second_caption={text.second_caption}, but data.source={experiment.data.source} has one caption "
            f"column, {columns[0]}: give data.second_caption_key"
        )


def _check_count(experiment: Experiment, names: Sequence[str], holder: str) -> None:
    if len(names) != (classes := experiment.model.num_classes):
        raise InputError(
            f"model.num_classes={classes}, but {holder} has {len(names)} classes ({some(names)}): "
            f"give --config.model.num_classes={len(names)}, or another store"
        )


def _check_classes(experiment: Experiment, store: LatentStore, workdir: AnyPath) -> None:
    """Raises an InputError unless the model has the store's classes, and those that the run has had so far."""
    names = store.class_names
    _check_count(experiment, names, f"latent store {store.path}")
    if (known := read_classes(workdir)) is not None and known != names:
        if len(known) != len(names):
            raise InputError(
                f"{workdir / CLASSES} has {len(known)} classes, latent store {store.path} has {len(names)}: the "
                "file is damaged, or the store is another one"
            )
        number = next(number for number, pair in enumerate(zip(known, names, strict=True)) if pair[0] != pair[1])
        raise InputError(
            f"{workdir} learns other classes than latent store {store.path} has: class {number} is {known[number]} "
            f"there and {names[number]} here"
        )


def _text_options(experiment: Experiment) -> TextOptions | None:
    """How a store that is prepared for this run keeps captions."""
    text = experiment.text
    if text is None:
        return None
    options = TextOptions(text.tokenizer or text.source, text.tokenizer_subfolder, text.length)
    if text.embeddings == "step":
        return options
    tower = dict(encoder=text.source, encoder_subfolder=text.subfolder, encoder_variant=text.variant)
    return dataclasses.replace(options, **tower, layer=text.layer)


def open_stream(experiment: Experiment, store: LatentStore, mesh: Mesh, start_step: int = 0):
    """This process's part of the batches from a step on; see `data.batches`."""
    index, count = parallel.batch_part(mesh)
    text = experiment.text
    return batches(
        store,
        batch_size=experiment.train.batch_size,
        seed=experiment.seed,
        start_step=start_step,
        process_index=index,
        process_count=count,
        control=experiment.model.control,
        text=text is not None,
        second_caption=text.second_caption if text is not None else 0.0,
    )


def check_captions(
    experiment: Experiment, store: LatentStore, conditioner: TextConditioner, tokenizer: WordTokenizer
) -> None:
    """Raises an InputError unless the store's captions were tokenised, and encoded, as the run needs them."""
    text, made = experiment.text, store.manifest.text
    assert text is not None
    if made is None:
        raise InputError(
            f"text.source={text.source!r}, but latent store {store.path} has no captions: prepare it from a source "
            "that has them, or train on classes"
        )
    if made.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"latent store {store.path} has tokens of tokeniser {made.tokenizer} ({made.fingerprint[:12]}), not of "
            f"{text.tokenizer or text.source} ({tokenizer.fingerprint[:12]}): prepare it with this one"
        )
    if made.length != text.length:
        raise InputError(f"latent store {store.path} has {made.length} tokens a caption, but text.length={text.length}")
    if text.second_caption and len(made.columns) < 2:
        raise InputError(
            f"text.second_caption={text.second_caption}, but latent store {store.path} has one caption column, "
            f"{', '.join(made.columns)}"
        )
    if text.embeddings == "store":
        kept, needed = (made.hidden_dim, made.pooled_dim), (experiment.model.context_dim, experiment.model.pooled_dim)
        if kept[0] != needed[0] or (needed[1] and kept[1] != needed[1]):
            raise InputError(
                f"text.embeddings='store' needs outputs of the tower of widths {needed} in the store; latent store "
                f"{store.path} has {kept}: prepare it with them, or use text.embeddings='step'"
            )
        if made.layer != text.layer:
            raise InputError(
                f"latent store {store.path} has {made.layer} states of its tower; text.layer={text.layer!r}"
            )
        if (theirs := made.encoder_fingerprint) != (ours := tower_fingerprint(conditioner.clip)):
            raise InputError(
                f"latent store {store.path} has states of tower {made.encoder} (weights "
                f"{str(theirs)[:12]}), not of {text.source} ({ours[:12]}): prepare it with this one"
            )
