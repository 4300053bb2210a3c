"""Decoders of any number of levels: how many taps, their names and sizes, weights, masks, and the loss of twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import autoencoders
from lpl_jax.autoencoders import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, resolve
from lpl_jax.losses import LPLConfig, latent_perceptual_loss, perceptual_distance
from lpl_jax.tools.parity.autoencoders import random_torch
from lpl_jax.tools.parity.features import feature_pair
from lpl_jax.tools.parity.loss import (
    latent_twin,
    latent_value_and_gradient,
    latents,
    paper_twin,
    reference_twin,
    value_and_gradient,
)


def kl(levels):
    widths = (8, 8, 16, 16, 16)[:levels]
    return AutoencoderConfig.tiny(encoder_channels=widths, decoder_channels=widths, decoder_resnets=1)


def tiny(levels):
    blocks = (1,) * levels
    return TinyAutoencoderConfig(encoder_width=4, decoder_width=4, encoder_blocks=blocks, decoder_blocks=blocks)


def sides(levels, kind):
    """Of the taps of a decoder, in latents' sides."""
    doubling = [2**level for level in range(levels)]
    return doubling if kind is tiny else [*doubling, doubling[-1]]


LEVELS = [(kind, levels) for kind in (kl, tiny) for levels in (2, 3, 4, 5)]


@pytest.mark.parametrize(("kind", "levels"), LEVELS, ids=lambda value: getattr(value, "__name__", value))
def test_all_taps_of_the_decoder_take_part(kind, levels):
    config, ratios = kind(levels), sides(levels, kind)
    names = ("mid", "up_0", "up_1", "up_2", "up_3", "up_4") if kind is kl else tuple(f"level_{i}" for i in range(5))
    assert config.tap_names == names[: len(ratios)]
    shapes = jax.eval_shape(lambda: autoencoders.init(config, jax.random.key(0)))
    z = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
    for preset in (LPLConfig.paper(), LPLConfig.reference()):
        features = jax.eval_shape(lambda a, z: a.features(z), shapes, z)
        assert [each.shape[1] for each in features] == [4 * ratio for ratio in ratios]
        metrics = jax.eval_shape(lambda a, z, p=preset: latent_perceptual_loss(a, p, z0_hat=z, z0=z)[1], shapes, z)
        assert {name.split("/")[0] for name in metrics} == set(config.tap_names)
        assert preset.tap_names(config.tap_names) == config.tap_names
        assert [preset.masked(tap) for tap in range(len(ratios))] == [tap >= 2 for tap in range(len(ratios))]
    with pytest.raises(
        InputError, match=rf"lpl.taps=9: the decoder has {len(ratios)} maps .*1 to {len(ratios)}, or rgb"
    ):
        jax.eval_shape(lambda a, z: latent_perceptual_loss(a, LPLConfig.paper(taps=9), z0_hat=z, z0=z), shapes, z)


@pytest.mark.parametrize("count", range(1, 8))
def test_weights_follow_resolution_or_number(count):
    maps = [np.ones((1, 2**tap, 2**tap, 1), np.float32) for tap in range(count)]
    options = dict(taps=count, mask_layers="none")
    omega = perceptual_distance(LPLConfig.paper(**options), predicted=maps, clean=maps)[1].omega
    np.testing.assert_array_equal(omega, [2.0**-tap for tap in range(count)])
    omega = perceptual_distance(LPLConfig.reference(**options), predicted=maps, clean=maps)[1].omega
    np.testing.assert_array_equal(omega, [2.0 ** -min(tap, 3) for tap in range(count)])


def test_filters_of_the_public_code_go_by_number():
    widths = [LPLConfig.reference().kernels(tap, 64) for tap in range(7)]
    assert widths == [(1, 1), (1, 3), (1, 3), (3, 5), (3, 5), (3, 5), (3, 5)]


@pytest.mark.parametrize(("kind", "levels"), [(kl, 2), (kl, 3), (kl, 5), (tiny, 3)])
@pytest.mark.parametrize("twin", [reference_twin, paper_twin])
def test_the_loss_of_all_maps_equals_its_twin(twin, kind, levels):
    ratios = sides(levels, kind)
    sizes = [64 * ratio // ratios[-1] for ratio in ratios]
    features = feature_pair(3, sizes, [2] * len(sizes))
    config, expected, wanted = twin("paper_settings" if twin is reference_twin else "preset", *features)
    loss, gradient, taps = value_and_gradient(*features, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for each, reference in zip(gradient, wanted, strict=True):
        assert np.linalg.norm(np.asarray(each, np.float64) - reference) <= 1e-4 * np.linalg.norm(reference)
    assert (np.asarray(taps.masked)[:, :2] == 0).all()
    assert (np.asarray(taps.masked)[:, -1] > 0).any() or len(ratios) < 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["KL of three levels", "KL of five levels", "TAESD"])
def test_end_to_end_with_diffusers(family, tmp_path):
    theirs = random_torch(family, tmp_path)
    ours = autoencoders.load(tmp_path)
    pair = latents(ours.config, (4, 4))
    for preset in ("reference", "paper"):
        config, expected, wanted = latent_twin(preset, theirs, ours.config, *pair)
        loss, gradient, metrics = latent_value_and_gradient(ours, *pair, config)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        assert np.linalg.norm(np.asarray(gradient) - wanted) < 1e-3 * np.linalg.norm(wanted)
        assert len(metrics) == 4 * ours.config.num_taps


def test_a_config_with_more_taps_than_the_decoder_is_refused_at_once():
    experiment = build({"lpl": {"preset": "paper", "taps": 5}, "resolution": 64})
    assert experiment.lpl.taps == 5 and build({"lpl": {"preset": "paper"}}).lpl.taps == "all"
    resolve(experiment, kl(4))
    with pytest.raises(InputError, match="lpl.taps=5: the decoder has 4 maps"):
        resolve(experiment, kl(3))
    masked = build({"lpl": {"preset": "paper", "mask_layers": (4,)}, "resolution": 64})
    resolve(masked, kl(4))
    with pytest.raises(InputError, match=r"lpl.mask_layers=\(4,\): tap numbers go from 0 to 3"):
        resolve(masked, kl(3))
    with pytest.raises(InputError, match=r"lpl.mask_layers=\(4,\)"):
        maps = [np.ones((1, 2, 2, 1), np.float32)] * 4
        perceptual_distance(masked.lpl, predicted=maps, clean=maps)
