"""Min-SNR weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from lpl_jax.diffusion import loss_weight, paradigm
from lpl_jax.errors import InputError
from lpl_jax.tools.parity.samplers import ddim_scheduler


@pytest.mark.parametrize("name", ["eps", "v"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_equals_diffusers(name, gamma):
    snr = compute_snr(ddim_scheduler(name), torch.arange(1000)).double().numpy()
    expected = np.minimum(snr, gamma) / (snr if name == "eps" else snr + 1)
    ours = loss_weight(paradigm(name), jnp.arange(1000), "min_snr", gamma)
    assert ours.dtype == jnp.float32 and ours.shape == (1000,)
    # 1 - alpha_bar of the first indices loses 3 digits of their float32 table
    np.testing.assert_allclose(ours, expected, rtol=3e-4, atol=1e-6)


def test_min_snr_of_flow():
    t = jnp.linspace(0, 1, 101)
    t64 = np.asarray(t, np.float64)
    expected = np.minimum((1 - t64) ** 2, 5 * t64**2)
    np.testing.assert_allclose(loss_weight(paradigm("flow"), t, "min_snr", 5.0), expected, atol=3e-7)


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_min_snr_weighs_the_error_of_z0_hat(name):
    """weight * (error of the prediction)^2 = min(SNR, gamma) * (error of z0_hat)^2 in every paradigm."""
    p = paradigm(name, schedule_rescale=2)
    t = jnp.linspace(0.01, 0.99, 99) if name == "flow" else jnp.arange(5, 995, 10)
    z_t, prediction = jax.random.normal(jax.random.key(0), (2, 99))
    z0_hat, other = (p.estimate(z_t=z_t, prediction=each, t=t)[0] for each in (prediction, prediction + 1.0))
    z0_error = other - z0_hat
    alpha, sigma = p.alpha_sigma(t)
    # differences of values up to 100 lose two digits
    np.testing.assert_allclose(
        loss_weight(p, t, "min_snr", 5.0), jnp.minimum((alpha / sigma) ** 2, 5.0) * z0_error**2, rtol=3e-4
    )


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_min_snr_is_finite_where_snr_is_zero_or_infinite(name, factor):
    t = jnp.linspace(0, 1, 1000) if name == "flow" else jnp.arange(1000)
    weight = np.asarray(loss_weight(paradigm(name, schedule_rescale=factor), t, "min_snr"))
    assert np.isfinite(weight).all() and (weight >= 0).all()
    assert weight[-1] == (1.0 if name == "eps" else 0.0)


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_none_is_one(name):
    t = jnp.array([0.0, 1.0]) if name == "flow" else jnp.array([0, 999])
    np.testing.assert_array_equal(loss_weight(paradigm(name), t), [1.0, 1.0])


def test_wrong_choices():
    with pytest.raises(InputError, match="one of none, min_snr, got 'p2'"):
        loss_weight(paradigm("v"), jnp.array([0]), "p2")
    with pytest.raises(InputError, match="gamma of min_snr must be positive, got 0"):
        loss_weight(paradigm("v"), jnp.array([0]), "min_snr", 0)
