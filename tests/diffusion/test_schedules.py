"""Noise schedules against their closed forms, published constants and diffusers."""

import numpy as np
import pytest

from lpl_jax.diffusion import paradigm, schedules
from lpl_jax.tools.parity.samplers import ddim_scheduler


def noise_levels(name, **options):
    alpha, sigma = paradigm(name, **options).tables()
    with np.errstate(divide="ignore"):
        return sigma / alpha


def test_scaled_linear_betas_have_equally_spaced_roots():
    betas = schedules.scaled_linear_betas()
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    np.testing.assert_allclose(betas[[0, -1]], [0.00085, 0.012], rtol=1e-14)
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.012**0.5 - 0.00085**0.5) / 999, rtol=1e-9)


def test_noise_levels_of_the_base_schedule():
    level = noise_levels("eps")
    np.testing.assert_allclose(level[[0, 999]], [0.029167, 14.614641], atol=5e-7)
    np.testing.assert_allclose(level[[200, 460]], [0.572, 1.417], atol=5e-4)
    np.testing.assert_allclose(paradigm("eps").tables()[0][999] ** 2, 0.00466, atol=5e-6)
    assert [int((level <= tau).sum()) for tau in (1.5, 3, 6)] == [478, 674, 835]


def test_base_schedule_equals_diffusers():
    scheduler = ddim_scheduler("eps")
    # their running product is in float32: up to 1000 roundings of 6e-8
    np.testing.assert_allclose(paradigm("eps").tables()[0] ** 2, scheduler.alphas_cumprod.numpy(), rtol=2e-5)


def test_noise_levels_at_twice_the_side():
    level = noise_levels("eps", schedule_rescale=2)
    np.testing.assert_allclose(level[999], 29.229, atol=5e-4)
    np.testing.assert_allclose(level[460], 2.83, atol=5e-3)


def test_noise_levels_with_zero_terminal_snr():
    alpha, sigma = paradigm("v").tables()
    assert alpha[999] == 0.0 and sigma[999] == 1.0
    level = noise_levels("v")
    assert level[999] == np.inf
    np.testing.assert_allclose(level[900], 18.352, atol=5e-4)
    np.testing.assert_allclose(alpha[0], paradigm("eps").tables()[0][0], rtol=1e-14)  # the first index stays


def test_zero_terminal_snr_equals_diffusers():
    scheduler = ddim_scheduler("v")
    # diffusers goes through float32 betas and two cumulative products: 1000 roundings of 6e-8, times a few.
    np.testing.assert_allclose(paradigm("v").tables()[0] ** 2, scheduler.alphas_cumprod.numpy(), atol=2e-5)


@pytest.mark.parametrize("name", ["eps", "v"])
@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_rescaling_multiplies_the_noise_level_of_every_index(name, factor):
    base, rescaled = noise_levels(name), noise_levels(name, schedule_rescale=factor)
    # 1 - alpha_bar loses up to 3 of 16 digits at the clean end
    np.testing.assert_allclose(rescaled, factor * base, rtol=1e-11)
    alpha, sigma = paradigm(name, schedule_rescale=factor).tables()
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-14)


def test_zero_snr_comes_before_the_rescaling():
    """The other order is another schedule; it differs by at most 0.005 in alpha."""
    alpha = paradigm("v", schedule_rescale=2).tables()[0]
    eps_alpha = paradigm("eps", schedule_rescale=2).tables()[0]
    difference = np.abs(schedules.zero_terminal_snr(eps_alpha) - alpha).max()
    assert 1e-4 < difference <= 0.005


def test_shift_time_is_the_same_rescaling_for_flow():
    t = np.linspace(0, 0.99, 100)
    shifted = schedules.shift_time(t, 2.0)
    np.testing.assert_allclose(shifted / (1 - shifted), 2 * t / (1 - t), rtol=1e-12)
    assert schedules.shift_time(0.0, 2.0) == 0.0 and schedules.shift_time(1.0, 2.0) == 1.0
    np.testing.assert_array_equal(schedules.shift_time(t, 1.0), t)


def test_tables_are_cached_and_cannot_be_changed():
    first, second = paradigm("v").tables(), paradigm("v").tables()
    assert first[0] is second[0]
    with pytest.raises(ValueError, match="read-only"):
        first[0][0] = 0.0
