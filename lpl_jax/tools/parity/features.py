"""Maps like those of a decoder, with outliers: what the loss and its twins are given."""

from collections.abc import Sequence

import numpy as np

# Sides and channels of the maps; the latter two are those of a 128 px image.
SIZES, CHANNELS = (16, 32, 64, 128, 128), (4, 3, 3, 2, 2)


def feature_pair(
    seed: int, sizes: Sequence[int] = SIZES, channels: Sequence[int] = CHANNELS, batch: int = 2, blobs: bool = True
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Predicted and clean maps (B, H, W, C) in float32: correlated, on channel-wise scales, with blobs in both.

    Blobs are outliers of 2 to 6 pixels a side and 12 to 20 deviations; they lie anywhere, also at borders, in one of
    the two maps or in both, in every other channel, so that some channels have none.
    """
    rng = np.random.default_rng(seed)
    clean, predicted = [], []
    for size, width in zip(sizes, channels, strict=True):
        scale = np.exp(0.5 * rng.standard_normal(width))
        target = scale * _smooth_noise(rng, batch, size, width) + rng.standard_normal(width)
        pred = 0.8 * target + 0.4 * scale * _smooth_noise(rng, batch, size, width)
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


def _smooth_noise(rng: np.random.Generator, batch: int, size: int, channels: int) -> np.ndarray:
    """Unit-variance maps whose neighbouring pixels are alike."""
    coarse = rng.standard_normal((batch, -(-size // 4), -(-size // 4), channels)).repeat(4, 1).repeat(4, 2)
    fine = rng.standard_normal((batch, size, size, channels))
    return 0.8 * coarse[:, :size, :size] + 0.6 * fine
