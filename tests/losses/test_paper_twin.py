"""The `paper` preset and its options against a float64 PyTorch twin that takes the maps one channel at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lpl_jax.losses import LPLConfig, perceptual_distance
from lpl_jax.tools.parity.twins import PAPER_OPTIONS, paper_loss

SIZES = (16, 32, 64, 128, 128)
CHANNELS = (4, 3, 3, 2, 2)


@pytest.fixture(scope="module")
def features(make_features):
    return make_features(1, SIZES, CHANNELS)


@pytest.mark.parametrize("name", PAPER_OPTIONS)
def test_value_and_gradient(name, features):
    twin_options, options = PAPER_OPTIONS[name]
    config = LPLConfig.paper(**options)
    predicted, clean = features
    ph = [torch.from_numpy(maps.astype(np.float64)).requires_grad_() for maps in predicted]
    phi = [torch.from_numpy(maps.astype(np.float64)) for maps in clean]
    expected = paper_loss(ph, phi, **twin_options)
    expected.sum().backward()

    def total(predicted, clean):
        loss, taps = perceptual_distance(config, predicted=predicted, clean=clean)
        return jnp.sum(loss), (loss, taps)

    gradient, (loss, taps) = jax.grad(total, has_aux=True)(predicted, clean)
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-5)
    for each, maps in zip(gradient, ph, strict=True):
        difference = np.linalg.norm(np.asarray(each, np.float64) - maps.grad.numpy())
        assert difference < 1e-4 * np.linalg.norm(maps.grad.numpy())
    masked = np.asarray(taps.masked) > 0
    assert masked.any(axis=0).tolist() == [config.masked(tap) for tap in range(5)]
