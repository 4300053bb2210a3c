"""Text conditioning: CLIP's text tower, its vision tower (for CLIPScore), tokeniser and image preprocessing."""

from lpl_jax.text.config import ClipConfig, TextConfig, VisionConfig
from lpl_jax.text.images import preprocess
from lpl_jax.text.model import Clip, Features, init
from lpl_jax.text.tokenizer import Tokenizer, WordTokenizer
from lpl_jax.text.weights import load, load_tokenizer, save

__all__ = [
    "Clip",
    "ClipConfig",
    "Features",
    "TextConfig",
    "Tokenizer",
    "VisionConfig",
    "WordTokenizer",
    "init",
    "load",
    "load_tokenizer",
    "preprocess",
    "save",
]
