"""Encoder and decoder of the Stable-Diffusion KL autoencoders in Flax Linen, with taps on the decoder's activations.

Shapes in comments are for an image side of 8h; all arrays are (batch, height, width, channels).
Architecture: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", as in diffusers' vae.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lpl_jax.autoencoders.config import AutoencoderConfig, TinyAutoencoderConfig

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # log-variances are clipped to this range, as the original's are


def conv(config: AutoencoderConfig | TinyAutoencoderConfig, features: int, size: int, name: str, **kwargs) -> nn.Conv:
    """A size x size convolution in the configured compute type, padded so that it keeps the side."""
    kwargs.setdefault("padding", size // 2)
    return nn.Conv(features, (size, size), dtype=jnp.dtype(config.dtype), name=name, **kwargs)


class Norm(nn.Module):
    """GroupNorm in float32 with a two-pass variance: these activations have outliers that the one-pass form loses."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."]) -> Float32[Array, "b ..."]:
        """Maps (B, H, W, C) or tokens (B, N, C); normalised over a group's channels and all of space."""
        channels, groups = x.shape[-1], self.groups
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
        axes = (1, 2, 4) if x.ndim == 4 else (1, 3)
        mean = grouped.mean(axes, keepdims=True)
        variance = jnp.square(grouped - mean).mean(axes, keepdims=True)
        normalised = ((grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return normalised * scale + bias


class Resnet(nn.Module):
    """Two convolutions, each after norm and activation, around a residual, projected where the width changes."""

    config: AutoencoderConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.features}"]:
        """The same side, `features` channels."""
        h = nn.silu(Norm(self.config.norm_groups, name="norm1")(x)).astype(x.dtype)
        h = conv(self.config, self.features, 3, "conv1")(h)
        h = nn.silu(Norm(self.config.norm_groups, name="norm2")(h)).astype(x.dtype)
        h = conv(self.config, self.features, 3, "conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.config, self.features, 1, "conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Single-head self-attention over all positions; logits and softmax in float32."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Adds to every position what it attends to."""
        batch, height, width, channels = x.shape
        dtype = jnp.dtype(self.config.dtype)
        tokens = Norm(self.config.norm_groups, name="group_norm")(x.reshape(batch, height * width, channels)).astype(
            x.dtype
        )
        query, key, value = (nn.Dense(channels, dtype=dtype, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
        logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32) * channels**-0.5
        attended = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits).astype(dtype), value)
        return x + nn.Dense(channels, dtype=dtype, name="to_out")(attended).reshape(x.shape)


class MidBlock(nn.Module):
    """Two residual blocks, with self-attention between them in most models."""

    config: AutoencoderConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.features}"]:
        """The same side, `features` channels."""
        x = Resnet(self.config, self.features, name="resnet_0")(x)
        if self.config.mid_attention:
            x = Attention(self.config, name="attention")(x)
        return Resnet(self.config, self.features, name="resnet_1")(x)


class DownBlock(nn.Module):
    """A level of the encoder: residual blocks, then a convolution of stride 2."""

    config: AutoencoderConfig
    features: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b _h _w _c"]) -> Float[Array, "b _h _w {self.features}"]:
        """Half the side with `downsample`, `features` channels."""
        for index in range(self.config.encoder_resnets):
            x = Resnet(self.config, self.features, name=f"resnet_{index}")(x)
        if self.downsample:  # padded on the right and below only, as the original is
            padding = ((0, 1), (0, 1))
            x = conv(self.config, self.features, 3, "downsample", strides=(2, 2), padding=padding)(x)
        return x


class UpBlock(nn.Module):
    """A level of the decoder: residual blocks, then nearest-neighbour upsampling and a convolution."""

    config: AutoencoderConfig
    features: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b _h _w _c"]) -> Float[Array, "b _h _w {self.features}"]:
        """Twice the side with `upsample`, `features` channels."""
        for index in range(self.config.decoder_resnets):
            x = Resnet(self.config, self.features, name=f"resnet_{index}")(x)
        if self.upsample:
            x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest
            x = conv(self.config, self.features, 3, "upsample")(x)
        return x


class Encoder(nn.Module):
    """Images (B, 8h, 8w, 3) in [-1, 1] -> concatenated mean and log-variance (B, h, w, 2C), float32."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b height width 3"]) -> Float32[Array, "b h w moments"]:
        """Moments of the posterior, one position for `config.downsample` pixels along each side."""
        config = self.config
        widths = config.encoder_channels
        x = conv(config, widths[0], 3, "conv_in")(images)
        for level, width in enumerate(widths):
            x = DownBlock(config, width, downsample=level < len(widths) - 1, name=f"down_{level}")(x)
        x = MidBlock(config, widths[-1], name="mid")(x)
        x = nn.silu(Norm(config.norm_groups, name="norm_out")(x)).astype(x.dtype)
        x = conv(config, 2 * config.latent_channels, 3, "conv_out")(x)
        if config.quant_conv:
            x = conv(config, 2 * config.latent_channels, 1, "quant_conv")(x)
        return x.astype(jnp.float32)


class ConditionEncoder(nn.Module):
    """Known part of an image (B, 8h, 8w, 3) -> what the asymmetric decoder blends in.

    One map before each up block and one after the last: sides h, 2h, 4h, 8h, 8h.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b height width 3"]) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """From the coarsest map, as the decoder meets them."""
        widths = self.config.decoder_channels
        maps = []
        for index, width in enumerate((*widths, widths[-1])):
            x, name = nn.relu(maps[-1]) if maps else image, f"layers_{index}"
            if index < 2:
                x = conv(self.config, width, 3, name)(x)
            else:
                x = conv(self.config, width, 4, name, strides=(2, 2), padding=1)(x)
            maps.append(x)
        return tuple(reversed(maps))


def _blend(x, known, mask):
    """Maps x where the mask is 1, `known` where it is 0; the mask is reduced to x's side by nearest neighbour."""
    step = mask.shape[1] // x.shape[1]
    mask = mask[:, ::step, ::step].astype(x.dtype)
    return x * mask + known * (1 - mask)


class Decoder(nn.Module):
    """Raw latents (B, h, w, C) -> images (B, 8h, 8w, 3), or the first feature maps on the way there.

    The taps are the output of the middle block and of every up block after its upsampler: sides h, 2h, 4h, 8h, 8h
    with four levels. Any number of levels has one tap more.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        num_taps: int | None = None,
        post_quant_conv: bool = True,
        remat: bool = False,
        image: Float[Array, "b height width 3"] | None = None,
        mask: Float[Array, "b height width 1"] | None = None,
    ) -> Float32[Array, "b height width 3"] | tuple[Float[Array, "b _h _w _c"], ...]:
        """num_taps: None for images (float32); otherwise stop after that many taps and return them as a tuple.

        post_quant_conv: False feeds the latents to `conv_in` directly (the public PyTorch example of the loss does).
        remat: recompute the middle block and each up block in the backward pass instead of keeping their insides.
        image, mask: (B, 8h, 8w, 3) and (B, 8h, 8w, 1); where the mask is 0 the image is known and blended in.
        """
        config = self.config
        widths = config.decoder_channels[::-1]
        mid_block, up_block = (nn.remat(MidBlock), nn.remat(UpBlock)) if remat else (MidBlock, UpBlock)
        x = latents
        if config.post_quant_conv and post_quant_conv:
            x = conv(config, config.latent_channels, 1, "post_quant_conv")(x)
        known = None
        if image is not None and mask is not None:
            known = ConditionEncoder(config, name="condition_encoder")((1 - mask) * image)
        x = conv(config, widths[0], 3, "conv_in")(x)
        taps = [x := mid_block(config, widths[0], name="mid")(x)]
        for level, width in enumerate(widths[: None if num_taps is None else num_taps - 1]):
            x = x if known is None else _blend(x, known[level], mask)
            x = up_block(config, width, upsample=level < len(widths) - 1, name=f"up_{level}")(x)
            taps.append(x)
        if num_taps is not None:
            return tuple(taps)
        x = x if known is None else _blend(x, known[-1], mask)
        x = nn.silu(Norm(config.norm_groups, name="norm_out")(x)).astype(x.dtype)
        return conv(config, 3, 3, "conv_out")(x).astype(jnp.float32)
