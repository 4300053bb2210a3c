"""The frozen first stage: a pytree that is handed to jitted functions."""

import hashlib
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lpl_jax.autoencoders.config import AutoencoderConfig
from lpl_jax.autoencoders.model import Decoder, Encoder
from lpl_jax.errors import InputError


class Moments(NamedTuple):
    """Posterior of an encoder in raw (unscaled) units: mean and log-variance, each (B, h, w, C) float32."""

    mean: jax.Array
    logvar: jax.Array


@flax.struct.dataclass
class Autoencoder:
    """A frozen KL autoencoder: `params` are leaves, `config` is static.

    Pass it to jitted functions as an argument; captured as a closure its weights would become constants of the program.
    """

    params: Any
    config: AutoencoderConfig = flax.struct.field(pytree_node=False)

    def encode(self, images: jax.Array) -> Moments:
        """Images (B, H, W, 3) in [-1, 1] -> raw posterior moments (B, H/8, W/8, C).

        Raises:
          InputError: a side that the autoencoder's downsampling factor does not divide.
        """
        factor = self.config.downsample
        if images.shape[1] % factor or images.shape[2] % factor:
            size = f"{images.shape[1]}x{images.shape[2]}"
            raise InputError(f"images of {size} pixels: {self.config.name} needs sides divisible by {factor}")
        moments = Encoder(self.config).apply({"params": self.params["encoder"]}, images)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

    def scale(self, raw: jax.Array) -> jax.Array:
        """Raw latents -> scaled latents, the unit of everything outside the autoencoder."""
        return (raw - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, latents: jax.Array) -> jax.Array:
        """Scaled latents -> raw latents."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents (B, h, w, C) -> images (B, 8h, 8w, 3), float32, not clipped."""
        return self._decoder(latents)

    def features(
        self, latents: jax.Array, num_taps: int = 5, post_quant_conv: bool = True, remat: bool = False
    ) -> tuple[jax.Array, ...]:
        """Decoder activations for scaled latents (B, h, w, C): the maps phi_l of the Latent Perceptual Loss (Eq. 2).

        Args:
          num_taps: how many, from the latent up: the middle block (side h), then up blocks 0.. (2h, 4h, 8h, 8h).
          post_quant_conv: False skips that 1x1 convolution, as the public PyTorch example does.
          remat: recompute each block in the backward pass.
        """
        if not 1 <= num_taps <= self.config.num_taps:
            raise InputError(f"num_taps={num_taps}: {self.config.name} has 1 to {self.config.num_taps}")
        return self._decoder(latents, num_taps=num_taps, post_quant_conv=post_quant_conv, remat=remat)

    def _decoder(self, latents, **kwargs):
        if latents.shape[-1] != self.config.latent_channels:
            raise InputError(
                f"latents with {latents.shape[-1]} channels: {self.config.name} has {self.config.latent_channels}"
            )
        return Decoder(self.config).apply({"params": self.params["decoder"]}, self.unscale(latents), **kwargs)


def init(config: AutoencoderConfig, key: jax.Array) -> Autoencoder:
    """An autoencoder with random weights."""
    encoder_key, decoder_key = jax.random.split(key)
    side = config.downsample
    encoder = Encoder(config).init(encoder_key, jnp.zeros((1, side, side, 3)))
    decoder = Decoder(config).init(decoder_key, jnp.zeros((1, 1, 1, config.latent_channels)))
    return Autoencoder({"encoder": encoder["params"], "decoder": decoder["params"]}, config)


def weights_hash(autoencoder: Autoencoder) -> str:
    """SHA-256 of all parameters (names, shapes, float32 values) in hexadecimal: equal for equal weights only."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten_dict(autoencoder.params, sep="/").items()):
        digest.update(f"{path}{array.shape}".encode())
        digest.update(np.asarray(array, np.float32).tobytes())
    return digest.hexdigest()
