"""Decoder-like feature maps with outlier blobs, and a random tiny autoencoder."""

import jax
import numpy as np
import pytest

from lpl_jax.autoencoders import AutoencoderConfig, init


def smooth_noise(rng, batch, size, channels):
    """Unit-variance maps whose neighbouring pixels are alike."""
    coarse = rng.standard_normal((batch, -(-size // 4), -(-size // 4), channels)).repeat(4, 1).repeat(4, 2)
    fine = rng.standard_normal((batch, size, size, channels))
    return 0.8 * coarse[:, :size, :size] + 0.6 * fine


def feature_pair(seed, sizes, channels, batch=2, blobs=True):
    """Clean and predicted maps (B, H, W, C) in float32: correlated, on channel-wise scales, with blobs in both.

    Blobs have 2 to 6 pixels a side and lie anywhere, also at borders: half of them in one of the two maps only.
    """
    rng = np.random.default_rng(seed)
    clean, predicted = [], []
    for size, width in zip(sizes, channels, strict=True):
        scale = np.exp(0.5 * rng.standard_normal(width))
        target = scale * smooth_noise(rng, batch, size, width) + rng.standard_normal(width)
        pred = 0.8 * target + 0.4 * scale * smooth_noise(rng, batch, size, width)
        for b in range(batch if blobs else 0):
            for c in range(0, width, 2):
                for maps in ((target,), (pred,), (target, pred)):
                    side, row, column = rng.integers(2, 7), rng.integers(size), rng.integers(size)
                    height = rng.choice([-1, 1]) * rng.uniform(12, 20) * scale[c]
                    for each in maps:
                        each[b, row : row + side, column : column + side, c] += height
        clean.append(target.astype(np.float32))
        predicted.append(pred.astype(np.float32))
    return tuple(predicted), tuple(clean)


@pytest.fixture(scope="session")
def make_features():
    return feature_pair


@pytest.fixture(scope="session")
def tiny_autoencoder():
    """Random weights without running the initialisers, which would take longer than the tests."""
    shapes = jax.eval_shape(lambda: init(AutoencoderConfig.tiny(), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def fill(leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
        return (rng.standard_normal(leaf.shape) * spread + (len(leaf.shape) == 1)).astype(np.float32)

    return jax.tree.map(fill, shapes)
