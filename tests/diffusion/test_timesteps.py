"""Training times: formulas, drawn distributions, and the share of them that passes the gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from lpl_jax.diffusion import paradigm, timesteps

FLOW_KINDS = ("uniform", "mode", "logit_normal")
DEFAULTS = dict(mode_scale=1.29, logit_mean=0.0, logit_std=1.0)

# tau: eps and v each at 256 and at 512 (rescaled schedule), then flow: uniform, mode 1.29, logit-normal
ACTIVE_FRACTION = {
    0.5: (0.170, 0.060, 0.161, 0.057, 0.333, 0.199, 0.244),
    1.0: (0.354, 0.170, 0.337, 0.161, 0.500, 0.500, 0.500),
    1.5: (0.478, 0.271, 0.454, 0.258, 0.600, 0.730, 0.658),
    2.0: (0.563, 0.354, 0.533, 0.337, 0.667, 0.801, 0.756),
    3.0: (0.674, 0.478, 0.633, 0.454, 0.750, 0.866, 0.864),
    6.0: (0.835, 0.674, 0.767, 0.633, 0.857, 0.931, 0.963),
    10.0: (0.934, 0.796, 0.839, 0.736, 0.909, 0.958, 0.989),
    20.0: (1.000, 0.934, 0.907, 0.839, 0.952, 0.979, 0.999),
}


@pytest.mark.parametrize("tau", ACTIVE_FRACTION)
def test_active_fraction_table(tau):
    discrete = [paradigm(name, schedule_rescale=k).active_fraction(tau) for name in ("eps", "v") for k in (1, 2)]
    np.testing.assert_array_equal(np.round(discrete, 3), ACTIVE_FRACTION[tau][:4])
    flow = [paradigm("flow", time_sampling=kind).active_fraction(tau) for kind in FLOW_KINDS]
    np.testing.assert_allclose(flow, ACTIVE_FRACTION[tau][4:], atol=7e-4)  # .658 is .65743 in closed form


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_active_fraction_is_what_the_gate_counts(name):
    """The gate sigma <= tau * alpha on float32 values, over all indices or over draws, agrees with the host figure."""
    p = paradigm(name, schedule_rescale=2)
    count = 1000 if name != "flow" else 100_000
    t = jnp.arange(1000) if name != "flow" else p.sample_t(jax.random.key(3), (count,))
    alpha, sigma = p.alpha_sigma(t)
    error = 1e-9 if name != "flow" else 4 * 0.5 / count**0.5  # four standard errors of a share
    assert abs(int(jnp.sum(sigma <= 3.0 * alpha)) / count - p.active_fraction(3.0)) < error


def test_active_fraction_at_twice_the_side():
    """Doubling tau with the side keeps the same times active; flow shifted by 2 is flow with half the tau."""
    for name in ("eps", "v", "flow"):
        base, rescaled = paradigm(name), paradigm(name, schedule_rescale=2)
        assert rescaled.active_fraction(3.0) == pytest.approx(base.active_fraction(1.5), abs=1e-12)
    assert paradigm("flow", schedule_rescale=2).active_fraction(6.0) == pytest.approx(0.866, abs=5e-4)


@pytest.mark.parametrize("name", ["v", "flow"])
def test_active_fraction_extremes(name):
    assert paradigm(name).active_fraction(float("inf")) == 1.0
    assert paradigm(name).active_fraction(0.0) == 0.0


def test_mode_time_fixed_points_and_symmetry():
    u = np.linspace(0, 1, 101)
    for scale in (-1.0, 0.5, 1.29, timesteps.MODE_SCALE_MAX):
        t = timesteps.mode_time(u, scale)
        np.testing.assert_allclose(t[[0, 50, 100]], [1.0, 0.5, 0.0], atol=1e-15)
        np.testing.assert_allclose(timesteps.mode_time(1 - u, scale), 1 - t, atol=1e-15)
        assert np.all(np.diff(t) <= 0)
    assert abs(timesteps.MODE_SCALE_MAX - 1.7519) < 5e-5


def test_mode_time_equals_diffusers():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0)).numpy()
    theirs = compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(timesteps.mode_time(jnp.asarray(u)), theirs.numpy(), atol=5e-7)  # few float32 roundings


@pytest.mark.parametrize("kind", FLOW_KINDS)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_drawn_flow_times_follow_their_distribution(kind, factor):
    p = paradigm("flow", time_sampling=kind, schedule_rescale=factor)
    count = 20_000
    t = p.sample_t(jax.random.key(0), (count,))
    assert t.dtype == jnp.float32 and t.shape == (count,)
    t = np.sort(np.asarray(t, np.float64))
    assert t[0] >= 0 and t[-1] <= 1
    unshifted = t / (factor - (factor - 1) * t)
    expected = np.array([timesteps.flow_time_cdf(x, kind, **DEFAULTS) for x in unshifted[::20]])
    distance = np.abs(expected - (np.arange(count)[::20] + 0.5) / count).max()
    assert distance < 1.95 / count**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_logit_normal_location_and_spread():
    p = paradigm("flow", time_sampling="logit_normal", logit_mean=0.5, logit_std=2.0)
    t = np.asarray(p.sample_t(jax.random.key(1), (20_000,)), np.float64)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([np.median(logit), logit.std()], [0.5, 2.0], atol=0.07)  # four standard errors
    assert p.active_fraction(np.exp(0.5)) == pytest.approx(0.5)


def test_drawn_indices_are_uniform_over_the_whole_schedule():
    t = paradigm("v").sample_t(jax.random.key(0), (200, 1000))
    assert t.dtype == jnp.int32
    counts = np.bincount(np.asarray(t).ravel(), minlength=1000)
    assert counts.shape == (1000,)  # 0 .. 999
    assert np.abs(counts - 200).max() < 6 * 200**0.5


@pytest.mark.parametrize("groups", [1, 3])
def test_stratified_numbers(groups):
    """One in every interval of each group, each place uniform over all of them, and groups unlike each other."""
    size, draws = 8, 2000
    keys = jax.random.split(jax.random.key(0), draws)
    u = np.asarray(jax.jit(jax.vmap(lambda key: timesteps.stratified_uniform(key, groups, size)))(keys))
    assert u.shape == (draws, groups * size) and u.min() >= 0 and u.max() < 1
    u = u.reshape(draws, groups, size)
    np.testing.assert_array_equal(np.sort(np.floor(u * size), axis=2), np.broadcast_to(np.arange(size), u.shape))
    for place in u.reshape(draws, -1).T:  # Kolmogorov-Smirnov, p = 0.0001
        assert np.abs(np.sort(place) - (np.arange(draws) + 0.5) / draws).max() < 2.23 / draws**0.5
    if groups > 1:
        assert abs(np.corrcoef(u[:, 0, 0], u[:, 1, 0])[0, 1]) < 4 / draws**0.5


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_times_of_uniform_numbers_have_the_drawn_distribution(factor):
    u = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    for name in ("eps", "v"):
        np.testing.assert_array_equal(paradigm(name, schedule_rescale=factor).time_of(jnp.asarray(u)), np.arange(1000))
    ends = paradigm("eps").time_of(jnp.array([0.0, 1 - 2.0**-24]))
    assert ends.dtype == jnp.int32 and ends.tolist() == [0, 999]
    for kind in FLOW_KINDS:
        p = paradigm("flow", time_sampling=kind, schedule_rescale=factor)
        t = np.asarray(p.time_of(jnp.asarray(u)), np.float64)
        below = [timesteps.flow_time_cdf(x, kind, **DEFAULTS) for x in t / (factor - (factor - 1) * t)]
        np.testing.assert_allclose(below, 1 - u if kind == "mode" else u, atol=1e-5)
        assert np.isfinite(p.time_of(jnp.array([0.0, 1 - 2.0**-24]))).all()


def test_time_input_is_on_the_scale_of_the_indices():
    index = paradigm("eps").time_input(jnp.array([0, 999], jnp.int32))
    time = paradigm("flow").time_input(jnp.array([0.0, 0.25, 1.0]))
    assert index.dtype == time.dtype == jnp.float32
    np.testing.assert_array_equal(index, [0, 999])
    np.testing.assert_array_equal(time, [0, 250, 1000])
