"""Text conditioning: CLIP's text tower, its vision tower (for CLIPScore), tokeniser and image preprocessing."""

from lpl_jax.text.config import ClipConfig, TextConfig, VisionConfig
from lpl_jax.text.images import preprocess
from lpl_jax.text.model import Clip, Features, init
from lpl_jax.text.tokenizer import Tokenizer
from lpl_jax.text.weights import load, save

__all__ = [
    "Clip",
    "ClipConfig",
    "Features",
    "TextConfig",
    "Tokenizer",
    "VisionConfig",
    "init",
    "load",
    "preprocess",
    "save",
]
