"""CLIP against transformers: text and vision towers, token numbers, image preprocessing, and folders."""

import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lpl_jax import text
from lpl_jax.errors import InputError
from lpl_jax.io.hub import find
from lpl_jax.io.jsons import read_json
from lpl_jax.text.config import class_name
from lpl_jax.text.tokenizer import WORD_END, vocabulary_of
from lpl_jax.tools.parity.comparison import FORWARD, Comparison, Group, Settings, close, equal, equal_by_name
from lpl_jax.tools.parity.torch_side import Model, arrays, nchw, randomize

TINY_TEXT: dict[str, Any] = dict(
    vocab_size=99,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    projection_dim=8,
    bos_token_id=97,
    eos_token_id=98,
    pad_token_id=98,
)
TINY_VISION: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=24,
    patch_size=8,
    projection_dim=8,
)
# Spaces, contractions, numbers, marks of all kinds, other scripts, emoji, controls, special words, long texts.
TEXTS = (
    "",
    "   \t\n ",
    "a photo of a cat",
    "A PHOTO of  a\tCat\n\nand the dog ",
    "it's they'LL we've I'm don't he'd you're o'clock rock'n'roll 'quoted' ''s !'s",
    "12345 3.14 1,000 x² ½ Ⅷ 一二三 ٣٤ 2nd",
    '!!! ... #$%&*()[]{}<>?/\\|@^~`_-+=:;"',
    "snake_case and a_b __init__",
    "naïve café cafe\u0301 n\u0303 Å K ß ſ İstanbul ΣΑΣ ǅ ﬁne",
    "日本語 한국어 ไทย हिन्दी עברית العربية ﷺ 𝓐𝓑 𐐀",
    "😀 👩‍👩‍👧‍👦🇩🇪 ❤️ ಠ_ಠ",
    "zero\u200bwidth soft\u00adhyphen nbsp\u00a0nel\x85em\u2003wide\u3000line\u2028 \ufeff",
    "control \x00\x07\x1b sep\x1c\x1d\x1e\x1f end",
    "<b>bold</b> &amp; &lt;i&gt; &amp;lt; &eacute; &#233; fish&chips",
    "“curly” ‘quotes’ – dash … it’s",
    "before <|endoftext|> behind<|startoftext|>x <|ENDOFTEXT|>'s !<|endoftext|>",
    "<start_of_text> a <END_OF_TEXT> b",
    "the photo " * 60,
    "photophotographer" * 9,
)
MERGED = ("the", "they", "photo", "photographer", "cat", "and", "'s", "naïve", "😀", "2nd", "...")
FILES = ("*.json", "merges.txt", "model*.safetensors")
IMAGE_SIZES = ((300, 401), (401, 300), (224, 224), (37, 50), (333, 1000))


def groups(settings: Settings) -> list[Group]:
    """What is compared: the model that was given, else a tiny one, token numbers and pixels."""
    if not settings.text:
        return [
            Group("CLIP (tiny, random)", partial(_tiny, settings)),
            Group("tokeniser", partial(_tokens, settings.seed)),
            Group("image preprocessing", partial(_images, 224, settings.seed)),
        ]
    folder = find(settings.text, FILES)
    if not folder.is_dir():
        raise InputError(f"--text {settings.text}: a folder in transformers layout is needed")
    clip = text.load(folder)
    rows = [Group(settings.text, partial(_given, clip, folder, settings))]
    if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        rows.append(Group("tokeniser", partial(_given_tokens, folder, settings.seed)))
    return rows


def _tiny(settings: Settings) -> Iterator[Comparison]:
    folder = settings.scratch / "text" / "tiny"
    model = random_torch("CLIPModel", folder, settings.seed)
    yield from compare(model, text.load(folder), settings)


def random_torch(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Model:
    """transformers' model of a class, tiny but for `changes`, with random weights, which are saved in `folder`."""
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(
            text_config=TINY_TEXT | changes, vision_config=TINY_VISION | changes, projection_dim=8
        )
    elif kind.startswith("CLIPText"):
        config = transformers.CLIPTextConfig(**TINY_TEXT | changes)
    else:
        config = transformers.CLIPVisionConfig(**TINY_VISION | changes)
    model = randomize(getattr(transformers, kind)(config), seed)
    model.save_pretrained(folder)
    return model


def _given(clip: text.Clip, folder: Path, settings: Settings) -> Iterator[Comparison]:
    kind = class_name(read_json(folder / "config.json"), str(folder))
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    yield from compare(model.eval().requires_grad_(False), clip, settings)


def compare(model: Model, clip: text.Clip, settings: Settings) -> Iterator[Comparison]:
    """All rows of one model: transformers' and ours of the same folder, of one tower or both."""
    rng, tokens, images = np.random.default_rng(settings.seed), None, None
    if clip.config.text:
        tokens = _example_tokens(model, clip.config.text, rng)
        tower = getattr(model, "text_model", model)
        theirs = tower(torch.from_numpy(tokens), output_hidden_states=True)
        projection = getattr(model, "text_projection", None)
        yield from feature_rows("text", encode_text(clip, tokens), theirs, projection)
    if clip.config.vision:
        side = clip.config.vision.image_size
        images = rng.standard_normal((2, side, side, 3)).astype(np.float32)
        tower = getattr(model, "vision_model", model)
        theirs = tower(nchw(images), output_hidden_states=True)
        projection = getattr(model, "visual_projection", None)
        yield from feature_rows("vision", encode_images(clip, images), theirs, projection)
    if tokens is not None and images is not None:
        theirs = model(torch.from_numpy(tokens), nchw(images)).logits_per_image
        yield close("similarities of images and texts", similarities(clip, images, tokens), theirs, FORWARD)
    folder = settings.scratch / "text" / "written"
    text.save(clip, folder)
    again = type(model).from_pretrained(folder)
    states = arrays(again.state_dict()), arrays(model.state_dict())
    yield equal_by_name("tensors written by us, read by transformers", *states)


def feature_rows(side: str, ours: text.Features, theirs, projection=None) -> Iterator[Comparison]:
    """Features of one tower, with the embedding where a projection is given."""
    yield close(f"{side}, last hidden state", ours.last, theirs.last_hidden_state, FORWARD)
    yield close(f"{side}, last hidden state but one", ours.penultimate, theirs.hidden_states[-2], FORWARD)
    yield close(f"{side}, pooled", ours.pooled, theirs.pooler_output, FORWARD)
    if projection is not None:
        yield close(f"{side}, embedding", ours.projected, projection(theirs.pooler_output), FORWARD)


@jax.jit
def encode_text(clip, tokens):
    """Our features of token numbers."""
    return clip.encode_text(tokens)


@jax.jit
def encode_images(clip, images):
    """Our features of images."""
    return clip.encode_images(images)


def similarities(clip, images, tokens):
    """Our scaled cosine similarities, (images, texts)."""
    features = encode_images(clip, images).projected, encode_text(clip, tokens).projected
    of_images, of_texts = (each / jnp.linalg.norm(each, axis=-1, keepdims=True) for each in features)
    return jnp.exp(clip.params["logit_scale"]) * of_images @ of_texts.T


def _example_tokens(model, config, rng) -> np.ndarray:
    """Four rows of random tokens, each with an end token at another position and end tokens after it."""
    settings = getattr(model.config, "text_config", model.config)
    end = settings.eos_token_id if settings.eos_token_id != 2 else settings.vocab_size - 1  # 2: the highest number
    lengths = np.linspace(2, config.positions, 4).astype(int)
    rows = rng.integers(0, min(end, settings.vocab_size - 3), (4, config.positions)).astype(np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1 :] = end
    return rows


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Numbers of the units, and merges that build a few words from the left."""
    units, merges = bytes_to_unicode(), {}
    for word in MERGED:
        *letters, last = [units[byte] for byte in word.encode()]
        letters, left = [*letters, last + WORD_END], ""
        for right in letters:
            if left:
                merges[left, right] = None
            left += right
    return vocabulary_of(list(merges)), list(merges)


def _tokens(seed: int) -> Iterator[Comparison]:
    units, merges = vocabulary()
    theirs = transformers.CLIPTokenizer(vocab=units, merges=merges)  # pyright: ignore[reportArgumentType]  # takes pairs
    yield from token_rows(text.Tokenizer(units, merges), theirs, seed)


def _given_tokens(folder: Path, seed: int) -> Iterator[Comparison]:
    yield from token_rows(text.Tokenizer.load(folder), transformers.CLIPTokenizer.from_pretrained(folder), seed)


def token_rows(ours: text.Tokenizer, theirs, seed: int = 0) -> Iterator[Comparison]:
    """Chosen and random texts in rows of two lengths, one of which cuts most of them."""
    for name, texts in (("chosen texts", list(TEXTS)), ("random texts", random_texts(500, seed))):
        for length in (77, 6):
            out = theirs(texts, padding="max_length", max_length=length, truncation=True)
            numbers = np.array(out["input_ids"])
            yield equal(f"token numbers of {len(texts)} {name}, length {length}", ours(texts, length), numbers)


def random_texts(count: int, seed: int) -> list[str]:
    """Words of the chosen texts and assigned characters of the lowest planes, in any order."""
    rng = np.random.default_rng(seed)
    pieces = [piece for line in TEXTS[:-2] for piece in line.split(" ")]

    def piece():
        character = chr(rng.integers(0xE000, 0x1FFFF) if rng.random() < 0.3 else rng.integers(32, 0xD800))
        known = unicodedata.category(character) not in ("Cn", "Cs")
        return pieces[rng.integers(len(pieces))] if rng.random() < 0.7 or not known else character

    return ["".join(piece() + rng.choice(["", " "]) for _ in range(8)) for _ in range(count)]


def _images(side: int, seed: int) -> Iterator[Comparison]:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in IMAGE_SIZES]
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    expected = theirs([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    yield close(f"pixels at {side} x {side}", text.preprocess(images, side), expected.transpose(0, 2, 3, 1), FORWARD)
