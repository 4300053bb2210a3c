"""The `reference` preset against a step-by-step PyTorch twin of the public example's loss."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lpl_jax import autoencoders
from lpl_jax.losses import LPLConfig, latent_perceptual_loss
from lpl_jax.tools.parity.autoencoders import random_torch, torch_taps, unscaled
from lpl_jax.tools.parity.features import feature_pair
from lpl_jax.tools.parity.loss import (
    latent_twin,
    latent_value_and_gradient,
    latents,
    reference_masks,
    reference_twin,
    value_and_gradient,
)
from lpl_jax.tools.parity.torch_side import nchw, nhwc, randomize
from lpl_jax.tools.parity.twins import REFERENCE_OPTIONS, reference_loss


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def features():
    return feature_pair(0)


@pytest.mark.parametrize("name", REFERENCE_OPTIONS)
def test_features_loss_and_gradient(name, features):
    config, expected, wanted = reference_twin(name, *features)
    loss, gradient, _ = value_and_gradient(*features, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for each, reference in zip(gradient, wanted, strict=True):
        assert relative_error(each, reference) < 1e-4


def test_masks_are_equal_sets(features):
    config = LPLConfig.reference()
    assert [config.masked(tap) for tap in range(5)] == [False, False, True, True, True]
    for mask, twin in reference_masks(features[1]):
        np.testing.assert_array_equal(mask, twin)
        assert 0 < np.mean(~mask) < 0.2


@pytest.fixture(scope="module")
def f8_pair(tmp_path_factory):
    """A tiny autoencoder of diffusers, and ours of its files."""
    folder = tmp_path_factory.mktemp("f8")
    return random_torch("SD", folder), autoencoders.load(folder)


@pytest.fixture(scope="module")
def f2_pair(tmp_path_factory):
    """The same of one that halves the sides once."""
    options = dict(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    theirs = randomize(AutoencoderKL(**options, **blocks, scaling_factor=0.7, shift_factor=0.1), seed=0)
    folder = tmp_path_factory.mktemp("f2")
    theirs.save_pretrained(folder)
    return theirs, autoencoders.load(folder)


def test_end_to_end(f8_pair):
    theirs, ours = f8_pair
    pair = latents(ours.config, (8, 8))
    config, expected, wanted = latent_twin("reference", theirs, ours.config, *pair)
    loss, gradient, metrics = latent_value_and_gradient(ours, *pair, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert relative_error(gradient, wanted) < 1e-3
    assert metrics["up_2/masked"] > 0 and metrics["mid/masked"] == 0


def test_post_quant_conv_is_an_option(f2_pair):
    theirs, ours = f2_pair
    pair = latents(ours.config, (8, 8))
    raw = [unscaled(ours.config, nchw(each)) for each in pair]
    skipped, through = (
        reference_loss(*(torch_taps(theirs, each, conv)[:2] for each in raw)).numpy() for conv in (False, True)
    )
    config = LPLConfig.reference(post_quant_conv=True, taps=2)
    predicted, clean = pair
    loss, _ = jax.jit(latent_perceptual_loss, static_argnums=1)(ours, config, z0_hat=predicted, z0=clean)
    np.testing.assert_allclose(loss, through, rtol=1e-4)
    assert np.all(np.abs(skipped / through - 1) > 1e-3)


def test_image_option_is_the_error_of_decoded_images(f2_pair):
    theirs, ours = f2_pair
    pair = latents(ours.config, (8, 8))
    z, z0 = (unscaled(ours.config, nchw(each)) for each in pair)
    z.requires_grad_()
    expected = ((theirs.decode(z).sample - theirs.decode(z0).sample) ** 2).mean((1, 2, 3))
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    config = LPLConfig.reference(taps="rgb", omega="literal")
    loss, gradient, metrics = latent_value_and_gradient(ours, *pair, config)
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-4)
    assert relative_error(gradient, nhwc(wanted) / ours.config.scaling_factor) < 1e-3
    assert sorted(metrics) == ["rgb/log_variance_ratio", "rgb/masked", "rgb/omega", "rgb/term"]
    assert metrics["rgb/omega"] == 1.0
