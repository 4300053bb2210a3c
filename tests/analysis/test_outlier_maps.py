"""Statistics of feature outliers on maps whose outliers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders
from lpl_jax.analysis import outlier_maps
from lpl_jax.analysis.outlier_maps import TapStatistics, extreme_channels, max_median_ratio
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, outlier_mask

CONFIG = LPLConfig.reference()  # closing 3 and opening 5 in tap 3, at any size


@pytest.fixture(scope="module")
def maps():
    """Two images, three channels: noise, noise with a 3 x 3 blob of 100 in the first image, all zero."""
    values = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    values[0, 10:13, 20:23, 1] = 100
    values[..., 2] = 0
    return jnp.asarray(values)


def test_a_blob_is_measured(maps):
    keep, statistics = outlier_maps.measure(maps, 3, CONFIG)
    values = np.asarray(maps)
    np.testing.assert_array_equal(keep, outlier_mask(maps, closing=3, opening=5))
    np.testing.assert_allclose(statistics.largest, np.abs(values).max((1, 2)))
    np.testing.assert_allclose(statistics.median, np.median(np.abs(values), (1, 2)), rtol=1e-6)
    # Closing takes a pixel off the rim of the blob, opening puts two on: 5 x 5 pixels.
    np.testing.assert_allclose(statistics.masked, [[0, 25 / 1024, 1], [0, 0, 1]], rtol=1e-6)
    spread = np.square(values[0, ..., 1] - values[0, ..., 1].mean())
    assert float(statistics.variance_masked[0, 1]) == pytest.approx(spread[9:14, 19:24].sum() / spread.sum(), rel=1e-4)
    assert np.asarray(statistics.variance_masked)[:, [0, 2]].tolist() == [[0, 0], [0, 0]]


def test_thresholds_are_those_of_the_mask(maps):
    low, high = np.asarray(outlier_maps.thresholds(maps, CONFIG.quantile))[0, :2].T
    outlier = (maps[0, ..., :2] <= low) | (maps[0, ..., :2] >= high)
    keep = outlier_mask(maps, closing=1, opening=1)[0, ..., :2]
    np.testing.assert_array_equal(outlier, ~keep)
    assert outlier[..., 1].sum() == 9


def test_channels_are_ordered_by_the_ratio_of_means():
    largest, median = np.array([[4, 9, 1, 0], [6, 1, 1, 0.0]]), np.array([[1, 0, 0, 0], [1, 1, 0, 0.0]])
    ratio = max_median_ratio(TapStatistics(largest, median, None, None))
    np.testing.assert_array_equal(ratio, [5, 10, np.inf, np.nan])
    assert extreme_channels(ratio, 5) == (1, 0) and extreme_channels(ratio, 1) == (1,)


def test_taps_by_name_and_number(tiny_folder):
    autoencoder = autoencoders.load(tiny_folder)
    assert outlier_maps.parse_taps(autoencoder, ["up_2", "0", "mid", "3"]) == (3, 0)
    with pytest.raises(InputError, match=r"tap 'up_4': .* has mid, up_0, up_1, up_2, up_3 \(or 0 to 4\)"):
        outlier_maps.parse_taps(autoencoder, ["up_4"])
    tiny = autoencoders.Autoencoder({}, autoencoders.TinyAutoencoderConfig())
    assert outlier_maps.parse_taps(tiny, ["level_3", "0"]) == (3, 0)
    shallow = autoencoders.Autoencoder(
        {}, autoencoders.TinyAutoencoderConfig(encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    )
    assert [outlier_maps.parse_taps(each, ()) for each in (autoencoder, tiny, shallow)] == [(3,), (3,), (1,)]
    assert outlier_maps.parse_taps(shallow, ["all"]) == (0, 1)
    latents = jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
    first, last = outlier_maps.features(autoencoder, latents, (0, 3))
    assert first.shape == (1, 2, 2, 16) and last.shape == (1, 16, 16, 8)
