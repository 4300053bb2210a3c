"""The Self-Perceptual loss against PyTorch: its formula on diffusers' Stable Diffusion 3 with the same weights."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lpl_jax.denoisers import load
from lpl_jax.diffusion import paradigm
from lpl_jax.errors import InputError
from lpl_jax.losses.self_perceptual import block_features, sample_second_t, self_perceptual_loss
from lpl_jax.tools.parity import denoisers as parity

DEPTH = 2
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' network, and ours of its weights: (module, (model, params))."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("twin")
    twin = parity.random_torch({"num_layers": DEPTH, "pos_embed_max_size": 12}, folder)
    return twin, load(folder)


def torch_tokens(twin, latents, time, text, pooled, block):
    """The image stream behind block 1..DEPTH."""
    found = []
    hook = twin.transformer_blocks[block - 1].register_forward_hook(lambda *args: found.append(args[2][1]))
    twin(latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=time)
    hook.remove()
    return found[0]


def draw(seed=0):
    rng = np.random.default_rng(seed)
    widths = parity.TINY["joint_attention_dim"], parity.TINY["pooled_projection_dim"]
    shapes = [(2, 4, 6, 4)] * 3 + [(2, 5, widths[0]), (2, widths[1])]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@partial(jit, static_argnums=(0, 1, 2))
def value_and_gradients(model, block, process, params, t, second_t, inputs):
    """Loss, and the gradient of its sum with respect to weights, prediction, z0 and noise, of which only one is not 0.

    z_t stands apart from z0 and noise, so that the real branch is the only way to them.
    """
    z0, noise, prediction, text, pooled = inputs
    z_t = process.add_noise(z0=z0, noise=noise, t=t)

    def loss(params, prediction, z0, noise):
        z0_hat, eps_hat = process.estimate(z_t=z_t, prediction=prediction, t=t)
        latents = dict(z0_hat=z0_hat, eps_hat=eps_hat, z0=z0, noise=noise)
        features = block_features(model, block)
        values = self_perceptual_loss(features, params, process, **latents, t=second_t, conditions=(text, pooled))
        return values.sum(), values

    gradients, values = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, prediction, z0, noise)
    return values, gradients


def torch_value_and_gradient(twin, block, coefficients, second_coefficients, time, inputs):
    """In float32; `coefficients` are alpha, sigma at t and (p, q) of the target p * noise - q * z0."""
    z0, noise, prediction, text, pooled = (torch.tensor(value) for value in inputs)
    z0, noise, prediction = (value.permute(0, 3, 1, 2) for value in (z0, noise, prediction))
    prediction.requires_grad_()

    def column(values):
        return torch.tensor(values)[:, None, None, None]

    alpha, sigma, p, q = map(column, coefficients)
    z_t = alpha * z0 + sigma * noise
    det = alpha * p + sigma * q
    z0_hat = (p * z_t - sigma * prediction) / det
    noise_hat = (q * z_t + alpha * prediction) / det
    alpha, sigma = map(column, second_coefficients)

    def tokens(a, b):
        return torch_tokens(twin, alpha * a + sigma * b, torch.tensor(time), text, pooled, block)

    losses = ((tokens(z0_hat, noise_hat) - tokens(z0, noise)) ** 2).mean((1, 2))
    losses.sum().backward()
    return losses.detach().numpy(), prediction.grad.permute(0, 2, 3, 1).numpy()


# Paradigm, block, t, t'. At index 999 of v and at t = 1 of flow alpha is 0: all is noise.
CASES = {
    "v": (paradigm("v"), 1, [999, 300], [500, 999]),
    "flow": (paradigm("flow"), DEPTH, [1.0, 0.25], [0.6, 1.0]),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_pytorch(name, pair):
    process, block, t, second_t = CASES[name]
    (twin, (model, params)), inputs = pair, draw()
    t, second_t = jnp.asarray(t), jnp.asarray(second_t)
    values, (of_params, gradient, *of_actual) = value_and_gradients(model, block, process, params, t, second_t, inputs)
    first, second = (tuple(map(np.asarray, process.alpha_sigma(each))) for each in (t, second_t))
    coefficients = first + {"v": first, "flow": ([1.0] * 2, [1.0] * 2)}[name]
    time = np.asarray(second_t, np.float32) * (1000 if name == "flow" else 1)
    expected, wanted = torch_value_and_gradient(twin, block, coefficients, second, time, inputs)
    assert values.shape == (2,)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, wanted, atol=1e-3 * np.abs(wanted).max())
    of_frozen = of_params, of_actual
    chex.assert_trees_all_equal(of_frozen, jax.tree.map(np.zeros_like, of_frozen))


def linear(params, latents, time, shift):
    return latents.reshape(*latents.shape[:1], -1) * params + shift + 0 * time[:, None]


@pytest.mark.parametrize("process", [paradigm("eps"), paradigm("flow")], ids=["eps", "flow"])
def test_perfect_estimates_have_no_loss_and_the_rest_is_the_noised_error(process):
    z0, noise, error, *_ = draw()
    t = jnp.array([0.0, 0.7]) if process.name == "flow" else jnp.array([0, 700])
    alpha, sigma = (value[:, None, None, None] for value in process.alpha_sigma(t))

    @jit
    def loss(z0_hat, eps_hat):
        latents = dict(z0_hat=z0_hat, eps_hat=eps_hat, z0=z0, noise=noise)
        return self_perceptual_loss(linear, 3.0, process, **latents, t=t, conditions=(jnp.ones(96),))

    # Both sides of the difference are compiled for themselves: it may be the last bit, whose square is left.
    np.testing.assert_allclose(loss(z0, noise), 0, atol=1e-12)
    expected = 9 * np.square(alpha * error - 2 * sigma * error).mean((1, 2, 3))
    np.testing.assert_allclose(loss(z0 + error, noise - 2 * error), expected, rtol=1e-4)


def test_without_signal_the_estimate_of_the_latents_gets_no_gradient():
    z0, noise, error, *_ = draw()
    t = jnp.array([999, 999])

    def loss(z0_hat, eps_hat):
        latents = dict(z0_hat=z0_hat, eps_hat=eps_hat, z0=z0, noise=noise)
        return self_perceptual_loss(linear, 1.0, paradigm("v"), **latents, t=t, conditions=(0.0,)).sum()

    of_z0_hat, of_eps_hat = jit(jax.grad(loss, (0, 1)))(z0 + error, noise + error)
    np.testing.assert_array_equal(of_z0_hat, 0)
    assert np.abs(of_eps_hat).max() > 0


def test_second_times_are_uniform_and_independent_of_time_sampling():
    draw_t = jit(sample_second_t, static_argnums=(0, 2))
    indices, flow, shifted = (
        draw_t(each, jax.random.key(0), (20000,))
        for each in (paradigm("eps"), paradigm("flow"), paradigm("flow", schedule_rescale=2.0))
    )
    assert indices.dtype == jnp.int32
    draws = {"eps": np.asarray(indices) / 1000, "flow": np.asarray(flow)}
    for name, t in draws.items():
        # Deciles of a uniform distribution have standard deviations of at most sqrt(0.25 / 20000) = 0.0035.
        deciles = np.quantile(t, np.arange(0.1, 1, 0.1))
        np.testing.assert_allclose(deciles, np.arange(0.1, 1, 0.1), atol=0.015, err_msg=name)
    np.testing.assert_allclose(shifted, 2 * draws["flow"] / (1 + draws["flow"]), rtol=1e-6)


def test_estimates_of_other_latents_are_refused():
    z0, noise, *_ = draw()
    latents = dict(z0_hat=z0[:, :, :3], eps_hat=noise[:, :, :3], z0=z0, noise=noise)
    with pytest.raises(
        InputError, match=r"z0_hat and eps_hat and z0 and noise must have .* \(2, 4, 3, 4\) and .* 6, 4"
    ):
        self_perceptual_loss(linear, 1.0, paradigm("v"), **latents, t=jnp.array([1, 2]), conditions=(0.0,))
