"""The gate and its static capacity: the dense form is the definition that the other must equal."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax import parallel
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, active_samples, gated_perceptual_loss, latent_perceptual_loss

BATCH = 6
ALL = LPLConfig.paper(taps=1, mask_layers=(0,))  # divides by the batch size; the middle block alone compiles fast
ACTIVE = LPLConfig.paper(taps=1, mask_layers=(0,), batch="active")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def latents():
    """Estimated and clean latents (6, 4, 4, 4)."""
    rng = np.random.default_rng(0)
    z0 = rng.standard_normal((BATCH, 4, 4, 4)).astype(np.float32)
    return z0 + rng.uniform(0.1, 1.0, (BATCH, 1, 1, 1)).astype(np.float32) * z0[::-1], z0


def levels(*active):
    """alpha and sigma (6,) with these rows under tau = 1.5 (for 256 px), one of the others at alpha = 0."""
    alpha, sigma = np.full(BATCH, 0.4, np.float32), np.full(BATCH, 0.9, np.float32)
    others = [row for row in range(BATCH) if row not in active]
    alpha[list(active)] = 0.8
    alpha[others[-1:]] = 0.0
    return alpha, sigma


def evaluate(autoencoder, z0_hat, z0, alpha, sigma, key, config, capacity=None, sample_weight=None, groups=None):
    """Loss, its gradient by z0_hat, and metrics; all arguments are passed on, so that equal calls share a program."""
    return _evaluate(autoencoder, z0_hat, z0, alpha, sigma, key, config, capacity, sample_weight, groups)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "groups"))
def _evaluate(autoencoder, z0_hat, z0, alpha, sigma, key, config, capacity, sample_weight, groups):
    def total(z0_hat):
        return gated_perceptual_loss(
            autoencoder,
            config,
            z0_hat=z0_hat,
            z0=z0,
            alpha=alpha,
            sigma=sigma,
            key=key,
            resolution=256,
            capacity=capacity,
            groups=groups,
            sample_weight=sample_weight,
        )

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(z0_hat)
    return loss, gradient, metrics


def test_dense_form_is_the_mean_over_the_gate(tiny_autoencoder, latents):
    z0_hat, z0 = latents
    each, _ = jax.jit(latent_perceptual_loss, static_argnums=1)(tiny_autoencoder, ALL, z0_hat=z0_hat, z0=z0)
    rows = [0, 2, 3]
    loss, gradient, metrics = evaluate(tiny_autoencoder, *latents, *levels(*rows), KEY, ALL)
    np.testing.assert_allclose(loss, np.sum(each[jnp.array(rows)]) / BATCH, rtol=1e-5)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=(1, 2, 3)), [True, False, True, True, False, False])
    assert metrics["active_fraction"] == 0.5 and metrics["decoded"] == BATCH
    np.testing.assert_allclose(metrics["mid/term"], np.mean(each[jnp.array(rows)]), rtol=1e-5)
    active_mean, _, _ = evaluate(tiny_autoencoder, *latents, *levels(*rows), KEY, ACTIVE)
    np.testing.assert_allclose(active_mean, 2 * loss, rtol=1e-5)


@pytest.mark.parametrize("config", [ALL, ACTIVE], ids=["all", "active"])
@pytest.mark.parametrize("rows", [(1, 4), (0, 2, 5), ()], ids=str)
def test_enough_capacity_equals_the_dense_form(rows, config, tiny_autoencoder, latents):
    dense_loss, dense_gradient, dense_metrics = evaluate(tiny_autoencoder, *latents, *levels(*rows), KEY, config)
    loss, gradient, metrics = evaluate(tiny_autoencoder, *latents, *levels(*rows), KEY, config, capacity=3)
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, dense_gradient, rtol=1e-4, atol=1e-5 * np.abs(dense_gradient).max())
    assert metrics.pop("decoded") == 3 and dense_metrics.pop("decoded") == BATCH
    for name, value in metrics.items():
        np.testing.assert_allclose(value, dense_metrics[name], rtol=1e-4, atol=1e-7)
    assert (loss > 0) == bool(rows) and np.isfinite(gradient).all()


def test_too_little_capacity_is_right_on_average(tiny_autoencoder, latents):
    rows, capacity, draws = (0, 1, 3, 4, 5), 3, 400
    dense_loss, dense_gradient, _ = evaluate(tiny_autoencoder, *latents, *levels(*rows), KEY, ALL)

    @jax.jit
    def many(autoencoder, keys):
        draw = lambda key: evaluate(autoencoder, *latents, *levels(*rows), key, ALL, capacity=capacity)[:2]  # noqa: E731
        return jax.lax.map(draw, keys)

    losses, gradients = (np.asarray(each, np.float64) for each in many(tiny_autoencoder, jax.random.split(KEY, draws)))
    assert np.std(losses) > 0.05 * dense_loss
    assert abs(losses.mean() - dense_loss) < 4 * losses.std() / math.sqrt(draws)

    # Each row is drawn with probability K/n; where it is, its gradient is n/K times the dense one.
    np.testing.assert_array_equal(gradients[:, 2], 0.0)
    drawn = np.any(gradients != 0, axis=(2, 3, 4))
    np.testing.assert_array_equal(drawn.sum(axis=1), capacity)
    probability = capacity / len(rows)
    frequency = drawn[:, list(rows)].mean(axis=0)
    assert np.all(np.abs(frequency - probability) < 4 * math.sqrt(probability * (1 - probability) / draws))
    for row in rows:
        expected = np.asarray(dense_gradient[row]) / probability
        np.testing.assert_allclose(
            gradients[drawn[:, row], row], np.broadcast_to(expected, gradients[drawn[:, row], row].shape),
            rtol=1e-3, atol=1e-5 * np.abs(expected).max(),
        )  # fmt: skip


def test_groups_draw_each_for_itself_and_are_right_on_average(tiny_autoencoder, latents):
    """Rows 0 and 1 of the first three, 3 to 5 of the others: one of each is decoded, for two and for three."""
    rows, draws = (0, 1, 3, 4, 5), 400
    dense_loss, dense_gradient, _ = evaluate(tiny_autoencoder, *latents, *levels(*rows), KEY, ALL)

    @jax.jit
    def many(autoencoder, keys):
        options = dict(capacity=2, groups=2)
        draw = lambda key: evaluate(autoencoder, *latents, *levels(*rows), key, ALL, **options)[:2]  # noqa: E731
        return jax.lax.map(draw, keys)

    losses, gradients = (np.asarray(each, np.float64) for each in many(tiny_autoencoder, jax.random.split(KEY, draws)))
    for drawn, dense in ((losses, dense_loss), (gradients, np.asarray(dense_gradient, np.float64))):
        error = drawn.std(0, ddof=1) / math.sqrt(draws)
        assert np.all(np.abs(drawn.mean(0) - dense) <= 5 * error + 1e-6 * np.abs(dense).max())
    decoded = np.any(gradients != 0, axis=(2, 3, 4))
    np.testing.assert_array_equal(decoded[:, :3].sum(1), 1)
    np.testing.assert_array_equal(decoded[:, 3:].sum(1), 1)
    largest, expected = np.abs(gradients).max((0, 2, 3, 4)), np.abs(dense_gradient).max((1, 2, 3))
    np.testing.assert_allclose(largest, [2, 2, 0, 3, 3, 3] * expected, rtol=1e-3)


def test_too_little_capacity_by_batch_reduction(tiny_autoencoder, latents):
    arguments = (tiny_autoencoder, *latents, *levels(0, 1, 3, 4, 5), KEY)
    over_batch, over_active = (evaluate(*arguments, config, capacity=3)[0] for config in (ALL, ACTIVE))
    np.testing.assert_allclose(over_active, over_batch * BATCH / 5, rtol=1e-5)


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("config", [ALL, ACTIVE], ids=["all", "active"])
def test_nothing_active(capacity, config, tiny_autoencoder, latents):
    broken = latents[0] * np.float32(np.nan)
    loss, gradient, metrics = evaluate(tiny_autoencoder, broken, latents[1], *levels(), KEY, config, capacity=capacity)
    assert loss == 0.0 and metrics["active_fraction"] == 0.0 and metrics["mid/term"] == 0.0
    np.testing.assert_array_equal(gradient, 0.0)
    chex.assert_tree_all_finite(metrics)


@pytest.mark.parametrize("capacity", [None, 3])
def test_broken_estimates_that_are_not_active_leave_no_trace(capacity, tiny_autoencoder, latents):
    z0_hat, z0 = latents
    alpha, sigma = levels(1, 4)
    assert alpha[5] == 0.0  # where an estimate divided by alpha is infinite
    broken = z0_hat.copy()
    broken[5], broken[0], broken[2, 0] = np.inf, np.nan, -np.inf
    weight = np.array([np.nan, 1.0, 1.0, 1.0, 1.0, np.inf], np.float32)
    config = LPLConfig.paper(taps=1, mask_layers=(0,), extra_weight="min_snr")
    arguments = dict(config=config, capacity=capacity)
    loss, gradient, metrics = evaluate(
        tiny_autoencoder, broken, z0, alpha, sigma, KEY, sample_weight=weight, **arguments
    )
    whole_loss, whole_gradient, whole_metrics = evaluate(
        tiny_autoencoder, z0_hat, z0, alpha, sigma, KEY, sample_weight=np.ones(BATCH, np.float32), **arguments
    )
    assert loss == whole_loss and metrics == whole_metrics
    np.testing.assert_array_equal(gradient, whole_gradient)


def test_broken_estimates_that_are_active_show(tiny_autoencoder, latents):
    broken = latents[0].copy()
    broken[1, 0, 0, 0] = np.nan
    loss, _, _ = evaluate(tiny_autoencoder, broken, latents[1], *levels(1, 4), KEY, ALL)
    assert np.isnan(loss)


def test_sample_weight_scales_each_sample(tiny_autoencoder, latents):
    config = LPLConfig.paper(taps=1, mask_layers=(0,), extra_weight="min_snr")
    alone = [evaluate(tiny_autoencoder, *latents, *levels(row), KEY, ALL)[0] for row in (1, 4)]
    weight = np.arange(BATCH, dtype=np.float32)
    loss, _, _ = evaluate(tiny_autoencoder, *latents, *levels(1, 4), KEY, config, sample_weight=weight)
    np.testing.assert_allclose(loss, alone[0] + 4 * alone[1], rtol=1e-5)


def test_only_the_estimate_gets_a_gradient(tiny_autoencoder, latents):
    alpha, sigma = levels(1, 4)

    def total(autoencoder, z0):
        given = dict(z0_hat=latents[0], z0=z0, alpha=alpha, sigma=sigma, key=KEY)
        return gated_perceptual_loss(autoencoder, ALL, **given, resolution=256)[0]

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(tiny_autoencoder, latents[1])
    chex.assert_trees_all_equal(gradients, jax.tree.map(np.zeros_like, gradients))


def scaled_linear(scale=1.0):
    """alpha and sigma of the 1000-step schedule whose noise level sigma/alpha is multiplied by `scale`."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    abar = abar / (scale**2 + abar * (1 - scale**2))
    return jnp.asarray(np.sqrt(abar), jnp.float32), jnp.asarray(np.sqrt(1 - abar), jnp.float32)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LPLConfig.paper(), 478),
        (LPLConfig.paper(tau=6.0, tau_ref_resolution=512), 674),
        (LPLConfig.paper(tau=6.0, tau_ref_resolution=256), 835),
        (LPLConfig.reference(), 200),
        (LPLConfig.paper(tau=math.inf, tau_ref_resolution=512), 1000),
    ],
    ids=["paper", "paper_6", "paper_6_at_256", "reference", "always"],
)
def test_same_timesteps_are_active_at_every_size(config, count):
    for scale in (1, 2, 4):
        alpha, sigma = scaled_linear(scale)
        active = active_samples(config, alpha=alpha, sigma=sigma, resolution=256 * scale)
        np.testing.assert_array_equal(active, np.arange(1000) < count)


def test_gate_at_zero_alpha():
    alpha, sigma = jnp.array([0.0, 1e-30, 1.0]), jnp.array([1.0, 1.0, 0.0])
    active = active_samples(LPLConfig.paper(), alpha=alpha, sigma=sigma, resolution=512)
    assert active.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(capacity=7), "capacity=7 is not 1 to 6"),
        (dict(capacity=0), "capacity=0"),
        (dict(capacity=2.0), "capacity=2.0"),
        (dict(alpha=jnp.ones(5)), r"alpha must have shape \(6,\)"),
        (dict(sigma=jnp.ones((6, 1))), r"sigma must have shape \(6,\)"),
        (dict(z0=jnp.zeros((6, 4, 5, 4))), r"\(6, 4, 4, 4\) and \(6, 4, 5, 4\)"),
        (dict(resolution=0), "resolution=0"),
        (dict(config=LPLConfig()), "lpl.tau is not set"),
        (dict(sample_weight=jnp.ones(6)), "extra_weight='none' with a sample_weight"),
        (dict(config=LPLConfig.paper(extra_weight="min_snr")), "extra_weight='min_snr' with no sample_weight"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = dict(
        autoencoder=None,
        z0_hat=jnp.zeros((6, 4, 4, 4)),
        z0=jnp.zeros((6, 4, 4, 4)),
        alpha=jnp.ones(6),
        sigma=jnp.ones(6),
        key=KEY,
        config=ALL,
        resolution=256,
    )
    with pytest.raises(InputError, match=message):
        gated_perceptual_loss(**{**arguments, **changes})


def test_each_device_decodes_its_part_of_the_drawn_rows(tiny_autoencoder):
    """The compiled program of 8 devices convolves 8 drawn rows one on each, not all of them everywhere."""
    mesh = parallel.make_mesh(parallel.MeshConfig())
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((16, 4, 4, 4)).astype(np.float32), np.ones(16, np.float32), np.full(16, 0.1, np.float32)

    def loss(z0_hat, z0, alpha, sigma, autoencoder):
        given = dict(z0_hat=z0_hat, z0=z0, alpha=alpha, sigma=sigma, key=jax.random.key(0))
        return gated_perceptual_loss(autoencoder, LPLConfig.paper(taps=1), **given, resolution=32, capacity=8)[0]

    with jax.set_mesh(mesh):
        z0, alpha, sigma = parallel.put_batch(rows, mesh)
        autoencoder = parallel.put_replicated(tiny_autoencoder, mesh)
        text = jax.jit(jax.grad(loss)).lower(0.9 * z0, z0, alpha, sigma, autoencoder).compile().as_text()
    batches = {int(size) for size in re.findall(r"= f32\[(\d+),\d+,\d+,\d+\]\S* convolution\(", text)}
    assert batches == {1}
