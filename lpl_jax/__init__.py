"""Latent Perceptual Loss for latent diffusion transformers, in JAX and Flax."""

__version__ = "0.1.0"
