"""The `reference` preset against a step-by-step PyTorch twin of the public example's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lpl_jax import autoencoders
from lpl_jax.losses import LPLConfig, latent_perceptual_loss, outlier_mask, perceptual_distance
from lpl_jax.tools.parity.twins import REFERENCE_OPTIONS, reference_loss, reference_mask

SIZES = (16, 32, 64, 128, 128)
CHANNELS = (4, 3, 3, 2, 2)


def to_torch(maps):
    return [torch.from_numpy(np.ascontiguousarray(each)).permute(0, 3, 1, 2) for each in maps]


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def features(make_features):
    return make_features(0, SIZES, CHANNELS)


@pytest.mark.parametrize("name", REFERENCE_OPTIONS)
def test_features_loss_and_gradient(name, features):
    twin_options, options = REFERENCE_OPTIONS[name]
    config = LPLConfig.reference(**options)
    predicted, clean = (maps[: config.taps] for maps in features)

    xs = [x.requires_grad_() for x in to_torch(predicted)]
    expected = reference_loss(xs, to_torch(clean), **twin_options)
    expected.sum().backward()

    def total(predicted, clean):
        loss, _ = perceptual_distance(config, predicted=predicted, clean=clean)
        return jnp.sum(loss), loss

    gradient, loss = jax.grad(total, has_aux=True)(predicted, clean)
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-5)
    for x, each in zip(xs, gradient, strict=True):
        assert relative_error(each, x.grad.permute(0, 2, 3, 1)) < 1e-4


def test_masks_are_equal_sets(features):
    config = LPLConfig.reference()
    for tap in range(5):
        assert config.masked(tap) == (tap >= 2)
    for tap in (2, 3, 4):
        clean = features[1][tap]
        closing, opening = config.kernels(tap, clean.shape[1])
        mask = np.asarray(outlier_mask(clean, closing=closing, opening=opening))
        twin = reference_mask(*to_torch([clean]), down=2 if tap == 2 else 1).permute(0, 2, 3, 1).numpy() > 0
        np.testing.assert_array_equal(mask, twin)
        assert 0 < np.mean(~mask) < 0.2


def make_pair(channels, folder):
    """A tiny diffusers autoencoder with a shift and normalisation layers unlike the identity, and ours of its files."""
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.1,
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs, autoencoders.load(str(folder))


@pytest.fixture(scope="module")
def f8_pair(tmp_path_factory):
    return make_pair((8, 8, 16, 16), tmp_path_factory.mktemp("f8"))


@pytest.fixture(scope="module")
def f2_pair(tmp_path_factory):
    return make_pair((8, 16), tmp_path_factory.mktemp("f2"))


@pytest.fixture(scope="module")
def latents():
    """Clean and predicted latents (2, 8, 8, 4); one extreme pixel makes an outlier blob in the features."""
    rng = np.random.default_rng(1)
    clean = rng.standard_normal((2, 8, 8, 4))
    clean[:, 2, 5] *= 12
    return tuple(each.astype(np.float32) for each in (clean + 0.3 * rng.standard_normal(clean.shape), clean))


def decoder_features(model, latents, post_quant_conv=False):
    u = latents / model.config.scaling_factor + model.config.shift_factor
    if post_quant_conv:
        u = model.post_quant_conv(u)
    x = model.decoder.mid_block(model.decoder.conv_in(u))
    maps = [x]
    for block in model.decoder.up_blocks:
        x = block(x)
        maps.append(x)
    return maps


def value_and_gradient(autoencoder, latents, config):
    def total(autoencoder, predicted, clean):
        loss, metrics = latent_perceptual_loss(autoencoder, config, z0_hat=predicted, z0=clean)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.jit(jax.grad(total, argnums=1, has_aux=True))(autoencoder, *latents)
    return loss, gradient, metrics


def test_end_to_end(f8_pair, latents):
    theirs, ours = f8_pair
    z, z0 = to_torch(latents)
    z.requires_grad_()
    expected = reference_loss(decoder_features(theirs, z), [y.detach() for y in decoder_features(theirs, z0)])
    expected.sum().backward()
    loss, gradient, metrics = value_and_gradient(ours, latents, LPLConfig.reference())
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-4)
    assert relative_error(gradient, z.grad.permute(0, 2, 3, 1)) < 1e-3
    assert metrics["up_2/masked"] > 0 and metrics["mid/masked"] == 0


def test_post_quant_conv_is_an_option(f2_pair, latents):
    theirs, ours = f2_pair
    with torch.no_grad():
        skipped, through = (
            reference_loss(*(decoder_features(theirs, z, post_quant_conv)[:2] for z in to_torch(latents))).numpy()
            for post_quant_conv in (False, True)
        )
    config = LPLConfig.reference(post_quant_conv=True, taps=2)
    predicted, clean = latents
    loss, _ = jax.jit(latent_perceptual_loss, static_argnums=1)(ours, config, z0_hat=predicted, z0=clean)
    np.testing.assert_allclose(loss, through, rtol=1e-4)
    assert np.all(np.abs(skipped / through - 1) > 1e-3)


def test_image_option_is_the_error_of_decoded_images(f2_pair, latents):
    theirs, ours = f2_pair
    z, z0 = to_torch(latents)
    z.requires_grad_()
    decode = lambda u: theirs.decode(u / theirs.config.scaling_factor + theirs.config.shift_factor).sample  # noqa: E731
    expected = ((decode(z) - decode(z0).detach()) ** 2).mean((1, 2, 3))
    expected.sum().backward()
    loss, gradient, metrics = value_and_gradient(ours, latents, LPLConfig.reference(taps="rgb", omega="literal"))
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-4)
    assert relative_error(gradient, z.grad.permute(0, 2, 3, 1)) < 1e-3
    assert sorted(metrics) == ["rgb/log_variance_ratio", "rgb/masked", "rgb/omega", "rgb/term"]
    assert metrics["rgb/omega"] == 1.0
