"""LatentLPIPS: the distance of two latents in the features of a VGG16 that was trained on latents.

Kang et al., "Distilling Diffusion Models into Conditional GANs" (2024), arXiv 2405.05967. The network is torchvision's
VGG16 with batch normalisation, with as many inputs as the latents have channels and without its first three max-pools,
since latents are 8 times smaller than images. The distance is that of LPIPS (Zhang et al. 2018): features of five
positions are scaled to unit length over channels, squared differences are weighted by channel and averaged over space.

"E-LatentLPIPS" averages this over random augmentations of both latents, and its public code adds their mean absolute
difference. The comparison in the Latent Perceptual Loss paper (App. A.4) has neither, and neither has this module.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from lpl_jax.errors import InputError
from lpl_jax.losses.lpl import check_latents

# The five slices: channels and the indices of the convolutions in torchvision's `vgg16_bn().features`. Each convolution
# is followed by its normalisation and a ReLU.
SLICES = ((64, (0, 3)), (128, (7, 10)), (256, (14, 17, 20)), (512, (24, 27, 30)), (512, (34, 37, 40)))
POOLED = (4, 5)  # slices that end with a max-pool of 2, counted from 1
SMALLEST_SIDE = 4  # two max-pools leave one pixel of it
NORM_EPS = 1e-5  # of the batch normalisation
UNIT_EPS = 1e-8  # added to the squared length of a channel vector


class LatentLPIPS(flax.struct.PyTreeNode):
    """The frozen network: `params` are leaves, `latent_channels` is static. Pass it to jitted functions as an argument.

    `params`: for slice i = 1..5, `slice_{i}/layer_{j}` with torchvision's number j of the layer, a convolution (kernel,
    bias) or a normalisation (scale, bias, mean, var); and `lin_{0..4}/kernel` (1, 1, C, 1), the channels' weights.
    """

    params: Any
    latent_channels: int = flax.struct.field(pytree_node=False, default=4)


def latent_lpips(
    network: LatentLPIPS, *, z0_hat: Float[Array, "b h w c"], z0: Float[Array, "b h w c"]
) -> Float32[Array, "b"]:
    """The distance of every pair, (B,) float32. Gradients flow to `z0_hat` only.

    Args:
      network: frozen, for the autoencoder that the latents are of.
      z0_hat, z0: estimated and clean latents, scaled, (B, h, w, C), sides of at least 4.

    Raises:
      InputError: latents of different shapes, too small, or not with the channels of this network.
    """
    check_latents(z0_hat=z0_hat, z0=z0)
    _, height, width, channels = z0.shape
    if channels != network.latent_channels:
        raise InputError(f"latents with {channels} channels: this LatentLPIPS is for {network.latent_channels}")
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"latents of {height} x {width}: LatentLPIPS needs sides of at least {SMALLEST_SIDE}")
    params, z0 = lax.stop_gradient((network.params, z0))
    # Two calls: in one batched call the backward pass would run over both halves.
    total = jnp.zeros(z0.shape[0])
    for i, maps in enumerate(zip(_features(params, z0_hat), _features(params, z0), strict=True)):
        pred, target = map(_unit, maps)
        weighted = jnp.square(pred - target) * params[f"lin_{i}"]["kernel"][0, 0, :, 0]
        total += jnp.mean(jnp.sum(weighted, axis=-1), axis=(1, 2))
    return total


def shapes(latent_channels: int) -> dict:
    """The parameter tree with `jax.ShapeDtypeStruct` leaves.

    Raises InputError unless `latent_channels` is a positive integer.
    """
    if type(latent_channels) is not int or latent_channels < 1:
        raise InputError(f"latent_channels={latent_channels!r} is not a positive integer (4 or 16, as published)")
    flat, inputs = {}, latent_channels
    for number, (width, indices) in enumerate(SLICES, 1):
        for index in indices:
            convolution, norm = (f"slice_{number}/layer_{index + offset}" for offset in (0, 1))
            flat |= {f"{convolution}/kernel": (3, 3, inputs, width), f"{convolution}/bias": (width,)}
            flat |= {f"{norm}/{name}": (width,) for name in ("scale", "bias", "mean", "var")}
            inputs = width
        flat[f"lin_{number - 1}/kernel"] = (1, 1, width, 1)
    return unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in flat.items()}, sep="/")


def init(key: PRNGKeyArray, latent_channels: int = 4) -> LatentLPIPS:
    """Random weights, for tests and runs without a download: a distance, but not one that has learned anything.

    Activations keep their size through the layers, no statistic is trivial and channels weigh 0 to 2. Drawn on the
    host, since compiling generators for so many shapes would take longer.
    """
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(path, shape):
        if path[0].startswith("lin"):
            return generator.uniform(0.0, 2.0, shape).astype(np.float32)
        if path[-1] == "kernel":
            return generator.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        if path[-1] in ("scale", "var"):
            return generator.uniform(0.8, 1.2, shape).astype(np.float32)
        return 0.1 * generator.standard_normal(shape, np.float32)

    leaves: Any = flatten_dict(shapes(latent_channels))
    flat = {path: jnp.asarray(draw(path, leaf.shape)) for path, leaf in leaves.items()}
    return LatentLPIPS(unflatten_dict(flat), latent_channels)


def _features(params, latents):
    """What the five slices end in: sides h, h, h, h/2, h/4."""
    x, maps = latents.astype(jnp.float32), []
    for number, (_, indices) in enumerate(SLICES, 1):
        layers = params[f"slice_{number}"]
        for index in indices:
            x = nn.relu(_normalise(_convolve(x, **layers[f"layer_{index}"]), **layers[f"layer_{index + 1}"]))
        if number in POOLED:
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        maps.append(x)
    return maps


def _convolve(x, kernel, bias):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias


def _normalise(x, scale, bias, mean, var):
    """Batch normalisation by stored statistics."""
    return (x - mean) * (scale * lax.rsqrt(var + NORM_EPS)) + bias


def _unit(features):
    """Channel vectors of unit length. Where all channels are zero, so is the result, and its gradient is finite."""
    return features * lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + UNIT_EPS)
