"""Resampling against torch's interpolate, and the errors of resampled latents."""

import numpy as np
import pytest
import torch

from lpl_jax import autoencoders
from lpl_jax.analysis import interpolation
from lpl_jax.analysis.interpolation import Method, disagreements, resample, resample_matrix, round_trip
from lpl_jax.errors import InputError

SIZES = [(1, 1), (2, 5), (7, 3), (8, 8), (13, 8), (16, 15), (16, 11), (33, 25), (20, 41)]


def interpolate(array, size, mode):
    """torch's own, on (B, H, W, C)."""
    options = {} if mode.startswith("nearest") else {"align_corners": False}
    images = torch.from_numpy(np.moveaxis(array, -1, 1))
    return np.moveaxis(torch.nn.functional.interpolate(images, size=size, mode=mode, **options).numpy(), 1, -1)


@pytest.fixture(scope="module")
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)


@pytest.mark.parametrize("mode", interpolation.MODES)
def test_matrices_equal_torch(mode):
    for size, new_size in SIZES:
        matrix = resample_matrix(size, new_size, mode)
        line = np.eye(size)[None, :, None, :]  # one channel for each unit vector
        expected = interpolate(line, (new_size, 1), mode)[0, :, 0]
        np.testing.assert_allclose(matrix, expected, atol=1e-6, err_msg=f"{size} to {new_size}")
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("mode", interpolation.MODES)
def test_a_round_trip_equals_torch_down_and_up(mode):
    array = np.random.default_rng(1).standard_normal((2, 15, 22, 3)).astype(np.float32)
    reduced = tuple(interpolation.reduced_size(side, 1.5) for side in array.shape[1:3])
    assert reduced == (10, 15)
    ours = resample(array, *(round_trip(side, 1.5, mode) for side in array.shape[1:3]))
    expected = interpolate(interpolate(array, reduced, mode), array.shape[1:3], mode)
    # Sums of up to 8 x 8 products of order 1, rounded at 6e-8 in float32 on either side.
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("mode", interpolation.MODES)
def test_factor_one_changes_nothing(mode):
    np.testing.assert_array_equal(round_trip(13, 1.0, mode), np.eye(13, dtype=np.float32))


def test_errors_of_unchanged_and_changed_latents(autoencoder, images):
    config = interpolation.distance_config()
    latents = interpolation.encode(autoencoder, images)
    clean = interpolation.reference(autoencoder, latents, config)
    for space in interpolation.SPACES:
        same = interpolation.resampled_latents(autoencoder, images, latents, Method(space, "bicubic"), 1.0)
        np.testing.assert_array_equal(same, latents)
    same = interpolation.compare(autoencoder, latents, clean, config)
    np.testing.assert_array_equal(same.latent_mse, 0)
    np.testing.assert_array_equal(same.psnr, np.inf)
    np.testing.assert_array_equal(same.distance, 0)
    np.testing.assert_array_equal(same.detail, 1)

    changed = interpolation.resampled_latents(autoencoder, images, latents, Method("latent", "bilinear"), 2.0)
    errors = interpolation.compare(autoencoder, changed, clean, config)
    np.testing.assert_allclose(errors.latent_mse, np.square(changed - latents).mean((1, 2, 3)), rtol=1e-5)
    decodes = np.asarray(errors.images[0]), np.asarray(clean.images[0])
    assert max(np.abs(decode).max() for decode in decodes) <= 1
    mse = np.square(decodes[0] - decodes[1]).mean()
    assert float(errors.psnr[0]) == pytest.approx(10 * np.log10(4 / mse), abs=1e-3)
    gradients = [sum(np.square(np.diff(image, axis=axis)).mean() for axis in (0, 1)) for image in decodes]
    assert float(errors.detail[0]) == pytest.approx(gradients[0] / gradients[1], rel=1e-3)
    assert np.all(errors.distance > 0)


def test_pixels_are_resampled_before_encoding(autoencoder, images):
    latents = interpolation.encode(autoencoder, images)
    ours = interpolation.resampled_latents(autoencoder, images, latents, Method("pixel", "bilinear"), 2.0)
    small = interpolate(images, (32, 32), "bilinear")
    expected = interpolation.encode(autoencoder, interpolate(small, (64, 64), "bilinear"))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - latents).max() > 0.01


def test_disagreements_count_pairs():
    assert disagreements([1, 2, 3], [10, 20, 30]) == (0, 3)
    assert disagreements([1, 2, 3], [30, 20, 10]) == (3, 3)
    assert disagreements([1, 2, 3], [10, 30, 20]) == (1, 3)
    assert disagreements([1, 2, 3], [10, 10, 20]) == (0, 2), "ties count for neither"
    assert disagreements([1, 2, 3], [-np.inf, -np.inf, -50]) == (0, 2)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="method 'latent-lanczos' is not one of pixel-nearest"):
        Method.parse("latent-lanczos")
    with pytest.raises(InputError, match="resampling mode 'cubic'"):
        resample_matrix(4, 2, "cubic")
    with pytest.raises(InputError, match="at least 1"):
        resample_matrix(4, 0, "bilinear")
    with pytest.raises(InputError, match=r"factor 0\.5"):
        round_trip(4, 0.5, "bilinear")
