"""Whether a latent store holds the captions that a run on text is configured for."""

from lpl_jax.data import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.text import WordTokenizer
from lpl_jax.training.build import Experiment


def check_captions(experiment: Experiment, store: LatentStore, tokenizer: WordTokenizer) -> None:
    """Raises an InputError unless the store's captions were made into numbers as the run takes them."""
    text, made = experiment.text, store.manifest.text
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
            f"{made.columns[0]}"
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
