"""Denoisers: the multimodal diffusion transformer, its configuration and presets."""

from lpl_jax.denoisers.attention import attention
from lpl_jax.denoisers.config import PRESETS, MMDiTConfig, preset
from lpl_jax.denoisers.mmdit import MMDiT, init

__all__ = ["MMDiT", "MMDiTConfig", "PRESETS", "attention", "init", "preset"]
