"""The contract that eps, v and flow share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.diffusion import PARADIGMS, Paradigm, paradigm
from lpl_jax.errors import InputError

CONFIGS = [(name, factor) for name in ("eps", "v", "flow") for factor in (1.0, 2.0)]


def times(name, count=64):
    """Times over the whole range, both ends included."""
    grid = np.linspace(0, 1, count)
    return jnp.asarray(grid, jnp.float32) if name == "flow" else jnp.asarray(np.round(999 * grid), jnp.int32)


def latents(seed, count=64):
    return jax.random.normal(jax.random.key(seed), (count, 2, 3, 4))


def exact(p, t):
    """(alpha, sigma) of shape (B, 1, 1, 1) in float64, by a way of its own."""
    t = np.asarray(t)
    if p.name == "flow":
        alpha, sigma = 1 - t.astype(np.float64), t.astype(np.float64)
    else:
        alpha, sigma = (table[t] for table in p.tables())
    return alpha[:, None, None, None], sigma[:, None, None, None]


@pytest.mark.parametrize(("name", "factor"), CONFIGS)
def test_formulas_of_table_1(name, factor):
    """z_t, target and both estimates against the formulas, written out per paradigm in float64."""
    p, t, z0, noise, prediction = (
        paradigm(name, schedule_rescale=factor),
        times(name),
        latents(0),
        latents(1),
        latents(2),
    )
    a, s = exact(p, t)
    z0_, noise_, d = (np.asarray(x, np.float64) for x in (z0, noise, prediction))
    z_t_ = a * z0_ + s * noise_
    target, z0_hat, eps_hat = {
        "eps": lambda: (noise_, (z_t_ - s * d) / a, d),
        "v": lambda: (a * noise_ - s * z0_, a * z_t_ - s * d, s * z_t_ + a * d),
        "flow": lambda: (noise_ - z0_, z_t_ - s * d, z_t_ + (1 - s) * d),
    }[name]()

    z_t = p.add_noise(z0=z0, noise=noise, t=t)
    # 1e-6: a few float32 roundings of O(1) values. z0_hat of eps multiplies them by 1 / alpha.
    np.testing.assert_allclose(z_t, z_t_, atol=2e-6)
    np.testing.assert_allclose(p.target(z0=z0, noise=noise, t=t), target, atol=2e-6)
    ours = p.estimate(z_t=z_t, prediction=prediction, t=t)
    gain = 1 / a if name == "eps" else 1.0
    assert np.max(np.abs(ours[0] - z0_hat) / gain) < 2e-6
    np.testing.assert_allclose(ours[1], eps_hat, atol=2e-6)


@pytest.mark.parametrize(("name", "factor"), CONFIGS)
def test_estimate_inverts_add_noise_and_target(name, factor):
    p, t, z0, noise = paradigm(name, schedule_rescale=factor), times(name), latents(0), latents(1)
    z_t, target = p.add_noise(z0=z0, noise=noise, t=t), p.target(z0=z0, noise=noise, t=t)
    z0_hat, eps_hat = p.estimate(z_t=z_t, prediction=target, t=t)
    # The roundings of z_t and of sigma * D (6e-8 of values up to 4) come back multiplied by 1 / alpha for eps, <= 29.
    gain = 1 / np.asarray(p.alpha_sigma(t)[0])[:, None, None, None] if name == "eps" else 1.0
    assert np.max(np.abs(z0_hat - z0) / gain) < 2e-6
    np.testing.assert_allclose(eps_hat, noise, atol=2e-6)


@pytest.mark.parametrize(("name", "factor"), CONFIGS)
def test_estimates_rebuild_z_t(name, factor):
    """Whatever the network says, alpha * z0_hat + sigma * eps_hat = z_t: the two estimates belong together."""
    p, t, z_t, prediction = paradigm(name, schedule_rescale=factor), times(name), latents(0), latents(1)
    z0_hat, eps_hat = p.estimate(z_t=z_t, prediction=prediction, t=t)
    np.testing.assert_allclose(p.add_noise(z0=z0_hat, noise=eps_hat, t=t), z_t, atol=4e-6)


@pytest.mark.parametrize(("name", "factor"), CONFIGS)
def test_estimate_and_its_gradients_are_finite_at_every_time(name, factor):
    p = paradigm(name, schedule_rescale=factor)
    t = times(name, 1000)
    z_t, prediction = latents(0, 1000)[:, 0, 0], latents(1, 1000)[:, 0, 0]

    def loss(z_t, prediction):
        z0_hat, eps_hat = p.estimate(z_t=z_t, prediction=prediction, t=t)
        return jnp.sum(z0_hat**2) + jnp.sum(eps_hat**2)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(z_t, prediction)
    chex.assert_tree_all_finite((value, gradients))
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)


def test_eps_hat_of_eps_is_the_prediction_itself():
    prediction = latents(1)
    _, eps_hat = paradigm("eps").estimate(z_t=latents(0), prediction=prediction, t=times("eps"))
    np.testing.assert_array_equal(eps_hat, prediction)


def test_last_index_of_v_is_pure_noise():
    p, t, z0, noise, prediction = paradigm("v"), jnp.array([999]), latents(0, 1), latents(1, 1), latents(2, 1)
    np.testing.assert_array_equal(p.add_noise(z0=z0, noise=noise, t=t), noise)
    np.testing.assert_array_equal(p.target(z0=z0, noise=noise, t=t), -z0)
    z0_hat, eps_hat = p.estimate(z_t=noise, prediction=prediction, t=t)
    np.testing.assert_array_equal(z0_hat, -prediction)
    np.testing.assert_array_equal(eps_hat, noise)


@pytest.mark.parametrize("name", PARADIGMS)
def test_bfloat16_predictions_are_estimated_in_float32(name):
    p, t, z_t = paradigm(name), times(name), latents(0)
    prediction = latents(1).astype(jnp.bfloat16)
    low_estimates = p.estimate(z_t=z_t, prediction=prediction, t=t)
    full_estimates = p.estimate(z_t=z_t, prediction=prediction.astype(jnp.float32), t=t)
    for low, full in zip(low_estimates, full_estimates, strict=True):
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, full)
    z_t_low = z_t.astype(jnp.bfloat16)
    for function in (p.add_noise, p.target):
        assert function(z0=z_t_low, noise=prediction, t=t).dtype == jnp.float32


@pytest.mark.parametrize("name", PARADIGMS)
def test_noise_level_is_sigma_over_alpha(name):
    p, t = paradigm(name), times(name)
    alpha, sigma = (x.reshape(-1) for x in exact(p, t))
    level = np.asarray(p.noise_level(t))
    assert (level[-1] == np.inf) == (name != "eps")
    np.testing.assert_allclose(level[:-1], sigma[:-1] / alpha[:-1], rtol=2e-6)  # 1 - t in float32 near t = 1


def test_an_index_outside_the_schedule_is_not_silently_replaced():
    alpha, sigma = paradigm("eps").alpha_sigma(jnp.array([-1, 0, 999, 1000]))
    np.testing.assert_array_equal(np.isnan(alpha), [True, False, False, True])
    np.testing.assert_array_equal(np.isnan(sigma), [True, False, False, True])


def test_paradigm_is_a_static_argument():
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnames="p")
    @chex.assert_max_traces(n=2)  # 2 and 2.0 are one configuration
    def jitted(z0, noise, t, p):
        return p.add_noise(z0=z0, noise=noise, t=t)

    z0, noise, t = latents(0), latents(1), times("v")
    outputs = [jitted(z0, noise, t, p=paradigm("v", schedule_rescale=k)) for k in (2, 2.0, 1.0)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.1
    assert len({paradigm("eps"), paradigm("eps"), paradigm("v"), paradigm("flow")}) == 3


def test_works_on_a_batch_that_is_spread_over_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    p, z_t, prediction, t = paradigm("v", schedule_rescale=2), latents(0), latents(1), times("v")
    spread = jax.jit(p.estimate)(**jax.device_put(dict(z_t=z_t, prediction=prediction, t=t), sharding))
    assert spread[0].sharding.is_equivalent_to(sharding, spread[0].ndim)
    for ours, expected in zip(spread, p.estimate(z_t=z_t, prediction=prediction, t=t), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-6)  # fused multiply-add rounds once less


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {}, "paradigm.name='ddpm' is not possible: it must be one of eps, v, flow"),
        ("eps", {"zero_terminal_snr": True}, "impossible with 'eps'"),
        ("v", {"zero_terminal_snr": "yes"}, "zero_terminal_snr='yes' is not possible: it must be True or False"),
        (
            "eps",
            {"mode_scale": 1.0},
            "mode_scale of 'eps' is not known.*; possible: schedule_rescale, zero_terminal_snr",
        ),
        (
            "flow",
            {"zero_terminal_snr": True},
            "zero_terminal_snr of 'flow' is not known; possible: schedule_rescale, time_sampling",
        ),
        ("v", {"schedule_rescale": 0.0}, r"schedule_rescale=0.0 is not possible: it must be in \[0.001, 1000\]"),
        ("v", {"schedule_rescale": float("nan")}, "schedule_rescale=nan is not possible: it must be in "),
        ("v", {"schedule_rescale": "2"}, r"schedule_rescale='2' is not possible: it must be a number \(in "),
        ("v", {"train_steps": 1}, "train_steps=1 is not possible: it must be 2 to 100,000"),
        ("v", {"beta_start": 0.02}, "beta_end=0.012 is not possible: it must be above beta_start=0.02"),
        (
            "flow",
            {"time_sampling": "cosine"},
            "time_sampling='cosine' is not possible: it must be one of mode, uniform, logit_normal",
        ),
        ("flow", {"mode_scale": 1.76}, r"mode_scale=1.76 is not possible: it must be in \[-1, 1.751938\]"),
        ("flow", {"mode_scale": -1.01}, "mode_scale=-1.01"),
        ("flow", {"logit_std": 0.0}, "logit_std=0.0 is not possible: it must be in "),
    ],
)
def test_impossible_configurations(name, options, message):
    with pytest.raises(InputError, match=message) as error:
        paradigm(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, z, t: p.add_noise(z0=z, noise=z, t=t.astype(jnp.float32)), "integer indices 0..999, got float32"),
        (lambda p, z, t: paradigm("flow").add_noise(z0=z, noise=z, t=t), "floats between 0 and 1, got int32"),
        (lambda p, z, t: p.add_noise(z0=z, noise=z[:1], t=t), "z0 and noise must have the same shape"),
        (lambda p, z, t: p.target(z0=z, noise=z[..., :1], t=t), "z0 and noise must have the same shape"),
        (lambda p, z, t: p.estimate(z_t=z, prediction=z[..., :1], t=t), "z_t and prediction must have the same shape"),
        (
            lambda p, z, t: p.add_noise(z0=z, noise=z, t=t[:1]),
            r"t of shape \(1,\) does not fit latents .* \(64, 2, 3, 4\)",
        ),
    ],
)
def test_wrong_arrays(call, message):
    with pytest.raises(InputError, match=message):
        call(paradigm("v"), latents(0), times("v"))


def test_a_scalar_time_serves_the_whole_batch():
    p, z0, noise = paradigm("v"), latents(0), latents(1)
    scalar, vector = jnp.int32(500), jnp.full(64, 500, jnp.int32)
    np.testing.assert_array_equal(p.add_noise(z0=z0, noise=noise, t=scalar), p.add_noise(z0=z0, noise=noise, t=vector))


def test_the_contract_cannot_be_built_without_a_paradigm():
    with pytest.raises(TypeError, match="abstract"):
        Paradigm()
