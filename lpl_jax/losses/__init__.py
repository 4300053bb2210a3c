"""Perceptual losses on latents."""

from lpl_jax.losses.calibration import calibrate_weight, perceptual_share
from lpl_jax.losses.config import TAP_NAMES, LPLConfig
from lpl_jax.losses.gate import active_samples, gated_perceptual_loss
from lpl_jax.losses.lpl import latent_perceptual_loss, perceptual_distance
from lpl_jax.losses.outliers import outlier_mask

__all__ = [
    "TAP_NAMES",
    "LPLConfig",
    "active_samples",
    "calibrate_weight",
    "gated_perceptual_loss",
    "latent_perceptual_loss",
    "outlier_mask",
    "perceptual_distance",
    "perceptual_share",
]
