"""CLIPScore: how well images fit their prompts, as the cosine of CLIP's embeddings."""

from collections.abc import Iterable, Sequence

import flax.struct
import jax
import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.text import Clip, WordTokenizer, preprocess
from lpl_jax.text.model import HIGHEST_TOKEN

RULE = "100 * max(cos(image, text), 0), mean over pairs"
RESIZE_RULE = "shorter side to CLIP's size, bicubic antialiased (Pillow), rounded to 8 bits, centre cropped"


class ClipFeatures(flax.struct.PyTreeNode):
    """CLIP's vision tower as a feature network; a frozen pytree, to be passed to jitted functions as an argument.

    It takes two steps, because Pillow resizes (`RESIZE_RULE`): `prepare` on the host, in NumPy, and `embed` on the
    device, pure, to be jitted and sharded. `features` is one after the other.
    """

    clip: Clip

    def prepare(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """uint8 images (B, H, W, 3), or a sequence of (H, W, 3) of any sizes -> (B, side, side, 3) float32.

        Raises:
          InputError: a model without vision tower, and what `lpl_jax.text.preprocess` refuses.
        """
        config = self.clip.config
        if config.vision is None or config.vision.projection_dim is None:
            raise InputError(f"{config.name}: CLIP features need a vision tower with projection; load the whole model")
        return preprocess(images, config.vision.image_size)

    def embed(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """Prepared images -> {"clip": (B, D) float32}, not normalised."""
        projected = self.clip.encode_images(pixels).projected
        assert projected is not None  # `prepare` refuses a tower without projection
        return {"clip": projected}

    def features(self, images: Iterable[np.ndarray]) -> dict[str, jax.Array]:
        """uint8 images, as for `prepare` -> {"clip": (B, D) float32}, not normalised. Not for use inside `jax.jit`."""
        return _embed(self, self.prepare(images))


@jax.jit
def _embed(features: ClipFeatures, pixels):
    return features.embed(pixels)


def text_features(clip: Clip, tokenizer: WordTokenizer, prompts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """Embeddings of prompts, (N, D) float32, not normalised.

    A prompt that is longer than the tower (77 tokens) loses its end, as everywhere with CLIP.

    Raises:
      InputError: no prompts, a model without text tower, or a tokeniser that was not made for this model.
    """
    config = clip.config.text
    if config is None or config.projection_dim is None:
        raise InputError(f"{clip.config.name}: CLIPScore needs a text tower with projection; load the whole model")
    if isinstance(prompts, str) or not len(prompts):
        raise InputError(f"prompts={prompts!r}: needed: a list of at least one text")
    highest = tokenizer.vocab_size - 1
    end = highest if config.eos_token_id == HIGHEST_TOKEN else config.eos_token_id
    if highest >= config.vocab_size or tokenizer.eos != end:
        raise InputError(
            f"{clip.config.name}: tokeniser with numbers up to {highest} and end token {tokenizer.eos}, model with "
            f"{config.vocab_size} numbers and end token {end}: take the tokeniser that belongs to the model"
        )
    batch_size, rows = min(batch_size, len(prompts)), []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        filled = [*batch, *[""] * (batch_size - len(batch))]  # one shape, one compilation
        rows.append(np.asarray(_embed_text(clip, tokenizer(filled, config.positions)))[: len(batch)])
    return np.concatenate(rows)


@jax.jit
def _embed_text(clip: Clip, tokens):
    return clip.encode_text(tokens).projected


def clip_scores(*, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 * max(cos, 0) of image i and text i; the mean over a set is its CLIPScore.

    The factor is that of most text-to-image papers, not the 2.5 of Hessel et al. (2021, arXiv:2104.08718), who
    introduced the score.

    Args:
      images, texts: their embeddings, (N, D), of any length but 0.

    Returns:
      (N,) float64, 0 to 100.

    Raises:
      InputError: shapes that differ, or an embedding that is zero or not finite.
    """
    images, texts = (np.asarray(rows, np.float64) for rows in (images, texts))
    if images.shape != texts.shape or images.ndim != 2 or 0 in images.shape:
        raise InputError(f"CLIPScore of embeddings {images.shape} and {texts.shape}: needed: (N, D), one text an image")
    cosines = (_unit(images, "image") * _unit(texts, "text")).sum(axis=1)
    return 100 * np.clip(cosines, 0, 1)  # rounding can pass 1


def _unit(rows: np.ndarray, kind: str) -> np.ndarray:
    largest = np.abs(rows).max(axis=1, keepdims=True)  # taken out first: squares of tiny and huge numbers have no range
    wrong = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if wrong.size:
        raise InputError(
            f"CLIPScore: {wrong.size} of {len(rows)} {kind} embeddings are zero or not finite, the first is {wrong[0]}"
        )
    rows = rows / largest
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
