"""The FID network: Inception v3 as TensorFlow published it on 2015-12-05, in Flax Linen.

Architecture: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2015), in the form that the
weights were trained in, which is not torchvision's: 1008 classes, average pools that leave the padding out of the mean,
and a maximum in place of the last block's average. Modules have the names of PyTorch's ports (pytorch-fid,
torch-fidelity). Arrays are NHWC, float32; products use the highest precision that the device has, since TPUs and GPUs
would take fewer bits otherwise.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lpl_jax.errors import InputError
from lpl_jax.evaluation.resize import tf1_bilinear

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
NORM_EPS = 1e-3
HIGHEST = jax.lax.Precision.HIGHEST


class FrozenNorm(nn.Module):
    """Batch normalisation by stored statistics."""

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        scale, var = (self.param(name, nn.initializers.ones, shape) for name in ("scale", "var"))
        bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ("bias", "mean"))
        return (x - mean) * (scale / jnp.sqrt(var + NORM_EPS)) + bias


class Unit(nn.Module):
    """Convolution without bias, normalisation, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            use_bias=False,
            precision=HIGHEST,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
        )
        return nn.relu(FrozenNorm(name="bn")(conv(x)))


def _unit(x, name, features, height=1, width=None, **kwargs):
    return Unit(features, (height, width or height), name=name, **kwargs)(x)


def _units(x, *specs):
    """Units in sequence, each (name, features, height[, width])."""
    for spec in specs:
        x = _unit(x, *spec)
    return x


def _halve(x, name, features):
    """3x3 unit of stride 2 without padding."""
    return _unit(x, name, features, 3, stride=2, padding="VALID")


def _max_pool(x, stride=2, padding="VALID"):
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _average_pool(x):
    """3x3 means of stride 1 over what lies inside the image: padding does not count."""
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(side), np.ones(3), "same") for side in x.shape[1:3])
    return sums / np.outer(rows, columns)[..., None].astype(np.float32)


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


class Mixed5(nn.Module):
    """35x35 blocks (`mixed` to `mixed_2` in TensorFlow's graph)."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        return _join(
            _unit(x, "branch1x1", 64),
            _units(x, ("branch5x5_1", 48), ("branch5x5_2", 64, 5)),
            _units(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
            _unit(_average_pool(x), "branch_pool", self.pool_features),
        )


class Mixed6a(nn.Module):
    """From 35x35 to 17x17 (`mixed_3`)."""

    @nn.compact
    def __call__(self, x):
        double = _units(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3))
        return _join(_halve(x, "branch3x3", 384), _halve(double, "branch3x3dbl_3", 96), _max_pool(x))


class Mixed6(nn.Module):
    """17x17 blocks with factorised 7x7 convolutions (`mixed_4` to `mixed_7`)."""

    width: int

    @nn.compact
    def __call__(self, x):
        width = self.width
        single = _units(x, ("branch7x7_1", width), ("branch7x7_2", width, 1, 7), ("branch7x7_3", 192, 7, 1))
        double = _units(x, ("branch7x7dbl_1", width), ("branch7x7dbl_2", width, 7, 1), ("branch7x7dbl_3", width, 1, 7))
        double = _units(double, ("branch7x7dbl_4", width, 7, 1), ("branch7x7dbl_5", 192, 1, 7))
        return _join(_unit(x, "branch1x1", 192), single, double, _unit(_average_pool(x), "branch_pool", 192))


class Mixed7a(nn.Module):
    """From 17x17 to 8x8 (`mixed_8`)."""

    @nn.compact
    def __call__(self, x):
        small = _unit(x, "branch3x3_1", 192)
        large = _units(x, ("branch7x7x3_1", 192), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1))
        return _join(_halve(small, "branch3x3_2", 320), _halve(large, "branch7x7x3_4", 192), _max_pool(x))


class Mixed7(nn.Module):
    """8x8 blocks (`mixed_9`, and `mixed_10`, whose pool takes the maximum)."""

    maximum: bool

    @nn.compact
    def __call__(self, x):
        single = _unit(x, "branch3x3_1", 384)
        double = _units(x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3))
        pooled = _max_pool(x, stride=1, padding="SAME") if self.maximum else _average_pool(x)
        return _join(
            _unit(x, "branch1x1", 320),
            _unit(single, "branch3x3_2a", 384, 1, 3),
            _unit(single, "branch3x3_2b", 384, 3, 1),
            _unit(double, "branch3x3dbl_3a", 384, 1, 3),
            _unit(double, "branch3x3dbl_3b", 384, 3, 1),
            _unit(pooled, "branch_pool", 192),
        )


class Classifier(nn.Module):
    """The last layer, which has a bias that the logits here are without."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], CLASSES))
        self.param("bias", nn.initializers.zeros, (CLASSES,))
        return jnp.matmul(x, kernel, precision=HIGHEST)


class Network(nn.Module):
    """Images (B, 299, 299, 3) in [-1, 1) -> what `Inception.features` returns."""

    @nn.compact
    def __call__(self, x):
        x = _halve(x, "Conv2d_1a_3x3", 32)
        x = _unit(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = _max_pool(_unit(x, "Conv2d_2b_3x3", 64, 3))
        x = _unit(x, "Conv2d_3b_1x1", 80)
        x = _max_pool(_unit(x, "Conv2d_4a_3x3", 192, 3, padding="VALID"))
        for letter, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            x = Mixed5(pool_features, name=f"Mixed_5{letter}")(x)
        x = Mixed6a(name="Mixed_6a")(x)
        x = Mixed6(128, name="Mixed_6b")(x)
        x = Mixed6(160, name="Mixed_6c")(x)
        x = Mixed6(160, name="Mixed_6d")(x)
        # The block's first branch, 1x1, is the first to be joined: these are its channels (`mixed_6/conv`).
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = Mixed6(192, name="Mixed_6e")(x)
        x = Mixed7a(name="Mixed_7a")(x)
        x = Mixed7(maximum=False, name="Mixed_7b")(x)
        x = Mixed7(maximum=True, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        return {"pool": pool, "spatial": spatial, "logits": Classifier(name="fc")(pool)}


class Inception(flax.struct.PyTreeNode):
    """The frozen FID network. Pass it to jitted functions as an argument, as in `jax.jit(Inception.features)`."""

    params: Any

    def features(self, images: jax.Array) -> dict[str, jax.Array]:
        """8-bit images -> features, all float32.

        Images are resized to 299x299 by `tf1_bilinear` without rounding, then mapped by (x - 128) / 128.

        Args:
          images: (B, H, W, 3) uint8, of any size.

        Returns:
          "pool" (B, 2048): mean of the last block, `pool_3` in TensorFlow's graph. FID, precision and recall.
          "spatial" (B, 2023): the first 7 channels of the 1x1 branch of the 17x17 block `mixed_6` (Mixed_6d in PyTorch)
            after its ReLU, row by row with the channel last: what guided-diffusion takes for sFID, after Nash et al.,
            "Generating Images with Sparse Representations" (2021).
          "logits" (B, 1008): without the last layer's bias, as guided-diffusion and torch-fidelity take them for the
            Inception score.

        Raises:
          InputError: another shape or type.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or images.dtype != jnp.uint8:
            raise InputError(f"images of shape {images.shape}, {images.dtype}; needed: (B, H, W, 3), uint8")
        resized = tf1_bilinear(jnp.asarray(images, jnp.float32), SIDE, SIDE)
        return cast(dict[str, jax.Array], Network().apply({"params": self.params}, (resized - 128) / 128))


@functools.cache
def shapes() -> dict:
    """The parameter tree with `jax.ShapeDtypeStruct` leaves; not to be changed."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return jax.eval_shape(Network().init, jax.random.key(0), images)["params"]


def init(key: jax.Array) -> Inception:
    """Random weights, for tests: activations keep their size through the layers, and no statistic is trivial.

    They are drawn on the host, since compiling generators for a hundred shapes would take longer.
    """
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(name, shape):
        if name == "kernel":
            gain = 2 if len(shape) == 4 else 1  # a ReLU follows a convolution
            return generator.standard_normal(shape, np.float32) * np.float32(np.sqrt(gain / np.prod(shape[:-1])))
        if name in ("scale", "var"):
            return generator.uniform(0.8, 1.2, shape).astype(np.float32)
        return 0.1 * generator.standard_normal(shape, np.float32)

    flat = sorted(flatten_dict(shapes()).items())
    return Inception(unflatten_dict({path: jnp.asarray(draw(path[-1], leaf.shape)) for path, leaf in flat}))
