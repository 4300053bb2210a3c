import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpl_jax.errors import InputError
from lpl_jax.experiment import OptimizerConfig
from lpl_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer


def test_warm_up_then_constant():
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=4))
    np.testing.assert_allclose([rate(n) for n in (0, 1, 3, 4, 10**6)], [2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3], rtol=1e-6)


def test_no_warm_up():
    assert float(learning_rate_schedule(OptimizerConfig(warmup_steps=0))(0)) == pytest.approx(1e-4, rel=1e-6)


def test_cosine_goes_to_zero_at_the_end_and_stays():
    rate = learning_rate_schedule(OptimizerConfig(1.0, 10, "cosine", total_steps=110))
    steps = np.array([4, 9, 10, 35, 60, 110, 200])
    expected = [0.5, 1.0, 1.0, 0.5 * (1 + np.cos(np.pi / 4)), 0.5, 0.0, 0.0]
    np.testing.assert_allclose(jax.vmap(rate)(steps), expected, atol=1e-6)
    on_host = [rate(int(step)) for step in steps]
    assert not any(isinstance(value, jax.Array) for value in on_host)
    np.testing.assert_allclose(on_host, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(schedule="linear"), "optimizer.schedule='linear' is not possible: it must be one of constant, cosine"),
        (dict(learning_rate=0.0), "optimizer.learning_rate=0.0"),
        (dict(warmup_steps=-1), "optimizer.warmup_steps=-1"),
        (dict(b2=1.0), "optimizer.b2=1.0"),
        (dict(clip_norm=0.0), "optimizer.clip_norm=0.0 is not possible: it must be above 0"),
        (dict(weight_decay=-0.1), "optimizer.weight_decay=-0.1"),
        (dict(schedule="cosine"), "optimizer.total_steps=None is not possible: .* more than warmup_steps=1000"),
        (dict(schedule="cosine", total_steps=1000), "optimizer.total_steps=1000 is not possible"),
        (dict(total_steps=10), "optimizer.total_steps=10 is not possible: schedule 'constant' has no end"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(OptimizerConfig(), **change)


def _update(config, gradients, params):
    optimizer, _ = make_optimizer(config)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradients, params)


def test_adam_is_fed_the_clipped_gradient():
    """With a large eps the first update is lr g / (|g| + eps): it shows the size of the gradient that Adam saw."""
    params = {"kernel": jnp.zeros(2)}
    gradients = {"kernel": jnp.array([30.0, -40.0])}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0)
    g = np.array([0.6, -0.8])  # norm 50 clipped to 1
    np.testing.assert_allclose(_update(config, gradients, params)[0]["kernel"], -g / (np.abs(g) + 1), rtol=1e-5)
    g = np.array([30.0, -40.0])
    free = dataclasses.replace(config, clip_norm=None)
    np.testing.assert_allclose(_update(free, gradients, params)[0]["kernel"], -g / (np.abs(g) + 1), rtol=1e-5)


def test_adam_moments_after_two_updates():
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=None))
    params = {"kernel": jnp.zeros(1)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in (1.0, 3.0):
        updates, state = update({"kernel": jnp.array([g])}, state, params)
    mean = (0.1 * 0.9 * 1 + 0.1 * 3) / (1 - 0.9**2)
    square = (0.05 * 0.95 * 1 + 0.05 * 9) / (1 - 0.95**2)
    np.testing.assert_allclose(updates["kernel"], [-mean / np.sqrt(square)], rtol=1e-5)


def test_weight_decay_is_for_kernels_only():
    params = {
        "blocks": {"query": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(3)}},
        "label": {"embedding": jnp.ones((4, 3))},
    }
    mask = decay_mask(params)
    assert mask["blocks"] == {"query": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert mask["label"] == {"embedding": False}
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    updates, _ = _update(config, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["blocks"]["query"]["kernel"], -0.05, rtol=1e-6)
    assert float(optax.global_norm(updates)) == pytest.approx(0.05 * np.sqrt(18), rel=1e-6)
