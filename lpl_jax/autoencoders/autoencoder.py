"""The frozen first stage: a pytree that is passed to jitted functions."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from lpl_jax.autoencoders.config import AutoencoderConfig, TinyAutoencoderConfig, latent_scale
from lpl_jax.autoencoders.model import MAX_LOGVAR, MIN_LOGVAR, Decoder, Encoder
from lpl_jax.autoencoders.tiny import TinyDecoder, TinyEncoder
from lpl_jax.errors import InputError
from lpl_jax.parallel import device_memory


class Moments(NamedTuple):
    """Posterior of an encoder in raw (unscaled) units: mean and log-variance, each (B, h, w, C) float32.

    A tiny autoencoder has no variance: its log-variance is the smallest, -30, a standard deviation of 3e-7.
    """

    mean: Float32[Array, "b h w c"]
    logvar: Float32[Array, "b h w c"]


class Autoencoder(flax.struct.PyTreeNode):
    """A frozen autoencoder: `params` are leaves, `config` is static and decides what network they are the weights of.

    Pass it to jitted functions as an argument; captured as a closure its weights would become constants of the program.
    """

    params: Any
    config: AutoencoderConfig | TinyAutoencoderConfig = flax.struct.field(pytree_node=False)

    def encode(self, images: Float[Array, "b height width 3"]) -> Moments:
        """Images (B, H, W, 3) in [-1, 1] -> raw posterior moments (B, H/8, W/8, C).

        Raises:
          InputError: a side that the autoencoder's downsampling factor does not divide.
        """
        factor = self.config.downsample
        if images.shape[1] % factor or images.shape[2] % factor:
            size = f"{images.shape[1]}x{images.shape[2]}"
            raise InputError(f"images of {size} pixels: {self.config.name} needs sides divisible by {factor}")
        encoder, _ = _networks(self.config)
        mean, logvar = jnp.split(_apply(encoder, self.params["encoder"], images), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR))

    def check_side(self, side: int, name: str = "resolution") -> None:
        """Raises InputError for images whose sides its factor does not divide, or of which no device here holds one.

        name: what the side was given as, for messages.
        """
        if side % self.config.downsample:
            raise InputError(
                f"{name}={side}: autoencoder {self.config.name} needs a multiple of {self.config.downsample} pixels"
            )
        needed, there = self.config.attention_bytes(side), device_memory()
        if there is not None and needed > there:
            raise InputError(
                f"{name}={side}: the attention of autoencoder {self.config.name} takes {needed / 2**30:,.1f} GiB for "
                f"one such image, and a device here has {there / 2**30:,.1f} GiB: give a smaller one"
            )

    def without_encoder(self) -> "Autoencoder":
        """What decodes, for programs whose latents were encoded before: `encode` fails."""
        params = {name: leaf for name, leaf in self.params.items() if name != "encoder"}
        return dataclasses.replace(self, params=params)

    def with_dtype(self, dtype: str) -> "Autoencoder":
        """The same that computes in this type, float32 or bfloat16; parameters are float32 in both."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, dtype=dtype))

    def scale(self, raw: Float[Array, "*latents"]) -> Float[Array, "*latents"]:
        """Raw latents -> scaled latents, the unit of everything outside the autoencoder."""
        offset, factor = latent_scale(self.config)
        return (raw - offset) * factor

    def unscale(self, latents: Float[Array, "*latents"]) -> Float[Array, "*latents"]:
        """Scaled latents -> raw latents."""
        offset, factor = latent_scale(self.config)
        return latents / factor + offset

    def decode(
        self,
        latents: Float[Array, "b h w c"],
        *,
        image: Float[Array, "b height width 3"] | None = None,
        mask: Float[Array, "b height width 1"] | None = None,
    ) -> Float32[Array, "b height width 3"]:
        """Scaled latents (B, h, w, C) -> images (B, 8h, 8w, 3), float32, not clipped.

        Args:
          image, mask: for an asymmetric autoencoder, both or none: an image (B, 8h, 8w, 3) in [-1, 1] and a mask
            (B, 8h, 8w, 1) that is 0 where the image is known and shall be kept, 1 where it is to be decoded.

        Raises:
          InputError: an image without a mask or the other way round, another shape, or no asymmetric autoencoder.
        """
        if image is None and mask is None:
            return self._decoder(latents)
        if not getattr(self.config, "mask_condition", False):
            raise InputError(f"decode with image and mask: {self.config.name} is no asymmetric autoencoder")
        batch, *sides = latents.shape[:3]
        expected = (batch, *(side * self.config.downsample for side in sides))
        for name, given, channels in (("image", image, 3), ("mask", mask, 1)):
            if given is None or given.shape != (*expected, channels):
                shape = None if given is None else given.shape
                raise InputError(f"decode: {name} of shape {shape}; these latents need {(*expected, channels)}")
        return self._decoder(latents, image=image, mask=mask)

    def features(
        self,
        latents: Float[Array, "b h w c"],
        num_taps: int | None = None,
        post_quant_conv: bool = True,
        remat: bool = False,
    ) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """Decoder activations for scaled latents (B, h, w, C): the maps phi_l of the Latent Perceptual Loss (Eq. 2).

        Args:
          num_taps: how many, from the latent up; None for all, `config.num_taps`. A KL autoencoder has the middle block
            (side h), then every up block (of factor 8: 2h, 4h, 8h, 8h); a tiny one has one for each resolution (h, 2h,
            4h, 8h). Their names are `config.tap_names`.
          post_quant_conv: False skips that 1x1 convolution, as the public PyTorch example does.
          remat: recompute each block in the backward pass.
        """
        num_taps = self.config.num_taps if num_taps is None else num_taps
        if not 1 <= num_taps <= self.config.num_taps:
            raise InputError(f"num_taps={num_taps}: {self.config.name} has 1 to {self.config.num_taps}")
        return self._decoder(latents, num_taps=num_taps, post_quant_conv=post_quant_conv, remat=remat)

    def _decoder(self, latents, **kwargs) -> Any:
        if latents.shape[-1] != self.config.latent_channels:
            raise InputError(
                f"latents with {latents.shape[-1]} channels: {self.config.name} has {self.config.latent_channels}"
            )
        _, decoder = _networks(self.config)
        return _apply(decoder, self.params["decoder"], self.unscale(latents), **kwargs)


def _apply(network: nn.Module, params: Any, *args, **kwargs) -> Any:
    return network.apply({"params": params}, *args, **kwargs)


def _networks(config: AutoencoderConfig | TinyAutoencoderConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the family that the configuration belongs to."""
    if isinstance(config, TinyAutoencoderConfig):
        return TinyEncoder(config), TinyDecoder(config)
    return Encoder(config), Decoder(config)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # so that the networks are traced once for all its uses
def init(config: AutoencoderConfig | TinyAutoencoderConfig, key: PRNGKeyArray) -> Autoencoder:
    """An autoencoder with random weights."""
    encoder_key, decoder_key = jax.random.split(key)
    encoder, decoder = _networks(config)
    side = config.downsample
    image, latents = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1, 1, config.latent_channels))
    condition: dict[str, Any] = {}
    if isinstance(config, AutoencoderConfig) and config.mask_condition:
        condition = dict(image=image, mask=image[..., :1])
    return Autoencoder(
        {
            "encoder": encoder.init(encoder_key, image)["params"],
            "decoder": decoder.init(decoder_key, latents, **condition)["params"],
        },
        config,
    )
