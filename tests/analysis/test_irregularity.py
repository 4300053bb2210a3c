"""Noise on patches: where it is put, how strong it is, and where its error is counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders
from lpl_jax.analysis.irregularity import irregularity_maps, patch_errors, patch_noise, patch_positions
from lpl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Enlarge:
    """A decoder whose every latent fills its own 2 x 2 pixels, and no others."""

    downsample = 2
    config = property(lambda self: self)

    def decode(self, latents):
        return latents.repeat(2, axis=1).repeat(2, axis=2)


jax.tree_util.register_static(Enlarge)


@pytest.fixture(scope="module")
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


@pytest.fixture(scope="module")
def latent():
    return jax.random.normal(jax.random.key(0), (8, 8, 4))


def test_positions_tile_the_latent():
    assert patch_positions(5, 4, 2, 2)[..., 0].tolist() == [[0, 0], [2, 2]]
    assert patch_positions(5, 4, 2, 2)[..., 1].tolist() == [[0, 2], [0, 2]]
    assert patch_positions(5, 4, 2, 1).shape == (4, 3, 2)
    with pytest.raises(InputError, match="patch=5: must be 1 to 4"):
        patch_positions(5, 4, 5, 1)
    with pytest.raises(InputError, match="stride=0"):
        patch_positions(5, 4, 2, 0)


def test_strength_of_the_noise(latent):
    key, latent = jax.random.key(1), 3 * latent + 1
    half = 0.5 * float(np.var(latent))
    noise = patch_noise(key, latent, 500, 2, "half_variance")
    assert noise.shape == (500, 2, 2, 4)
    # The variance of N = 8000 draws has a relative standard deviation of sqrt(2 / N) = 1.6 %.
    assert np.var(noise) == pytest.approx(half, rel=0.08)
    fixed = patch_noise(key, latent, 500, 2, "fixed_norm")
    np.testing.assert_allclose(np.linalg.norm(fixed.reshape(500, -1), axis=1), np.sqrt(half * 16), rtol=1e-5)
    scale = np.asarray(fixed / noise)
    np.testing.assert_allclose(scale, np.broadcast_to(scale[:, :1, :1, :1], scale.shape), rtol=1e-4)
    with pytest.raises(InputError, match="noise='loud'"):
        patch_noise(key, latent, 1, 2, "loud")


def test_a_decoder_without_neighbourhood_has_no_error_outside():
    latent = jnp.full((4, 4, 3), 0.1)
    corners, noise = np.array([[0, 0], [2, 1], [1, 2]]), np.full((3, 2, 2, 3), 0.5, np.float32)
    errors = patch_errors(Enlarge(), latent, corners, noise)
    # 4 x 4 pixels of 3 channels, each off by 0.5.
    np.testing.assert_allclose(errors[:, 0], 48 * 0.25, rtol=1e-5)
    np.testing.assert_array_equal(errors[:, 1], 0)
    clipped = patch_errors(Enlarge(), latent, corners, 10 * noise)
    np.testing.assert_allclose(clipped[:, 0], 48 * 0.81, rtol=1e-5)


def test_errors_of_a_real_decoder(autoencoder, latent):
    corners, noise = np.array([[2, 4], [4, 5], [0, 0], [6, 6]]), jax.random.normal(jax.random.key(2), (4, 2, 2, 4))
    errors = np.asarray(patch_errors(autoencoder, latent, corners, noise))
    decode = jax.jit(lambda a, z: jnp.clip(a.decode(z), -1, 1))
    disturbed = np.stack([latent] * 5)
    for index, (row, column) in enumerate(corners):
        disturbed[index, row : row + 2, column : column + 2] += noise[index]
    images = np.asarray(decode(autoencoder, disturbed))
    square = np.square(images[:4] - images[4]).sum(-1)
    expected = square.sum((1, 2))
    square[0, 16:32, 32:48] = square[1, 32:48, 40:56] = square[2, :16, :16] = square[3, 48:, 48:] = 0
    np.testing.assert_allclose(errors[:, 0], expected, rtol=1e-3)
    np.testing.assert_allclose(errors[:, 1], square.sum((1, 2)), rtol=1e-3)
    assert np.all(errors[:, 1] > 0)


def test_maps_average_draws_whatever_the_batch(latent):
    key, drawn = jax.random.key(3), []
    options = dict(patch=2, stride=1, draws=2)
    maps = irregularity_maps(Enlarge(), latent[..., :3], key, batch_size=7, on_draw=lambda: drawn.append(1), **options)
    assert maps.shape == (7, 7, 2) and len(drawn) == 2
    assert np.all(maps[..., 0] > 0) and np.all(maps[..., 0] >= maps[..., 1])
    whole = irregularity_maps(Enlarge(), latent[..., :3], key, batch_size=64, **options)
    np.testing.assert_allclose(maps, whole, rtol=1e-5)
    one = irregularity_maps(Enlarge(), latent[..., :3], key, batch_size=64, patch=2, stride=1, draws=1)
    assert np.abs(one - whole).max() > 0.1
    again = irregularity_maps(Enlarge(), latent[..., :3], jax.random.key(4), batch_size=64, **options)
    assert np.abs(again - whole).max() > 0.1
    with pytest.raises(InputError, match="draws=0"):
        irregularity_maps(Enlarge(), latent, key, draws=0)


def test_a_masked_patch_is_set_to_zero(latent):
    """Its error is that of the patch itself with this decoder, and nothing is drawn."""
    maps = irregularity_maps(Enlarge(), latent[..., :3] / 9, jax.random.key(3), patch=2, noise="masked", draws=3)
    patches = (np.asarray(latent[..., :3]) / 9).reshape(4, 2, 4, 2, 3)
    np.testing.assert_allclose(maps[..., 0], 4 * np.square(patches).sum((1, 3, 4)), rtol=1e-5)
    np.testing.assert_array_equal(maps[..., 1], 0)
