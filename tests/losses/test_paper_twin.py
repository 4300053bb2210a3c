"""The `paper` preset and its options against a float64 PyTorch twin that takes the maps one channel at a time."""

import numpy as np
import pytest

from lpl_jax.tools.parity.features import feature_pair
from lpl_jax.tools.parity.loss import paper_twin, value_and_gradient
from lpl_jax.tools.parity.twins import PAPER_OPTIONS


@pytest.fixture(scope="module")
def features():
    return feature_pair(1)


@pytest.mark.parametrize("name", PAPER_OPTIONS)
def test_value_and_gradient(name, features):
    config, expected, wanted = paper_twin(name, *features)
    loss, gradient, taps = value_and_gradient(*features, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for each, reference in zip(gradient, wanted, strict=True):
        assert np.linalg.norm(np.asarray(each, np.float64) - reference) < 1e-4 * np.linalg.norm(reference)
    masked = np.asarray(taps.masked) > 0
    assert masked.any(axis=0).tolist() == [config.masked(tap) for tap in range(5)]
