"""Denoisers: the multimodal diffusion transformer, its configuration and presets, and its weights in files."""

from lpl_jax.denoisers.attention import attention
from lpl_jax.denoisers.config import PRESETS, MMDiTConfig, preset
from lpl_jax.denoisers.mmdit import MMDiT, init
from lpl_jax.denoisers.weights import load, save

__all__ = ["PRESETS", "MMDiT", "MMDiTConfig", "attention", "init", "load", "preset", "save"]
