"""Frozen first stages: encoders, decoders and the decoder features that the Latent Perceptual Loss compares."""

from lpl_jax.autoencoders.autoencoder import Autoencoder, Moments, init
from lpl_jax.autoencoders.config import AutoencoderConfig, TinyAutoencoderConfig, latent_scale
from lpl_jax.autoencoders.weights import load, save

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Moments",
    "TinyAutoencoderConfig",
    "init",
    "latent_scale",
    "load",
    "save",
]
