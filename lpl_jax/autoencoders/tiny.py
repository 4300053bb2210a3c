"""Encoder and decoder of the TAESD family in Flax Linen: plain convolutions and residual blocks of one width.

Architecture: Ollin Boer Bohan, "Tiny AutoEncoder for Stable Diffusion" (github.com/madebyollin/taesd). Layers carry the
number that they have in the PyTorch original's sequence, activations and upsamplers counted.
Shapes in comments are for an image side of 8h; all arrays are (batch, height, width, channels).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lpl_jax.autoencoders.config import TinyAutoencoderConfig
from lpl_jax.autoencoders.model import MIN_LOGVAR, Norm, conv


class TinyBlock(nn.Module):
    """Three convolutions around a residual; `norm` adds a branch that sees the whole image through a GroupNorm."""

    config: TinyAutoencoderConfig
    width: int
    norm: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.width}"]:
        """The same side, `width` channels."""
        if self.norm:
            h = conv(self.config, 4 * self.width, 1, "pool_0", use_bias=False)(x)
            h = nn.relu(Norm(4, epsilon=1e-5, name="pool_1")(h)).astype(x.dtype)
            x = x + conv(self.config, self.width, 1, "pool_3", use_bias=False)(h)
        h = nn.relu(conv(self.config, self.width, 3, "conv_0")(x))
        h = nn.relu(conv(self.config, self.width, 3, "conv_2")(h))
        return nn.relu(conv(self.config, self.width, 3, "conv_4")(h) + x)


class TinyEncoder(nn.Module):
    """Images (B, 8h, 8w, 3) in [-1, 1] -> mean and constant log-variance (B, h, w, 2C), float32."""

    config: TinyAutoencoderConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b height width 3"]) -> Float32[Array, "b h w moments"]:
        """Moments, one position for `config.downsample` pixels along each side."""
        config, layer = self.config, 0
        x = (images + 1) / 2  # the network was trained on [0, 1]
        last = len(config.encoder_blocks) - 1
        for level, blocks in enumerate(config.encoder_blocks):
            first = level == 0
            strides = (1, 1) if first else (2, 2)
            x = conv(config, config.encoder_width, 3, f"layers_{layer}", strides=strides, use_bias=first)(x)
            norm = config.midblock_norm and level == last
            for index in range(layer + 1, layer + 1 + blocks):
                x = TinyBlock(config, config.encoder_width, norm, name=f"layers_{index}")(x)
            layer += 1 + blocks
        mean = conv(config, config.latent_channels, 3, f"layers_{layer}")(x).astype(jnp.float32)
        return jnp.concatenate([mean, jnp.full_like(mean, MIN_LOGVAR)], axis=-1)  # there is no variance to predict


class TinyDecoder(nn.Module):
    """Raw latents (B, h, w, C) -> images (B, 8h, 8w, 3), or the first feature maps on the way there.

    The taps are the outputs of the last block of each level, before its upsampler: sides h, 2h, 4h, 8h.
    """

    config: TinyAutoencoderConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        num_taps: int | None = None,
        post_quant_conv: bool = True,
        remat: bool = False,
    ) -> Float32[Array, "b height width 3"] | tuple[Float[Array, "b _h _w _c"], ...]:
        """Arguments as of `model.Decoder`; there is no post_quant_conv to skip."""
        config = self.config
        block = nn.remat(TinyBlock) if remat else TinyBlock
        width, levels = config.decoder_width, len(config.decoder_blocks)
        x = jnp.tanh(latents / 3) * 3  # a soft clamp of the latents
        x = nn.relu(conv(config, width, 3, "layers_0")(x))
        taps, layer = [], 2
        for level, blocks in enumerate(config.decoder_blocks[:num_taps]):
            for index in range(layer, layer + blocks):
                x = block(config, width, config.midblock_norm and level == 0, name=f"layers_{index}")(x)
            taps.append(x)
            layer += blocks
            if level < levels - 1 and len(taps) != num_taps:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest
                x = conv(config, width, 3, f"layers_{layer + 1}", use_bias=False)(x)
                layer += 2
        if num_taps is not None:
            return tuple(taps)
        return conv(config, 3, 3, f"layers_{layer}")(x).astype(jnp.float32) * 2 - 1
