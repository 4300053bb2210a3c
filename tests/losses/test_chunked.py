"""Value and gradient together, in chunks and on shards, against the joint computation, plainly differentiated."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from lpl_jax import parallel
from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.cost.flops import traced_flops
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, gated_perceptual_loss, latent_perceptual_loss, perceptual_distance
from lpl_jax.losses.chunked import auto_chunk, decoded_distance

BATCH = 16
SMALL = LPLConfig.paper(taps=1, mask_layers=(0,), tau=1.5, tau_ref_resolution=256)  # compiles fast


@pytest.fixture(scope="module")
def latents():
    """Predicted and clean latents (16, 4, 4, 4)."""
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((BATCH, 4, 4, 4)).astype(np.float32)
    return (clean + 0.5 * rng.standard_normal(clean.shape)).astype(np.float32), clean


def joint(autoencoder, pred, target, config):
    """All rows at once; the gradient is JAX's own."""

    def features(latents):
        if config.taps == "rgb":
            return (autoencoder.decode(latents),)
        count = None if config.taps == "all" else config.taps
        return autoencoder.features(latents, num_taps=count, post_quant_conv=config.post_quant_conv)

    return perceptual_distance(config, predicted=features(pred), clean=features(target))


@functools.partial(jax.jit, static_argnums=(0, 4))
def pulled_back(function, autoencoder, pred, target, config, cotangent):
    """Losses, their parts, and the gradient of cotangent @ losses."""
    losses, pull, taps = jax.vjp(lambda z: function(autoencoder, z, target, config), pred, has_aux=True)
    return losses, taps, pull(cotangent)[0]


@pytest.mark.parametrize(
    ("config", "chunk"),
    [
        (LPLConfig.paper(taps=3), 2),  # the last chunk is filled up
        pytest.param(LPLConfig.reference(taps=3), 1, marks=pytest.mark.slow),
        pytest.param(LPLConfig.paper(taps=2, mask_layers="all", stats="separate"), 5, marks=pytest.mark.slow),
        pytest.param(LPLConfig.paper(taps="rgb"), None, marks=pytest.mark.slow),
        pytest.param(LPLConfig.paper(), 2, marks=pytest.mark.slow),
        pytest.param(LPLConfig.reference(), 3, marks=pytest.mark.slow),
    ],
    ids=["paper", "reference", "all_at_once", "rgb", "paper_5_taps", "reference_5_taps"],
)
def test_equals_the_joint_computation(config, chunk, tiny_autoencoder, latents):
    pred, target = (each[:5] for each in latents)
    cotangent = np.array([1.0, -2.0, 0.0, 0.5, 3.0], np.float32)

    def chunked(autoencoder, pred, target, config):
        return decoded_distance(autoencoder, config, z0_hat=pred, z0=target, chunk=chunk)[:2]

    expected = pulled_back(joint, tiny_autoencoder, pred, target, config, cotangent)
    found = pulled_back(chunked, tiny_autoencoder, pred, target, config, cotangent)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=2e-6 * np.abs(there).max())
    assert np.abs(expected[2]).max() > 0 and not found[2][2].any()
    undifferentiated = jax.jit(chunked, static_argnums=3)(tiny_autoencoder, pred, target, config)
    np.testing.assert_allclose(undifferentiated[0], expected[0], rtol=1e-5)


def test_three_decodes_with_gradient_and_two_without(tiny_autoencoder, latents):
    def loss(pred, target):
        return latent_perceptual_loss(tiny_autoencoder, LPLConfig.paper(), z0_hat=pred, z0=target, chunk=2)[0].sum()

    decode = traced_flops(tiny_autoencoder.features, latents[0])
    assert traced_flops(loss, *latents) == 2 * decode
    # Less than 3: the convolutions of the first layers have no gradient of weights, more: attention has two products
    np.testing.assert_allclose(traced_flops(jax.grad(loss), *latents) / decode, 3, rtol=0.05)
    assert traced_flops(jax.grad(loss, argnums=1), *latents) > 0  # no gradient, and no error either


def test_the_rows_with_the_largest_scores_of_each_group(tiny_autoencoder, latents):
    pred, target = latents
    whole, _ = jax.jit(latent_perceptual_loss, static_argnums=1)(tiny_autoencoder, SMALL, z0_hat=pred, z0=target)
    scores = jnp.array([[3, 1, 2, 0], [0, 1, 2, 3], [1, 1, 5, 4], [9, -9, -8, -7]], jnp.float32)
    chosen = jax.jit(decoded_distance, static_argnums=1, static_argnames=("rows", "chunk"))
    losses, taps, decoded = chosen(tiny_autoencoder, SMALL, z0_hat=pred, z0=target, scores=scores, rows=2, chunk=3)
    expected = np.zeros(BATCH, bool)
    expected[[0, 2, 6, 7, 10, 11, 12, 15]] = True
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_allclose(losses, np.where(expected, whole, 0), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(taps.term)[:, 0] > 0, expected)


def gate_levels():
    """alpha and sigma (16,): 13 rows under tau; the last one of the others at alpha = 0."""
    alpha, sigma = np.full(BATCH, 0.8, np.float32), np.full(BATCH, 0.9, np.float32)
    alpha[[2, 5]], alpha[9] = 0.4, 0.0
    return alpha, sigma


def gated(autoencoder, z0_hat, z0, alpha, sigma, capacity=8):
    given = dict(z0_hat=z0_hat, z0=z0, alpha=alpha, sigma=sigma, key=jax.random.key(3))
    return gated_perceptual_loss(autoencoder, SMALL, **given, resolution=256, capacity=capacity, groups=8)


gated_gradient = jax.value_and_grad(gated, argnums=1, has_aux=True)


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1), (2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 4, 1), (1, 1, 4)))], ids=str
)
def test_meshes_agree_and_devices_do_not_talk(sizes, tiny_autoencoder, latents):
    (expected, expected_metrics), expected_gradient = jax.jit(gated_gradient)(
        tiny_autoencoder, *latents, *gate_levels()
    )
    mesh = parallel.make_mesh(parallel.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        rows = parallel.put_batch((*latents, *gate_levels()), mesh)
        compiled = jax.jit(gated_gradient).lower(parallel.put_replicated(tiny_autoencoder, mesh), *rows).compile()
        (loss, metrics), gradient = compiled(parallel.put_replicated(tiny_autoencoder, mesh), *rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * np.abs(expected_gradient).max())
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, err_msg=name)
    assert gradient.sharding.is_equivalent_to(parallel.batch_sharding(mesh), gradient.ndim)
    check_collectives(compiled.as_text())
    decoded = {int(size) for size in re.findall(r"= f32\[(\d+),\d+,\d+,\d+\]\S* convolution\(", compiled.as_text())}
    assert decoded == {8 // (sizes[0] * sizes[1])}  # rows of each device


def check_collectives(program: str):
    """The sums of loss and metrics over devices are the only communication: all-reduces of a few numbers."""
    collective = r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(collective, program):
        elements = [np.prod([int(n) for n in size.split(",") if n]) for size in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        assert kind == "all-reduce" and max(elements) <= 5, f"{kind} of {shapes}"


def test_lowers_for_a_mesh_without_devices(tiny_autoencoder, latents):
    mesh = AbstractMesh((2, 4, 1), parallel.AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(gated_gradient).trace(tiny_autoencoder, *latents, *gate_levels()).jaxpr.pretty_print()
    assert "shard_map" in text


def test_memory_does_not_grow_with_the_decoded_rows(tiny_autoencoder):
    def plan(capacity):
        shape = jax.ShapeDtypeStruct((32, 8, 8, 4), jnp.float32)
        number = jax.ShapeDtypeStruct((32,), jnp.float32)

        def gradient(autoencoder, *rows):
            def loss(z0_hat, z0, alpha, sigma):
                given = dict(z0_hat=z0_hat, z0=z0, alpha=alpha, sigma=sigma, key=jax.random.key(0))
                options = dict(resolution=64, capacity=capacity, chunk=1)
                return gated_perceptual_loss(autoencoder, LPLConfig.paper(taps=3), **given, **options)[0]

            return jax.grad(loss)(*rows)

        compiled = jax.jit(gradient).lower(tiny_autoencoder, shape, shape, number, number).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = plan(8), plan(16)
    assert few <= many < 1.05 * few


def test_auto_chunk(tiny_autoencoder):
    assert [auto_chunk(tiny_autoencoder, side, side) for side in (16, 32, 48, 64, 128)] == [16, 4, 1, 1, 1]
    assert tiny_autoencoder.config == AutoencoderConfig.tiny()  # of downsampling factor 8


def test_a_batch_that_the_mesh_cannot_split(tiny_autoencoder, latents):
    with jax.set_mesh(parallel.make_mesh(parallel.MeshConfig())):
        with pytest.raises(InputError, match="a batch of 5 cannot be split into 8"):
            latent_perceptual_loss(tiny_autoencoder, SMALL, z0_hat=latents[0][:5], z0=latents[1][:5])
        with pytest.raises(InputError, match="groups=4 do not cut a batch of 16 on 8 device parts.*: 8, 16 would"):
            names = ("z0_hat", "z0", "alpha", "sigma")
            given = dict(zip(names, (*latents, *gate_levels()), strict=True), key=jax.random.key(0))
            gated_perceptual_loss(tiny_autoencoder, SMALL, **given, resolution=256, capacity=8, groups=4)
