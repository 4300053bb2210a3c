"""Softmax attention by name: XLA's own, or an accelerator's kernel that never writes the logits to memory.

    xla      everywhere; logits and softmax float32, materialised by the compiler
    cudnn    NVIDIA GPUs: cuDNN's flash attention; bfloat16, head sizes up to 128, an odd number of tokens padded by one
    splash   TPUs: jax's Pallas kernel; any head size, tokens padded to a multiple of 128 and masked
    auto     in a config only: `choose_attention` names one of them for the backend, when the run is set up

What cannot be is refused by `check_attention` when a config is built. Nothing here falls back from one to another.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpl_jax.errors import InputError
from lpl_jax.parallel import shard_map_heads

CUDNN_HEAD_UNIT, CUDNN_HEAD_MOST = 8, 128  # head sizes that cuDNN takes on every GPU: multiples of, up to
OWN_KERNELS = {"cuda": "cudnn", "tpu": "splash"}
SPLASH_UNIT, SPLASH_BLOCK = 128, 512  # tokens: the kernel's unit, and the largest block that it works on at a time


def attention(
    *,
    query: Float[Array, "b queries heads size"],
    key: Float[Array, "b keys heads size"],
    value: Float[Array, "b keys heads size"],
    implementation: str = "xla",
) -> Float[Array, "b queries heads size"]:
    """softmax(query key^T / sqrt(head size)) value, without a mask.

    query (B, Nq, heads, head size), key and value (B, Nk, heads, head size) -> (B, Nq, heads, head size) in the dtype
    of `query`; the softmax is float32. Raises InputError for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attention {implementation!r} given, possible is one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](query, key, value)


def current_platform() -> str:
    """What this process computes on: cpu | tpu | cuda | rocm, or jax's name of another platform."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def choose_attention(platform: str, head_dim: int, dtype: str) -> str:
    """The implementation for "auto": the platform's own kernel where it takes this head size and dtype, else xla."""
    kernel = OWN_KERNELS.get(platform, "xla")
    return "xla" if refusal(kernel, platform, head_dim, dtype) else kernel


def describe_attention(implementation: str, platform: str, head_dim: int, dtype: str) -> str:
    """What a run says of its attention; where it is not the platform's own kernel, why."""
    kernel = OWN_KERNELS.get(platform, implementation)
    if implementation == kernel:
        return f"{implementation} attention"
    reason = refusal(kernel, platform, head_dim, dtype) or "another was asked for"
    return f"{implementation} attention, not {kernel} ({reason})"


def check_attention(implementation: str, platform: str, head_dim: int, dtype: str) -> None:
    """Raises InputError, with the reason and what is possible, where the platform cannot run the implementation."""
    if reason := refusal(implementation, platform, head_dim, dtype):
        possible = [name for name in IMPLEMENTATIONS if not refusal(name, platform, head_dim, dtype)]
        raise InputError(f"model.attention={implementation!r}: {reason}; possible here: auto, {', '.join(possible)}")


def refusal(implementation: str, platform: str, head_dim: int, dtype: str) -> str | None:
    """Why the platform cannot run the implementation; None where it can."""
    if implementation == "cudnn":
        if platform != "cuda":
            return f"cuDNN is for NVIDIA GPUs, and this runs on {platform}"
        if dtype != "bfloat16":
            return f"cuDNN's attention takes bfloat16, and model.dtype is {dtype}"
        if head_dim > CUDNN_HEAD_MOST:
            return f"cuDNN's attention takes head sizes up to {CUDNN_HEAD_MOST}, and hidden / heads is {head_dim}"
    if implementation == "splash" and platform != "tpu":
        return f"the splash kernel is for TPUs, and this runs on {platform}"
    return None


def _xla(query, key, value):
    # Named, because jax's own default for this argument may change; logits and softmax are float32 in it.
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def cudnn(query, key, value, *, implementation: Literal["cudnn", "xla"] = "cudnn"):
    """`attention` by cuDNN; implementation: "xla" computes the same from what cuDNN would be given, for tests.

    Head sizes between its units are padded with zeros, which add nothing to any product: 72 needs none. Odd numbers of
    tokens, such as an image and its class, are padded by one that its length hides: jax refuses their gradient.
    """

    def local(query, key, value):
        (batch, queries, _, size), keys = query.shape, key.shape[1]
        lengths = {}
        if (queries | keys) % 2:
            counts = (jnp.full(batch, count, jnp.int32) for count in (queries, keys))
            lengths = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), counts, strict=True))
        pads = [((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -size % CUDNN_HEAD_UNIT)) for x in (query, key, value)]
        query, key, value = (jnp.pad(x, pad) for x, pad in zip((query, key, value), pads, strict=True))
        result = jax.nn.dot_product_attention(
            query, key, value, scale=size**-0.5, implementation=implementation, **lengths
        )  # fmt: skip
        return result[:, :queries, :, :size]

    return shard_map_heads(local)(query, key, value)


def splash(query, key, value, *, interpret: bool = False):
    """`attention` by the Pallas kernel for TPUs; interpret: run it on any backend, slowly, for tests.

    The head size is passed as it is: a TPU lays the last axis out in units of 128 whatever its length, and the kernel
    compiled at 72 takes as much memory as at 128. The queries come scaled, as the kernel does not do it.
    """

    def local(query, key, value):
        size, tokens = query.shape[-1], query.shape[1]
        scaled = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
        heads_first = [_padded(x).swapaxes(1, 2) for x in (scaled, key, value)]
        kernel, segments = _splash_kernel(query.shape[2], query.shape[1], key.shape[1], interpret)
        result = jax.vmap(lambda *one: kernel(*one, segment_ids=segments))(*heads_first)
        return result.swapaxes(1, 2)[:, :tokens]

    # The partitioner cannot look into a kernel: it would gather all images on every device.
    return shard_map_heads(local)(query, key, value)


def _padded(tokens):
    """Tokens (B, N, heads, head size) up to the next multiple of the kernel's unit."""
    return jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % SPLASH_UNIT), (0, 0), (0, 0)))


def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool) -> tuple[Any, Any]:
    """The kernel for so many real tokens, and the segments that hide the padding (None where there is none)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # takes a second to import

    padded = queries + -queries % SPLASH_UNIT, keys + -keys % SPLASH_UNIT
    q, kv = (_block(count) for count in padded)
    blocks = kernels.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
    )  # fmt: skip
    mask = kernels.MultiHeadMask([kernels.FullMask(padded)] * heads)
    kernel = kernels.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )  # fmt: skip
    if padded == (queries, keys):
        return kernel, None
    # Real tokens are segment 0 and padding is segment 1; a token attends to its own segment.
    ids = [(jnp.arange(total) >= real).astype(jnp.int32) for total, real in zip(padded, (queries, keys), strict=True)]
    return kernel, kernels.SegmentIds(*ids)


def _block(tokens: int) -> int:
    """The largest block that divides them."""
    return max(size for size in range(SPLASH_UNIT, SPLASH_BLOCK + 1, SPLASH_UNIT) if tokens % size == 0)


IMPLEMENTATIONS = {"xla": _xla, "cudnn": cudnn, "splash": splash}
