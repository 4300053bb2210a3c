"""Text conditioning: CLIP's text tower, its vision tower (for CLIPScore), tokeniser and image preprocessing."""

from lpl_jax.text.conditioning import (
    Condition,
    TextConditioner,
    TextSource,
    abstract_conditioner,
    load_conditioner,
    tower_fingerprint,
)
from lpl_jax.text.config import ClipConfig, TextConfig, VisionConfig
from lpl_jax.text.images import preprocess
from lpl_jax.text.model import Clip, Features, init
from lpl_jax.text.tokenizer import Tokenizer, WordTokenizer
from lpl_jax.text.weights import load, load_tokenizer, save

__all__ = [
    "Clip",
    "ClipConfig",
    "Condition",
    "Features",
    "TextConditioner",
    "TextConfig",
    "TextSource",
    "Tokenizer",
    "VisionConfig",
    "WordTokenizer",
    "abstract_conditioner",
    "init",
    "load",
    "load_conditioner",
    "load_tokenizer",
    "preprocess",
    "save",
    "tower_fingerprint",
]
