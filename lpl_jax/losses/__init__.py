"""Perceptual losses on latents, and the losses that the paper compares them with."""

from lpl_jax.losses.calibration import calibrate_weight, calibrate_weight_by_variance, perceptual_share
from lpl_jax.losses.chunked import latent_perceptual_loss
from lpl_jax.losses.comparison import ComparisonConfig, comparison_losses
from lpl_jax.losses.config import LPLConfig
from lpl_jax.losses.gate import active_samples, gated_perceptual_loss
from lpl_jax.losses.latent_lpips import LatentLPIPS, latent_lpips
from lpl_jax.losses.lpl import perceptual_distance
from lpl_jax.losses.outliers import outlier_mask
from lpl_jax.losses.reweighting import LossVariances, init_variances, reweighted, update_variances
from lpl_jax.losses.self_perceptual import block_features, self_perceptual_loss

__all__ = [
    "ComparisonConfig",
    "LPLConfig",
    "LatentLPIPS",
    "LossVariances",
    "active_samples",
    "block_features",
    "calibrate_weight",
    "calibrate_weight_by_variance",
    "comparison_losses",
    "gated_perceptual_loss",
    "init_variances",
    "latent_lpips",
    "latent_perceptual_loss",
    "outlier_mask",
    "perceptual_distance",
    "perceptual_share",
    "reweighted",
    "self_perceptual_loss",
    "update_variances",
]
