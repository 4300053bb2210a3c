import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lpl_jax import denoisers
from lpl_jax.errors import InputError
from lpl_jax.parallel import (
    MeshConfig,
    batch_sharding,
    batch_shards,
    constrain_batch,
    gather_block_params,
    make_mesh,
    param_sharding,
    partition_spec,
    put_batch,
    put_replicated,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), 8, (2, 4, 1)),
        (MeshConfig(data=1, fsdp=4, tensor=-1), 8, (1, 4, 2)),
        (MeshConfig(data=2, fsdp=1, tensor=3), 6, (2, 1, 3)),
    ],
)
def test_mesh_sizes(config, devices, sizes):
    mesh = make_mesh(config, jax.devices()[:devices])
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.devices.flat) == set(jax.devices()[:devices])


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=16, fsdp=1)])
def test_mesh_that_does_not_fit_names_devices_and_axes(config):
    with pytest.raises(InputError, match=rf"data={config.data}, fsdp={config.fsdp}, tensor=1 does not fit 8 device"):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=0), "mesh.fsdp=0"),
        (dict(tensor=2.0), "mesh.tensor=2.0"),
        (dict(data=-1, fsdp=-1), "only one axis can be -1"),
    ],
)
def test_mesh_config_refuses(sizes, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/head/kernel", (128, 1024), P("fsdp", None)),  # the input of a kernel
        ("params/head/kernel", (1001, 256), P(None, "fsdp")),  # the first that divides
        ("params/label_embed/embedding", (1001, 256), P()),
        ("params/head/kernel", (257, 1001), P(None, None)),  # none divides: replicated
        ("params/patch_embed/kernel", (16, 1152), P()),  # a rule says: whole
        ("params/head/bias", (256,), P()),  # small: replicated
        ("step", (), P()),
        ("params/blocks/norm/scale", (28, 1024), P()),  # small is meant of one layer
        ("params/blocks/table", (28, 3, 65536), P(None, None, "fsdp")),  # the stacked axis is never split
        ("params/blocks/image_modulation/kernel", (28, 256, 1536), P(None, "fsdp", None)),
        ("params/blocks/attn/q/kernel", (28, 256, 256), P(None, "fsdp", "tensor")),
        ("emas/0.9999/blocks/attn/q/kernel", (28, 256, 256), P(None, "fsdp", "tensor")),
        ("opt_state/1/mu/blocks/attn/q/kernel", (28, 256, 256), P(None, "fsdp", "tensor")),
        ("params/blocks/context_mlp/fc2/kernel", (28, 512, 256), P(None, "tensor", "fsdp")),
        ("params/last_block/context_attn/out/kernel", (256, 256), P("tensor", "fsdp")),
        ("params/blocks/attn/q/kernel", (28, 512, 255), P(None, "fsdp", None)),  # 255 does not divide by 2
        ("params/time_mlp/fc1/kernel", (256, 1024), P("fsdp", None)),  # `tensor` is for the blocks
    ],
)
def test_rules(mesh, path, shape, spec):
    assert partition_spec(path, shape, mesh) == spec


def test_axes_of_size_one_are_not_named():
    mesh = make_mesh(MeshConfig(data=8))
    assert partition_spec("params/blocks/attn/q/kernel", (28, 256, 256), mesh) == P(None, None, None)


def test_sharding_of_a_tree_keeps_its_structure(mesh):
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}, "b": (jax.ShapeDtypeStruct((), int),)}
    shardings = param_sharding(shapes, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    assert shardings["a"]["kernel"].spec == P("fsdp", None)
    assert shardings["b"][0].is_fully_replicated


def test_put_batch_splits_over_data_and_fsdp(mesh):
    batch = {"x": np.arange(8 * 3, dtype=np.float32).reshape(8, 3), "label": np.arange(8, dtype=np.int32)}
    placed = put_batch(batch, mesh)
    assert batch_shards(mesh) == 4
    for name, array in placed.items():
        np.testing.assert_array_equal(np.asarray(array), batch[name])
        assert array.addressable_shards[0].data.shape[0] == 2
        assert array.dtype == batch[name].dtype
    with pytest.raises(InputError, match="batch size 6 cannot be split over data=1 x fsdp=4: .* multiple of 4"):
        put_batch(np.zeros((6, 2)), mesh)


def test_put_replicated(mesh):
    whole = put_replicated({"x": np.arange(16.0).reshape(8, 2)}, mesh)["x"]
    assert whole.is_fully_replicated and len(whole.addressable_shards) == 8


def test_constrain_batch_is_a_hint_under_a_mesh(mesh):
    def double(x):
        return constrain_batch(x * 2)

    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    whole = put_replicated(x, mesh)
    with jax.set_mesh(mesh):
        split = jax.jit(double)(whole)
        odd = jax.jit(double)(whole[:7])  # 7 images on 4 devices: left alone
    assert split.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(split, x * 2)
    np.testing.assert_array_equal(odd, x[:7] * 2)
    np.testing.assert_array_equal(jax.jit(double)(x), x * 2)  # no mesh
    rows = P(("data", "fsdp"))
    inside = jax.shard_map(double, mesh=mesh, in_specs=rows, out_specs=rows)  # the batch axes are not XLA's there
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(inside)(x), x * 2)


def test_weights_of_a_block_are_gathered_for_use(mesh):
    params = {"attn": {"q": {"kernel": np.ones((128, 256), np.float32), "bias": np.ones(256, np.float32)}}}
    split = jax.device_put(params, param_sharding({"block": params}, mesh)["block"])
    assert split["attn"]["q"]["kernel"].sharding.spec == P("fsdp", "tensor")
    with jax.set_mesh(mesh):
        used = jax.jit(gather_block_params)(split)["attn"]["q"]
    assert used["kernel"].addressable_shards[0].data.shape == (128, 128) and used["bias"].is_fully_replicated
    np.testing.assert_array_equal(used["kernel"], params["attn"]["q"]["kernel"])


@pytest.mark.parametrize(
    "sizes, remat, some", [((1, 4, 2), "full", True), ((1, 4, 2), "none", False), ((8, 1, 1), "full", False)]
)
def test_blocks_gather_where_weights_are_split_and_computed_again(sizes, remat, some):
    config = denoisers.preset("tiny", hidden=128, depth=2, remat=remat)
    shapes = jax.eval_shape(functools.partial(denoisers.init, config), jax.random.key(0))
    inputs = jnp.zeros((8, 4, 4, config.latent_channels)), jnp.zeros(8), jnp.zeros(8, jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        traced = jax.make_jaxpr(lambda params: denoisers.MMDiT(config).apply({"params": params}, *inputs))(shapes)
    kernel = "f32[128,512]"  # of an MLP
    assert any(kernel in line and "sharding_constraint" in line for line in str(traced).splitlines()) == some


def test_gathered_weights_give_the_value_and_gradient_of_one_device(mesh):
    config = denoisers.preset("tiny", hidden=128, depth=2, num_classes=2, remat="full", dtype="float32")
    shapes = jax.eval_shape(functools.partial(denoisers.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes)
    inputs = rng.standard_normal((8, 4, 4, config.latent_channels), np.float32), np.arange(8.0), np.arange(8) % 2

    def loss(params, latents, time, label):
        return jnp.mean(denoisers.MMDiT(config).apply({"params": params}, latents, time, label) ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(params, *inputs)
    split = jax.device_put(params, param_sharding(params, mesh))
    assert not split["blocks"]["mlp"]["fc1"]["kernel"].is_fully_replicated
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(split, *put_batch(inputs, mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # sums of float32 in another order
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)],
)
def test_gradient_of_the_denoiser_moves_weights_not_activations(sizes, capfd):
    """Compiled only, with nearly everything split as in a large model, and more tokens than parameters have rows."""
    mesh = make_mesh(MeshConfig(*sizes))
    config = dataclasses.replace(denoisers.preset("tiny"), depth=3, num_classes=10, dtype="float32")
    shapes = jax.eval_shape(functools.partial(denoisers.init, config), jax.random.key(0))
    shardings = param_sharding(shapes, mesh, min_size=512)
    assert not shardings["blocks"]["attn"]["q"]["kernel"].is_fully_replicated
    params = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)

    def given(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    def loss(params, latents, time, label):
        return jnp.mean(denoisers.MMDiT(config).apply({"params": params}, latents, time, label) ** 2)

    inputs = given((64, 16, 16, config.latent_channels)), given((64,)), given((64,), jnp.int32)
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, *inputs).compile()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
