"""The `paper` preset and its options against a float64 PyTorch twin that takes the maps one channel at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lpl_jax.losses import LPLConfig, perceptual_distance

SIZES = (16, 32, 64, 128, 128)
CHANNELS = (4, 3, 3, 2, 2)


def twin_mask(map_, closing, opening):
    """Inliers of one (H, W) map, in NumPy: sorted values and an explicit look at every pixel's neighbours."""
    values = np.sort(map_.ravel())
    n = values.size
    low, high = values[max(int(n * 0.02), 1) - 1], values[int(n * (1 - 0.02)) - 1]
    margin = 2 * map_.std(ddof=1)
    inlier = (map_ > low - margin) & (map_ < high + margin)
    return neighbours(neighbours(inlier, closing, np.any, False), opening, np.all, True)


def neighbours(mask, width, reduce, outside):
    padded = np.pad(mask, width // 2, constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (width, width))
    return reduce(windows, axis=(2, 3))


def twin_kernels(size):
    factor = max(1, 512 / size)
    opening, closing = math.ceil(5 / factor), math.ceil(3 / factor)
    return (1 if closing == 2 else closing), (3 if opening == 2 else opening)


def twin_loss(ph, phi, *, mask_on="predicted", layers=(2, 3, 4), kernels=twin_kernels, stats="predicted", grad=True,
              spatial="mean", omega="inverse", l1=False, mean_of_layers=False):  # fmt: skip
    """Loss per sample of float64 (B, H, W, C) maps."""
    losses = []
    for b in range(ph[0].shape[0]):
        loss = 0
        for layer, (x, y) in enumerate(zip(ph, phi, strict=True)):
            d = []
            for c in range(x.shape[-1]):
                p, t = x[b, :, :, c], y[b, :, :, c]
                keep = torch.ones_like(p, dtype=torch.bool)
                if layer in layers:
                    source = (p if mask_on == "predicted" else t).detach().numpy()
                    keep = torch.from_numpy(twin_mask(source, *kernels(p.shape[0])))
                p, t = p[keep], t[keep]
                mine, other = standardised(p, t, stats, grad)
                error = (mine - other).abs() if l1 else (mine - other) ** 2
                d.append(error.mean() if spatial == "mean" else error.sum())
            r = x.shape[1] / ph[0].shape[1]
            weight = {"inverse": 1 / r, "uniform": 1, "literal": 2**-r}[omega]
            loss = loss + weight * sum(d) / len(d)
        losses.append(loss / len(ph) if mean_of_layers else loss)
    return torch.stack(losses)


def standardised(p, t, stats, grad):
    def moments(values):
        values = values if grad else values.detach()
        return values.mean(), (values.var(correction=0) + 1e-6).sqrt()

    own = {"predicted": (p, p), "clean": (t, t), "separate": (p, t), "none": None}[stats]
    if own is None:
        return p, t
    (m1, s1), (m2, s2) = moments(own[0]), moments(own[1])
    return (p - m1) / s1, (t - m2) / s2


OPTIONS = {
    "preset": (dict(), dict()),
    "stop_gradient_on_statistics": (dict(grad=False), dict(stats_grad=False)),
    "clean_statistics": (dict(stats="clean", grad=False), dict(stats="clean", stats_grad=False)),
    "separate_statistics": (dict(stats="separate"), dict(stats="separate")),
    "separate_statistics_without_gradient": (
        dict(stats="separate", grad=False),
        dict(stats="separate", stats_grad=False),
    ),
    "no_statistics": (dict(stats="none"), dict(stats="none", stats_grad=False)),
    "clean_mask_everywhere": (
        dict(mask_on="clean", layers=range(5)),
        dict(mask_on="clean", mask_layers="all"),
    ),
    "mask_of_two_taps": (dict(layers=(1, 3)), dict(mask_layers=(1, 3))),
    "large_kernels": (
        dict(kernels=lambda size: (3, 5) if size == 128 else (1, 3)),
        dict(kernel_scaling="fixed"),
    ),
    "sums": (dict(spatial="sum", mean_of_layers=True), dict(spatial="sum", layers="mean")),
    "l1_literal": (dict(l1=True, omega="literal"), dict(metric="l1", omega="literal")),
    "uniform": (dict(omega="uniform"), dict(omega="uniform")),
}


@pytest.fixture(scope="module")
def features(make_features):
    return make_features(1, SIZES, CHANNELS)


@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradient(name, features):
    twin_options, options = OPTIONS[name]
    config = LPLConfig.paper(**options)
    predicted, clean = features
    ph = [torch.from_numpy(maps.astype(np.float64)).requires_grad_() for maps in predicted]
    phi = [torch.from_numpy(maps.astype(np.float64)) for maps in clean]
    expected = twin_loss(ph, phi, **twin_options)
    expected.sum().backward()

    def total(predicted, clean):
        loss, taps = perceptual_distance(predicted, clean, config)
        return jnp.sum(loss), (loss, taps)

    gradient, (loss, taps) = jax.grad(total, has_aux=True)(predicted, clean)
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-5)
    for each, maps in zip(gradient, ph, strict=True):
        difference = np.linalg.norm(np.asarray(each, np.float64) - maps.grad.numpy())
        assert difference < 1e-4 * np.linalg.norm(maps.grad.numpy())
    masked = np.asarray(taps.masked) > 0
    assert masked.any(axis=0).tolist() == [config.masked(tap) for tap in range(5)]
