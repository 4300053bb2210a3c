"""Prompts as the condition of a denoiser: how a training step and a sampler encode token ids.

    tokens (B, T) --frozen tower--> hidden (B, T, D), pooled (B, P) --dropout, padding--> context, pooled

A prompt that is dropped (classifier-free guidance) becomes the empty one, in both of its parts.
"""

import dataclasses
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpl_jax.errors import InputError
from lpl_jax.fields import Part, between, field
from lpl_jax.io.fingerprints import fingerprint
from lpl_jax.limits import TOKENS
from lpl_jax.text.config import ClipConfig, TextConfig
from lpl_jax.text.model import Clip, Features, init
from lpl_jax.text.tokenizer import WordTokenizer
from lpl_jax.text.weights import load, load_tokenizer

EMPTY_LENGTH = 2  # real tokens of the empty prompt: start and end


class Condition(NamedTuple):
    """What a denoiser is given of a class or of a prompt; a leading axis B in both.

    context: labels (B,) int32, or states of the text tower (B, T, D) float32. pooled: (B, P) float32, or None.
    """

    context: jax.Array
    pooled: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TextSource(Part, section="text"):
    """The frozen text tower of a run on captions (docs/text.md)."""

    source: str = field(MISSING, "bundled (knows no language) | CLIP folder or hub id; None: class labels")
    subfolder: str | None = field(None, "the tower's folder inside a pipeline, such as text_encoder")
    variant: str | None = field(None, "which weights, where there are several and none in full precision, such as fp16")
    tokenizer: str | None = field(None, "tokeniser, where it is not beside the tower")
    tokenizer_subfolder: str | None = field(None, "its folder inside a pipeline, such as tokenizer")
    dtype: Literal["float32", "bfloat16", "auto"] = field(
        "auto", "compute type of the tower: float32 | bfloat16 | auto (bfloat16 on accelerators)"
    )
    length: int = field(77, "tokens of a prompt, that of the store; start and end count", TOKENS)
    layer: Literal["last", "penultimate"] = field(
        "last", "states that the denoiser is given: last (final norm applied) | penultimate"
    )
    pooled: bool = field(True, "also give it the state of the end token, added to the time embedding")
    padding: Literal["keep", "replicate"] = field(
        "keep", "after the end of a prompt: keep the tower's states | replicate the prompt's tokens"
    )
    padding_noise: float = field(
        0.02,
        "replicate, training: noise on the tokens, in units of their standard deviation",
        between(0, 100),
    )
    embeddings: Literal["step", "store"] = field(
        "step", "step (the tower runs in each step) | store (its outputs are in the store)"
    )
    second_caption: float = field(
        0.0, "probability of the store's second caption column in place of the first", between(0, 1)
    )

    @property
    def compute_dtype(self) -> str:
        """Of the tower: "auto" is bfloat16 on accelerators."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def dims(self, tower: TextConfig) -> tuple[int, int]:
        """(width of the context tokens, width of the pooled vector or 0) with this tower."""
        return tower.width, tower.width if self.pooled else 0


class TextConditioner(flax.struct.PyTreeNode):
    """A frozen text tower and the empty prompt; a pytree, to be passed to jitted functions as an argument.

    Attributes:
      clip: the tower.
      empty: what the tower makes of the empty prompt: context (1, T, D), pooled (1, P) or None.
      source: what is taken of the tower; static.
      eos: number of the end token; static.
    """

    clip: Clip
    empty: Condition
    source: TextSource = flax.struct.field(pytree_node=False)
    eos: int = flax.struct.field(pytree_node=False)

    def __call__(
        self, batch: dict[str, jax.Array], dropped: jax.Array | None = None, key: jax.Array | None = None
    ) -> Condition:
        """The condition of each sample; no gradient reaches the tower.

        Args:
          batch: "tokens" (B, T) int32. With `embeddings="store"` also "text_hidden" (B, T, D) and, if pooled,
            "text_pooled" (B, P), which then stand in place of the tower's outputs.
          dropped: (B,) bool, where the empty prompt stands in place of the sample's; None: nowhere.
          key: of the noise that replicated padding is given in training; None: no noise, as for sampling.

        Raises:
          InputError: tokens of another length, or a batch that lacks what is needed.
        """
        _check(batch, self)
        found = self._encode(batch)
        lengths = 1 + jnp.argmax(batch["tokens"] == self.eos, axis=1)
        if dropped is not None:
            found = jax.tree.map(lambda a, b: jnp.where(_column(dropped, a.ndim), b, a), found, self.empty)
            lengths = jnp.where(dropped, EMPTY_LENGTH, lengths)
        return lax.stop_gradient(self._padded(found, lengths, key))

    def no_prompt(self, count: int) -> Condition:
        """The condition of `count` empty prompts: the other side of guidance."""
        empty = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape[1:])), self.empty)
        return self._padded(empty, jnp.full(count, EMPTY_LENGTH), None)

    def _encode(self, batch) -> Condition:
        if self.source.embeddings == "step" or "text_hidden" not in batch:
            return _condition(self.clip.encode_text(batch["tokens"]), self.source)
        pooled = batch["text_pooled"].astype(jnp.float32) if self.source.pooled else None
        return Condition(batch["text_hidden"].astype(jnp.float32), pooled)

    def _padded(self, condition: Condition, lengths, key) -> Condition:
        if self.source.padding == "keep":
            return condition
        return condition._replace(context=replicate(condition.context, lengths, key, self.source.padding_noise))


def replicate(context: jax.Array, lengths: jax.Array, key: jax.Array | None, noise: float) -> jax.Array:
    """Padding filled with the real tokens again and again, perturbed by noise (arXiv 2411.03177, Sec. 2).

    Noise is N(0, 1) * `noise` * sqrt(m - 1) * (standard deviation of each channel over the real tokens), m the number
    of times that the tokens have to be repeated; a text that fills its row is left as it is.

    Args:
      context: (B, T, D). lengths: (B,), how many tokens of each row are real. key: None adds no noise.
    """
    positions = jnp.arange(context.shape[1])
    repeated = jnp.take_along_axis(context, (positions % lengths[:, None])[..., None], axis=1)
    if key is None or not noise:
        return repeated
    real = (positions < lengths[:, None])[..., None]
    count = lengths[:, None, None]
    mean = jnp.where(real, context, 0).sum(1, keepdims=True) / count
    deviation = jnp.sqrt(jnp.where(real, jnp.square(context - mean), 0).sum(1, keepdims=True) / count)
    times = -(-context.shape[1] // count)
    return repeated + noise * jnp.sqrt(times - 1.0) * deviation * jax.random.normal(key, context.shape)


def abstract_conditioner(source: TextSource, tower: TextConfig) -> TextConditioner:
    """A conditioner with shapes in place of weights, for programs that are traced or compiled and not run."""
    config = ClipConfig(source.source, dataclasses.replace(tower, projection_dim=None, dtype=source.compute_dtype))
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)).params)
    matrices = jnp.dtype(source.compute_dtype)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, matrices if a.ndim > 1 else jnp.float32), params)
    clip, tokens = Clip(params, config), jax.ShapeDtypeStruct((1, source.length), jnp.int32)
    empty = jax.eval_shape(lambda clip, tokens: _condition(clip.encode_text(tokens), source), clip, tokens)
    return TextConditioner(clip, empty, source, tower.eos_token_id)


def load_conditioner(source: TextSource) -> tuple[TextConditioner, WordTokenizer]:
    """The configured tower with its empty prompt encoded, and the tokeniser that belongs to it.

    Raises:
      InputError: nothing there, files that do not fit, prompts longer than the tower takes, or another's tokeniser.
    """
    options: dict[str, Any] = dict(subfolder=source.subfolder, variant=source.variant, dtype=source.compute_dtype)
    clip = load(source.source, tower="text", **options)
    clip = _without_projection(clip)
    name, folder = source.tokenizer or source.source, source.tokenizer_subfolder
    tokenizer = load_tokenizer(name, subfolder=folder)
    config = clip.text_config
    if source.length > config.positions:
        raise InputError(f"text.length={source.length}: {source.source} takes up to {config.positions} tokens")
    if tokenizer.vocab_size > config.vocab_size or tokenizer.eos >= config.vocab_size:
        raise InputError(
            f"tokeniser {name} has {tokenizer.vocab_size} numbers, text tower {source.source} {config.vocab_size}: "
            "take the tokeniser that belongs to the tower (text.tokenizer)"
        )
    tokens = jnp.asarray(tokenizer("", source.length))
    empty = _condition(jax.jit(lambda clip, tokens: clip.encode_text(tokens))(clip, tokens), source)
    return TextConditioner(clip, empty, source, tokenizer.eos), tokenizer


def tower_fingerprint(clip: Clip) -> str:
    """Identity of a text tower: the same for both compute types, and with or without the projection.

    In bfloat16 matrices are kept so, and those of float32 are rounded to it here.
    """

    def rounded(array):
        return np.asarray(array).astype(jnp.bfloat16) if array.ndim > 1 else array

    return fingerprint(jax.tree.map(rounded, _without_projection(clip).params))


def _without_projection(clip: Clip) -> Clip:
    """Into the space shared with images: only CLIPScore needs it."""
    tower = {name: leaf for name, leaf in clip.params["text"].items() if name != "projection"}
    text = dataclasses.replace(clip.text_config, projection_dim=None)
    return Clip({"text": tower}, dataclasses.replace(clip.config, text=text))


def _condition(features: Features, source: TextSource) -> Condition:
    return Condition(getattr(features, source.layer), features.pooled if source.pooled else None)


def _column(values: jax.Array, ndim: int) -> jax.Array:
    return values.reshape(-1, *[1] * (ndim - 1))


def _check(batch, conditioner: TextConditioner) -> None:
    source, needed = conditioner.source, ["tokens"]
    if "text_hidden" in batch and source.embeddings == "store" and source.pooled:
        needed.append("text_pooled")
    if absent := [name for name in needed if name not in batch]:
        raise InputError(f"a batch for training on text lacks {', '.join(absent)}; it has {', '.join(batch)}")
    if batch["tokens"].ndim != 2 or batch["tokens"].shape[1] != source.length:
        raise InputError(f"tokens of shape {batch['tokens'].shape}; needed: (B, text.length = {source.length})")
