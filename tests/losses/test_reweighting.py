"""Eq. 15 against NumPy, and the weight rule of App. A.4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.losses.calibration import calibrate_weight_by_variance
from lpl_jax.losses.reweighting import LossVariances, init_variances, reweighted, update_variances


@jax.jit
def update(state, diffusion, perceptual, active):
    return update_variances(state, diffusion_losses=diffusion, perceptual_losses=perceptual, active=active)


def weighted(diffusion, active, weight_lpl, var_lpl, var_l2):
    variances = dict(var_lpl=var_lpl, var_l2=var_l2)
    return reweighted(diffusion_losses=diffusion, active=active, weight_lpl=weight_lpl, **variances)


def batches(count, size=6, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        diffusion, perceptual = rng.gamma(2.0, 0.1, size), rng.gamma(2.0, 3.0, size)
        yield diffusion.astype(np.float32), perceptual.astype(np.float32), rng.uniform(size=size) < 0.5


def test_running_means_of_the_variances_equal_numpy():
    state, diffusion_variances, perceptual_variances = init_variances(), [], []
    skipped = 0
    for diffusion, perceptual, active in batches(40):
        # What is not active has no meaning, not even a finite value.
        state = update(state, np.where(active, diffusion, 1e6), np.where(active, perceptual, np.nan), active)
        if active.sum() >= 2:
            diffusion_variances.append(np.var(diffusion[active].astype(np.float64), ddof=1))
            perceptual_variances.append(np.var(perceptual[active].astype(np.float64), ddof=1))
        else:
            skipped += 1
    assert skipped > 0
    assert state.batches == len(diffusion_variances) == 40 - skipped
    np.testing.assert_allclose(state.diffusion, np.mean(diffusion_variances), rtol=1e-5)
    np.testing.assert_allclose(state.perceptual, np.mean(perceptual_variances), rtol=1e-5)
    assert all(leaf.dtype == jnp.float32 and leaf.shape == () for leaf in state)


@pytest.mark.parametrize("active", [[False] * 3, [False, True, False]])
def test_fewer_than_two_active_samples_change_nothing(active):
    for state in (init_variances(), LossVariances(*map(jnp.float32, (0.5, 2.0, 7.0)))):
        new = update(state, jnp.array([1.0, jnp.inf, 3.0]), jnp.array([1.0, jnp.nan, 3.0]), jnp.array(active))
        np.testing.assert_array_equal(new, state)


def test_a_broken_active_sample_shows():
    new = update(init_variances(), jnp.ones(3), jnp.array([1.0, jnp.nan, 3.0]), jnp.ones(3, bool))
    assert np.isnan(new.perceptual)
    assert new.diffusion == 0


def test_reweighted_loss_and_gradient_equal_eq_15():
    (diffusion, _, active), *_ = batches(1)
    factor = 1 + 3.0 * (0.8 / 0.05) * active

    def total(diffusion, var_l2):
        return weighted(diffusion, active, 3.0, 0.8, var_l2).sum()

    losses = weighted(diffusion, active, 3.0, jnp.float32(0.8), jnp.float32(0.05))
    np.testing.assert_allclose(losses, factor * diffusion, rtol=1e-6)
    assert 0 < active.sum() < len(active)
    np.testing.assert_allclose(jax.grad(total)(diffusion, jnp.float32(0.05)), factor, rtol=1e-6)
    assert jax.grad(total, 1)(diffusion, jnp.float32(0.05)) == 0


def test_before_the_first_batch_all_weights_are_one():
    state, diffusion = init_variances(), jnp.array([0.1, 0.2])
    losses = weighted(diffusion, jnp.array([True, False]), 3.0, state.perceptual, state.diffusion)
    np.testing.assert_array_equal(losses, diffusion)
    assert np.isnan(weighted(diffusion, jnp.array([True, False]), 3.0, 1.0, jnp.nan)).all()


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match=r"diffusion_losses \(2,\), active \(3,\)"):
        weighted(jnp.ones(2), jnp.ones(3, bool), 1.0, 1.0, 1.0)
    with pytest.raises(InputError, match=r"perceptual_losses \(\)"):
        update(init_variances(), jnp.ones(2), jnp.ones(()), jnp.ones(2, bool))


def test_weight_by_variance_gives_the_share():
    rng = np.random.default_rng(0)
    diffusion, perceptual = rng.gamma(2.0, 0.1, 500), rng.gamma(1.0, 40.0, (20, 25))
    samples = dict(diffusion_losses=diffusion, perceptual_losses=perceptual)
    weight = calibrate_weight_by_variance(**samples)
    assert isinstance(weight, float)
    np.testing.assert_allclose(np.var(weight * perceptual), 0.1 * np.var(diffusion), rtol=1e-12)
    np.testing.assert_allclose(calibrate_weight_by_variance(**samples, share=0.4), 2 * weight, rtol=1e-12)


@pytest.mark.parametrize(
    ("diffusion", "perceptual", "share", "message"),
    [
        ([0.1, 0.2], [0.1, 0.2], 0.0, "share=0.0 is not a positive number"),
        ([0.1, 0.2], [0.1, 0.2], np.inf, "share=inf"),
        ([0.1, 0.2], [0.3, 0.3], 0.1, "variance of 2 perceptual losses is 0.0"),
        ([0.1, 0.2], [0.1, np.nan], 0.1, "perceptual losses is nan"),
        ([0.1], [0.1, 0.2], 0.1, "1 diffusion losses is nan"),
        ([], [0.1, 0.2], 0.1, "0 diffusion losses"),
    ],
)
def test_calibration_refusals(diffusion, perceptual, share, message):
    with pytest.raises(InputError, match=message):
        calibrate_weight_by_variance(diffusion_losses=diffusion, perceptual_losses=perceptual, share=share)
