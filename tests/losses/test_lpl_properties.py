"""What must hold for the distance of feature maps, whatever the numbers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, latent_perceptual_loss, outlier_mask, perceptual_distance
from lpl_jax.tools.parity.features import feature_pair

SIZES = (16, 64, 64)
CHANNELS = (3, 2, 2)
NAMES = ("predicted", "clean")
SOME = dict(taps=3, mask_layers=(1, 2), kernel_scaling="fixed")  # three taps compile faster than five
PRESETS = {"paper": LPLConfig.paper(**SOME), "reference": LPLConfig.reference(**SOME)}
VARIANTS = {
    **PRESETS,
    "separate": LPLConfig.paper(stats="separate", metric="l1", **SOME),
    "separate_vectors": LPLConfig.reference(stats="separate", stats_grad=True, norm_eps=1e-10, **SOME),
    "predicted_vectors": LPLConfig.reference(stats="predicted", mask_on="predicted", stats_grad=True, **SOME),
    "none": LPLConfig.paper(stats="none", stats_grad=False, **SOME),
}


@functools.partial(jax.jit, static_argnums=2)
def evaluate(predicted, clean, config):
    """Loss (B,), parts and the gradient of the summed loss by the predicted maps: one program for all tests."""

    def total(predicted):
        loss, taps = perceptual_distance(config, predicted=predicted, clean=clean)
        return jnp.sum(loss), (loss, taps)

    gradient, (loss, taps) = jax.grad(total, has_aux=True)(predicted)
    return loss, taps, gradient


def value(predicted, clean, config):
    return np.asarray(evaluate(predicted, clean, config)[0])


def gradients(predicted, clean, config):
    return evaluate(predicted, clean, config)[2]


@pytest.fixture(scope="module")
def features():
    return feature_pair(2, SIZES, CHANNELS)


@pytest.mark.parametrize("name", PRESETS)
def test_scale_of_features_cancels(name, features):
    predicted, clean = features
    loss = value(predicted, clean, PRESETS[name])
    scaled = [tuple(maps * (3.0 + tap) for tap, maps in enumerate(each)) for each in features]
    np.testing.assert_allclose(value(*scaled, PRESETS[name]), loss, rtol=1e-4)  # but for epsilon
    assert np.all(np.abs(value(scaled[0], clean, PRESETS[name]) / loss - 1) > 5e-3)


@pytest.mark.parametrize("name", ["paper", "reference", "predicted_vectors", "none"])
def test_exact_prediction_has_no_loss_and_no_gradient(name, features):
    _, clean = features
    np.testing.assert_array_equal(value(clean, clean, VARIANTS[name]), 0.0)
    for gradient in gradients(clean, clean, VARIANTS[name]):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_order_of_channels_and_samples_does_not_matter(name, features):
    loss = value(*features, PRESETS[name])
    assert abs(loss[0] / loss[1] - 1) > 1e-3
    channels = [tuple(maps[..., ::-1] for maps in each) for each in features]
    np.testing.assert_allclose(value(*channels, PRESETS[name]), loss, rtol=1e-6)
    samples = [tuple(maps[::-1] for maps in each) for each in features]
    np.testing.assert_allclose(value(*samples, PRESETS[name]), loss[::-1], rtol=1e-6)


def one_blob(maps, tap, height):
    """A copy of the maps with a 6 x 6 blob in channel 0 of one tap (36 of 4096 pixels are less than 2 %)."""
    maps = [each.copy() for each in maps]
    blob = height + np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    maps[tap][:, 20:26, 30:36, 0] = blob
    return tuple(maps)


@pytest.mark.parametrize("name", PRESETS)
def test_masked_blob_has_no_influence(name):
    config = PRESETS[name]
    predicted, clean = feature_pair(3, SIZES, CHANNELS, blobs=False)
    # The blob lies in the map that the mask is computed on; its values change the threshold, but not the mask.
    if config.mask_on == "predicted":
        pairs = [(one_blob(predicted, 2, height), clean) for height in (30.0, -50.0)]
    else:
        pairs = [(predicted, one_blob(clean, 2, height)) for height in (30.0, -50.0)]
    source = 0 if config.mask_on == "predicted" else 1
    masks = [np.asarray(outlier_mask(pair[source][2], closing=1, opening=3)) for pair in pairs]
    np.testing.assert_array_equal(*masks)
    assert (~masks[0]).sum(axis=(1, 2)).tolist() == [[64, 0]] * 2

    losses = [value(*pair, config) for pair in pairs]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    unmasked = [evaluate(*pair, dataclasses.replace(config, mask_layers="none"))[1].term[:, 2] for pair in pairs]
    assert np.all(np.abs(unmasked[0] / unmasked[1] - 1) > 1e-4)
    gradient = np.asarray(gradients(*pairs[0], config)[2])
    np.testing.assert_array_equal(gradient[~masks[0]], 0.0)
    assert np.all(gradient[masks[0]] != 0)


def toy(correlation, size=16):
    """Two centred maps (1, size, size, 1) of unit variance with this correlation."""
    basis, _ = np.linalg.qr(
        np.column_stack([np.ones(size * size), np.random.default_rng(0).standard_normal((size * size, 2))])
    )
    phi, other = basis[:, 1] * size, basis[:, 2] * size
    psi = correlation * phi + np.sqrt(1 - correlation**2) * other
    return tuple(each.reshape(1, size, size, 1).astype(np.float32) for each in (psi, phi))


@pytest.mark.parametrize(
    ("stats", "stats_grad", "expected", "minimum"),
    [
        ("clean", False, lambda a, r: 1 - 2 * a * r + a**2, lambda r: r),  # shrinks the prediction
        ("predicted", False, lambda a, r: (1 - 2 * a * r + a**2) / a**2, lambda r: r),
        ("predicted", True, lambda a, r: (1 - 2 * a * r + a**2) / a**2, lambda r: 1 / r),  # inflates it
    ],
)
def test_statistics_decide_the_contrast_of_the_best_prediction(stats, stats_grad, expected, minimum):
    r = 0.6
    psi, phi = toy(r)
    config = LPLConfig.paper(stats=stats, stats_grad=stats_grad, taps=1, norm_eps=1e-9)
    loss_of = jax.jit(lambda a: perceptual_distance(config, predicted=(a * psi,), clean=(phi,))[0][0])
    for a in (0.4, 1.0, 1.7):
        np.testing.assert_allclose(loss_of(a), expected(a, r), rtol=1e-5)
    slope = jax.jit(jax.grad(loss_of))
    best = minimum(r)
    assert abs(slope(best)) < 1e-5
    assert slope(best * 0.9) < -0.01 and slope(best * 1.1) > 0.01


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dead", ["predicted", "clean", "both"])
def test_dead_channels_stay_finite(name, dead, features):
    predicted, clean = ([maps.copy() for maps in each] for each in features)
    for tap in (0, 2):
        for maps in ([predicted] if dead != "clean" else []) + ([clean] if dead != "predicted" else []):
            maps[tap][..., 0] = 0.1 if tap == 0 else 0.0
            maps[tap][:, :4, :4] = 0.0  # zero vectors of channels
    predicted, clean = tuple(predicted), tuple(clean)
    chex.assert_tree_all_finite(evaluate(predicted, clean, VARIANTS[name]))


def test_map_masked_whole_counts_as_zero():
    (predicted,), (clean,) = feature_pair(3, (64,), (2,), blobs=False)
    predicted[..., 0] = 0.1
    config = LPLConfig.paper(taps=1, mask_layers=(0,))
    loss, taps = perceptual_distance(config, predicted=(predicted,), clean=(clean,))
    np.testing.assert_array_equal(taps.masked, 0.5)
    of_the_other, _ = perceptual_distance(config, predicted=(predicted[..., 1:],), clean=(clean[..., 1:],))
    np.testing.assert_allclose(loss, of_the_other / 2, rtol=1e-6)


def test_bfloat16_features_are_compared_in_float32(features):
    config = LPLConfig.paper(taps=1, mask_layers=(0,))
    rounded = {name: (jnp.asarray(each[2], jnp.bfloat16),) for name, each in zip(NAMES, features, strict=True)}
    loss, taps = perceptual_distance(config, **rounded)
    assert all(part.dtype == jnp.float32 for part in (loss, *taps))
    widened = jax.tree.map(lambda maps: maps.astype(jnp.float32), rounded)
    np.testing.assert_allclose(loss, perceptual_distance(config, **widened)[0], rtol=1e-6)


def test_target_gets_no_gradient(features):
    config = LPLConfig.paper(stats="separate", taps=1)
    total = lambda clean: jnp.sum(perceptual_distance(config, predicted=features[0][:1], clean=clean)[0])  # noqa: E731
    for gradient in jax.grad(total)(features[1][:1]):
        np.testing.assert_array_equal(gradient, 0.0)


def test_metrics_of_latents(tiny_autoencoder):
    rng = np.random.default_rng(0)
    z0 = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
    z0_hat = z0 + 0.3 * rng.standard_normal(z0.shape).astype(np.float32)
    config = LPLConfig.paper(taps=3, mask_layers=(2,))
    loss, metrics = jax.jit(latent_perceptual_loss, static_argnums=1)(tiny_autoencoder, config, z0_hat=z0_hat, z0=z0)
    names = ("mid", "up_0", "up_1")
    assert set(metrics) == {
        f"{tap}/{part}" for tap in names for part in ("term", "omega", "masked", "log_variance_ratio")
    }
    assert [float(metrics[f"{tap}/omega"]) for tap in names] == [1, 1 / 2, 1 / 4]
    total = sum(metrics[f"{tap}/omega"] * metrics[f"{tap}/term"] for tap in names)
    np.testing.assert_allclose(np.mean(loss), total, rtol=1e-6)

    # Against the features themselves, by NumPy.
    features = jax.jit(tiny_autoencoder.features, static_argnums=1)
    pred, clean = (np.asarray(features(z, 3)[2]) for z in (z0_hat, z0))
    closing, opening = config.kernels(2, 16)
    keep = np.asarray(outlier_mask(pred, closing=closing, opening=opening))
    np.testing.assert_allclose(metrics["up_1/masked"], 1 - keep.mean(), atol=1e-6)
    variances = [np.var(maps, axis=(1, 2), where=keep).mean(axis=-1) for maps in (pred, clean)]
    np.testing.assert_allclose(metrics["up_1/log_variance_ratio"], np.log(np.divide(*variances)).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("omega", "expected"),
    [
        ("inverse", [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ("uniform", [1, 1, 1, 1, 1]),
        ("literal", [1 / 2, 1 / 4, 1 / 16, 1 / 256, 1 / 256]),
    ],
)
def test_depth_weights(omega, expected):
    config = LPLConfig.paper(omega=omega, stats="none", stats_grad=False, mask_layers="none")
    rng = np.random.default_rng(0)
    pair = {name: [rng.standard_normal((1, size, size, 1)) for size in (1, 2, 4, 8, 8)] for name in NAMES}
    loss, taps = perceptual_distance(config, **pair)
    np.testing.assert_array_equal(taps.omega, expected)
    np.testing.assert_allclose(loss, np.asarray(taps.term) @ np.asarray(expected, np.float32), rtol=1e-6)


def test_shapes_that_do_not_fit(features, tiny_autoencoder):
    predicted, clean = features
    with pytest.raises(InputError, match="2 pairs"):
        perceptual_distance(LPLConfig.paper(taps=2), predicted=predicted, clean=clean)
    with pytest.raises(InputError, match="pairs of equal maps"):
        perceptual_distance(LPLConfig.paper(taps=3), predicted=predicted, clean=clean[::-1])
    loss = functools.partial(latent_perceptual_loss, tiny_autoencoder, LPLConfig.paper())
    with pytest.raises(InputError, match=r"\(1, 4, 4, 4\) and \(2, 4, 4, 4\)"):
        loss(z0_hat=jnp.zeros((1, 4, 4, 4)), z0=jnp.zeros((2, 4, 4, 4)))
    with pytest.raises(InputError, match="channels"):
        loss(z0_hat=jnp.zeros((1, 4, 4, 3)), z0=jnp.zeros((1, 4, 4, 3)))
