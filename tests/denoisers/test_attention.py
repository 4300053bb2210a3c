"""Attention by name: parity of the kernels with float64, which of them a platform takes, and lowering for all."""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from lpl_jax.denoisers import MMDiT, attention, init, preset
from lpl_jax.denoisers.attention import check_attention, choose_attention, cudnn, current_platform, splash
from lpl_jax.errors import InputError
from lpl_jax.parallel import MeshConfig, batch_sharding, make_mesh


def inputs(queries, keys, *, batch=2, heads=2, size=9, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, heads, size) for n in (queries, keys, keys, queries)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def exact(q, k, v, cotangent):
    """Attention and its gradients in float64, written out."""
    q, k, v, cotangent = (x.astype(np.float64) for x in (q, k, v, cotangent))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    result = np.einsum("bhqk,bkhd->bqhd", p, v)
    dp = np.einsum("bqhd,bkhd->bhqk", cotangent, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    dq, dk = np.einsum("bhqk,bkhd->bqhd", ds, k), np.einsum("bhqk,bqhd->bkhd", ds, q)
    return [result, dq, dk, np.einsum("bhqk,bqhd->bkhd", p, cotangent)]


def with_gradients(function, q, k, v, cotangent):
    result, pull = jax.vjp(lambda q, k, v: function(query=q, key=k, value=v), q, k, v)
    return [result, *pull(cotangent.astype(result.dtype))]


interpreted = functools.partial(splash, interpret=True)


@pytest.mark.parametrize(
    ("function", "queries", "keys"),
    [
        pytest.param(attention, 64, 64 + 77, id="xla"),
        pytest.param(functools.partial(cudnn, implementation="xla"), 64, 64 + 77, id="cudnn-padding"),
        pytest.param(functools.partial(cudnn, implementation="xla"), 65, 65, id="cudnn-padding-joint"),
        # Text, and the pre-only block: 64 image tokens look at those and 77 of text, all padded to 128 and 256.
        pytest.param(interpreted, 64, 64 + 77, id="splash"),
        pytest.param(interpreted, 64 + 77, 64 + 77, id="splash-joint", marks=pytest.mark.slow),
        pytest.param(interpreted, 128, 256, id="splash-no-padding", marks=pytest.mark.slow),
        pytest.param(interpreted, 1025, 1025, id="splash-blocks", marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_the_definition(function, queries, keys):
    given = inputs(queries, keys)
    got = jax.jit(functools.partial(with_gradients, function))(*given)
    for name, here, there in zip(("value", "dq", "dk", "dv"), got, exact(*given), strict=True):
        np.testing.assert_allclose(here, there, atol=2e-5 * np.abs(there).max(), err_msg=name)


@pytest.mark.skipif(current_platform() != "cuda", reason="cuDNN's kernel runs on NVIDIA GPUs only")
@pytest.mark.parametrize("size", [64, 72, 9])
def test_cudnn_equals_the_definition(size):
    """In bfloat16; 9 is padded to 16."""
    given = [x.astype(jnp.bfloat16) for x in inputs(64, 64 + 77, size=size)]
    got = jax.jit(functools.partial(with_gradients, functools.partial(attention, implementation="cudnn")))(*given)
    for name, here, there in zip(("value", "dq", "dk", "dv"), got, exact(*given), strict=True):
        np.testing.assert_allclose(here.astype(np.float64), there, atol=2e-2 * np.abs(there).max(), err_msg=name)


@pytest.mark.parametrize("size", [72, 9])
def test_cudnn_lowers_without_a_gpu(size, monkeypatch):
    """jax asks the installed library for its version, and nothing else of a GPU. Two images and one head a device."""
    version = type("Library", (), {"cudnn_get_version": staticmethod(lambda: 91000)})
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    given = [
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=batch_sharding(mesh))
        for x in inputs(65, 65 + 77, batch=8, size=size)
    ]

    def loss(q, k, v, cotangent):
        return jnp.sum(attention(query=q, key=k, value=v, implementation="cudnn") * cotangent)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    padded = f"tensor<2x66x1x{size + -size % 8}xbf16>"
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        (call,) = [line for line in text.splitlines() if f"custom_call @{name}(" in line]
        assert padded in call, call[-400:]


def test_splash_lowers_for_tpus_on_each_devices_own_heads():
    """Two of eight images and one of two heads a device: the kernel's operands in the program of one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    q, k, v, _ = (
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=batch_sharding(mesh))
        for x in inputs(64, 64 + 77, batch=8, size=72)
    )
    with jax.set_mesh(mesh):
        function = jax.jit(functools.partial(attention, implementation="splash"))
        text = function.trace(query=q, key=k, value=v).lower(lowering_platforms=("tpu",)).as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @tpu_custom_call" in line]
    assert "tensor<2x1x128x72xbf16>" in call and "tensor<2x1x256x72xbf16>" in call


def test_the_model_with_splash_lowers_for_tpus():
    """Inside the scan over blocks, rematerialised, on a mesh: one kernel forward, again for the gradient, and two."""
    config = preset("tiny", remat="full", attention="splash")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))

    def loss(params, latents, time, label):
        return jnp.sum(MMDiT(config).apply({"params": params}, latents, time, label))

    shapes = ((8, 16, 16, 4), jnp.float32), ((8,), jnp.float32), ((8,), jnp.int32)
    given = [jax.ShapeDtypeStruct(*shape, sharding=batch_sharding(mesh)) for shape in shapes]
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(params, *given).lower(lowering_platforms=("tpu",)).as_text()
    # The scanned blocks and the pre-only one, whose kernels have fewer queries.
    assert text.count("custom_call @tpu_custom_call") == 2 * 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
def test_splash_compiles_for_a_tpu_at_the_papers_head_size_and_saves_the_logits():
    """In a process of its own, as libtpu reads its environment once."""
    quiet = dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost")
    environment = os.environ | quiet | dict(TPU_WORKER_ID="0", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    program = """
import functools, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from lpl_jax.denoisers import attention

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
array = jax.ShapeDtypeStruct((4, 1025, 16, 72), jnp.bfloat16, sharding=SingleDeviceSharding(device))
for name in ("xla", "splash"):
    def loss(q, k, v):
        attended = attention(query=q, key=k, value=v, implementation=name)
        return jnp.sum(jnp.square(attended.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array).compile()
    print(name, compiled.memory_analysis().temp_size_in_bytes)
"""
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout
    xla, kernel = (int(line.split()[1]) for line in output.splitlines())
    assert kernel < xla / 6


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 4, 1), marks=pytest.mark.slow)], ids=str)
def test_kernels_on_a_mesh_equal_one_device(sizes):
    """Also where the images do not divide: each device then computes all."""
    function = functools.partial(cudnn, implementation="xla")
    given = inputs(16, 16 + 77, batch=4)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    odd = [x[:3] for x in given]
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(with_gradients, function))
        for values in (given, odd):
            for here, there in zip(run(*values), exact(*values), strict=True):
                np.testing.assert_allclose(here, there, atol=2e-5 * np.abs(there).max())


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "name"),
    [
        ("cpu", 72, "float32", "xla"),
        ("tpu", 72, "bfloat16", "splash"),
        ("tpu", 72, "float32", "splash"),
        ("cuda", 72, "bfloat16", "cudnn"),
        ("cuda", 72, "float32", "xla"),
        ("cuda", 192, "bfloat16", "xla"),
        ("rocm", 64, "bfloat16", "xla"),
    ],
)
def test_auto_takes_the_platforms_own_kernel(platform, head_dim, dtype, name):
    assert choose_attention(platform, head_dim, dtype) == name
    check_attention(name, platform, head_dim, dtype)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("splash", "cpu", 64, "float32"), "'splash': the splash kernel is for TPUs, and this runs on cpu.*auto, xla"),
        (("cudnn", "tpu", 64, "bfloat16"), "cuDNN is for NVIDIA GPUs.*possible here: auto, xla, splash"),
        (("cudnn", "cuda", 64, "float32"), "takes bfloat16, and model.dtype is float32"),
        (("cudnn", "cuda", 136, "bfloat16"), "head sizes up to 128, and hidden / heads is 136"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(given, message):
    with pytest.raises(InputError, match=message):
        check_attention(*given)


def test_the_papers_head_size_is_on_the_fast_path():
    """72 = 1152 / 16."""
    config = preset("paper796")
    assert config.head_dim == 72
    assert (choose_attention("cuda", 72, "bfloat16"), choose_attention("tpu", 72, "bfloat16")) == ("cudnn", "splash")
