"""Patches, positions and sinusoids against their definitions and against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps, get_2d_sincos_pos_embed

from lpl_jax.denoisers.embeddings import patchify, position_embedding, sinusoidal_embedding, unpatchify


def test_unpatchify_inverts_patchify_on_an_oblong_grid():
    latents = jnp.arange(2 * 6 * 9 * 4.0).reshape(2, 6, 9, 4)
    patches = patchify(latents, 3)
    assert patches.shape == (2, 6, 36)
    np.testing.assert_array_equal(unpatchify(patches, 2, 3, 3), latents)


def test_linear_on_patches_is_a_strided_convolution():
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((2, 4, 8, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((2 * 2 * 3, 5)), jnp.float32)
    convolved = jax.lax.conv_general_dilated(
        latents, kernel.reshape(2, 2, 3, 5), (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # Sums of 12 products of order 1.
    np.testing.assert_allclose(patchify(latents, 2) @ kernel, convolved.reshape(2, 8, 5), atol=1e-5)


@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (8, 24)])
def test_positions_equal_diffusers(grid):
    theirs = get_2d_sincos_pos_embed(64, grid, base_size=16, output_type="pt").numpy()
    # Coordinates below 16 in float32 there and float64 here.
    np.testing.assert_allclose(position_embedding(*grid, 64, 16), theirs, atol=2e-6)


def test_a_finer_grid_stays_in_the_range_of_the_base_grid():
    base = np.asarray(position_embedding(16, 16, 64, 16)).reshape(16, 16, 64)
    fine = np.asarray(position_embedding(32, 32, 64, 16)).reshape(32, 32, 64)
    np.testing.assert_array_equal(fine[::2, ::2], base)
    # The first frequency is 1: channel 0 is sin(column), and the last column of the fine grid is 15.5.
    np.testing.assert_allclose(fine[0, -1, 0], np.sin(15.5), atol=1e-6)
    np.testing.assert_allclose(fine[-1, 0, 32], np.sin(15.5), atol=1e-6)


def test_time_embedding_equals_diffusers():
    time = np.array([0.0, 1.0, 0.37, 17.5, 500.0, 999.0], np.float32)
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.from_numpy(time)).numpy()
    # Angles up to 999 in float32, whose spacing there is 6e-5.
    np.testing.assert_allclose(sinusoidal_embedding(jnp.asarray(time), 256), theirs, atol=1e-4)
    np.testing.assert_array_equal(sinusoidal_embedding(jnp.zeros(1), 8)[0], [1, 1, 1, 1, 0, 0, 0, 0])
