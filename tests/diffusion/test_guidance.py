"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.diffusion import guided, paradigm, rescaled_guidance, sample
from lpl_jax.errors import InputError


class Recorder:
    """A small conditional denoiser that remembers the batch sizes it was called with."""

    def __init__(self, dtype=jnp.float32):
        self.batches = []
        self.dtype = dtype

    def __call__(self, z, t, context):
        assert z.shape[0] == t.shape[0] == context["label"].shape[0] == context["pooled"].shape[0]
        self.batches.append(z.shape[0])
        shift = context["label"] * 0.5 + context["pooled"].sum(-1) + 0.001 * t
        return jnp.tanh(z + shift[:, None, None, None]).astype(self.dtype)


@pytest.fixture
def inputs():
    z = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
    t = jnp.array([10, 500, 999])
    context = {"label": jnp.array([0, 1, 2]), "pooled": jax.random.normal(jax.random.key(1), (3, 5))}
    null_context = {"label": jnp.full(3, 7), "pooled": jnp.zeros((3, 5))}
    return z, t, context, null_context


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 2, 7.5])
def test_formula_in_one_doubled_batch(inputs, scale):
    z, t, context, null_context = inputs
    denoise = Recorder()
    ours = guided(denoise, scale, context=context, null_context=null_context)(z, t)
    assert denoise.batches == [6]
    conditional, null = (np.asarray(denoise(z, t, c), np.float64) for c in (context, null_context))
    np.testing.assert_allclose(ours, null + scale * (conditional - null), atol=3e-6)  # roundings of values up to 15


def test_scale_one_is_one_plain_evaluation(inputs):
    z, t, context, null_context = inputs
    denoise = Recorder()
    ours = guided(denoise, 1.0, context=context, null_context=null_context)(z, t)
    assert denoise.batches == [3]
    np.testing.assert_array_equal(ours, denoise(z, t, context))


def test_scale_zero_is_the_null_prediction(inputs):
    z, t, context, null_context = inputs
    ours = guided(Recorder(), 0.0, context=context, null_context=null_context)(z, t)
    np.testing.assert_allclose(ours, Recorder()(z, t, null_context), atol=1e-7)


def test_equal_contexts_make_the_scale_irrelevant(inputs):
    z, t, context, _ = inputs
    ours = guided(Recorder(), 5.0, context=context, null_context=context)(z, t)
    np.testing.assert_allclose(ours, Recorder()(z, t, context), atol=1e-6)


def test_bfloat16_predictions_are_combined_in_float32(inputs):
    z, t, context, null_context = inputs
    denoise = Recorder(jnp.bfloat16)
    ours = guided(denoise, 2.0, context=context, null_context=null_context)(z, t)
    assert ours.dtype == jnp.float32
    conditional, null = (denoise(z, t, c).astype(jnp.float32) for c in (context, null_context))
    np.testing.assert_array_equal(ours, null + 2.0 * (conditional - null))


def test_inside_a_sampler_only_the_doubled_batch_is_traced(inputs):
    z, _, context, null_context = inputs
    denoise = Recorder()
    denoise_guided = guided(denoise, 2.0, context=context, null_context=null_context)
    latents = jax.jit(lambda noise: sample(denoise_guided, noise, paradigm("v"), steps=4))(z)
    assert denoise.batches == [6]  # one trace, one doubled batch in the body of the scan
    plain = sample(guided(denoise, 1, context=context, null_context=null_context), z, paradigm("v"), steps=4)
    assert np.isfinite(latents).all() and np.abs(latents - plain).max() > 0.01


def test_law_of_the_scale_over_resolution():
    assert rescaled_guidance(1.5, 2) == 2.0
    assert rescaled_guidance(2.0, 0.5) == 1.5
    assert rescaled_guidance(1.0, 4) == 1.0


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
def test_wrong_scale(inputs, scale):
    with pytest.raises(InputError, match="finite number of at least 0"):
        guided(Recorder(), scale, context=inputs[2], null_context=inputs[3])


def test_contexts_that_do_not_match(inputs):
    _, _, context, null_context = inputs
    with pytest.raises(InputError, match="same shapes"):
        guided(Recorder(), 2.0, context=context, null_context={"label": null_context["label"]})
    with pytest.raises(InputError, match="same shapes"):
        guided(Recorder(), 2.0, context=context["label"], null_context=null_context["label"][:1])
