"""The joint block of an MMDiT: an image stream and a context stream that meet in the attention.

Parameters are float32. Norms, modulation and residual sums are computed in float32, matrix products in `config.dtype`,
which is also the dtype of both streams between blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Num

from lpl_jax.denoisers.attention import attention
from lpl_jax.denoisers.config import REMAT_POLICIES, MMDiTConfig
from lpl_jax.parallel import constrain_batch, gather_block_params, splits_weights

# Image and context tokens, and what their modulations are made from.
Streams: TypeAlias = tuple[Float[Array, "b n d"], Float[Array, "b t d"]]
Conditioning: TypeAlias = tuple[Float[Array, "b *chunks d"], Float[Array, "b *context_chunks d"]]

EPSILON = 1e-6  # of every norm
xavier_uniform = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


class MLP(nn.Module):
    """Linear, activation, Linear: (..., any) -> (..., out_dim) in `dtype`."""

    mid_dim: int
    out_dim: int
    activation: Callable
    dtype: DTypeLike
    kernel_init: Callable = xavier_uniform

    @nn.compact
    def __call__(self, x: Num[Array, "*batch width"]) -> Float[Array, "*batch {self.out_dim}"]:
        """Float inputs of any width."""
        x = nn.Dense(self.mid_dim, dtype=self.dtype, kernel_init=self.kernel_init, name="fc1")(x)
        return nn.Dense(self.out_dim, dtype=self.dtype, kernel_init=self.kernel_init, name="fc2")(self.activation(x))


class Modulation(nn.Module):
    """Shifts, scales and gates from the conditioning vector: (B, d) -> (B, chunks, d) float32, 0 at initialisation."""

    chunks: int

    @nn.compact
    def __call__(self, conditioning: Float[Array, "b d"]) -> Float32[Array, "b {self.chunks} d"]:
        """A linear map of a vector after its activation."""
        batch, dim = conditioning.shape
        kernel = self.param("kernel", zeros, (dim, self.chunks * dim))
        bias = self.param("bias", zeros, (self.chunks * dim,))
        return (conditioning @ kernel + bias).reshape(batch, self.chunks, dim)


class ModulationTable(nn.Module):
    """A block's own offset to modulation that all blocks share (adaLN-single, PixArt-alpha Sec. 2.3).

    (B, at least `chunks`, d) -> (B, chunks, d) float32.
    """

    chunks: int

    @nn.compact
    def __call__(self, shared: Float[Array, "b chunks d"]) -> Float32[Array, "b {self.chunks} d"]:
        """The first chunks of what is shared, each moved by the block's own row."""
        table = self.param("table", zeros, (self.chunks, shared.shape[-1]))
        return shared[:, : self.chunks] + table


class Projections(nn.Module):
    """The weights of attention: queries, keys and values, RMS-norms of queries and keys, and the way back."""

    config: MMDiTConfig

    def setup(self):
        """Linear maps without the norms where the config has none."""
        cfg = self.config
        # Three matrices instead of one: the columns of each can be split over a mesh head by head.
        self.q, self.k, self.v, self.out = (
            nn.Dense(cfg.hidden, dtype=cfg.dtype, kernel_init=xavier_uniform) for _ in range(4)
        )
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(epsilon=EPSILON, dtype=jnp.float32) for _ in range(2))

    def split(
        self, tokens: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n heads size"], Float[Array, "b n heads size"], Float[Array, "b n heads size"]]:
        """(B, N, d) -> queries, keys, values, each (B, N, heads, head size)."""
        cfg = self.config
        # With many devices the partitioner may otherwise split tokens by feature, having seen how the weights lie.
        tokens = constrain_batch(tokens)
        q, k, v = (
            linear(tokens).reshape(*tokens.shape[:-1], cfg.heads, cfg.head_dim) for linear in (self.q, self.k, self.v)
        )
        if cfg.qk_norm:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        return constrain_batch((q, k, v))

    def join(self, heads: Float[Array, "b n heads size"]) -> Float[Array, "b n d"]:
        """(B, N, heads, head size) -> (B, N, d)."""
        # As above: the gradient of what comes in would else be split as the weights are, by heads that are too few.
        return self.out(constrain_batch(heads.reshape(*heads.shape[:-2], self.config.hidden)))


class JointBlock(nn.Module):
    """One block (Stable Diffusion 3, Sec. 4, Fig. 2b) with options for what the context stream has of its own.

    `pre_only`: the context only feeds the attention and is returned as it came. `dual`: the image tokens also attend
    to themselves alone, with a modulation of its own (Stable Diffusion 3.5 medium).
    """

    config: MMDiTConfig
    pre_only: bool = False
    dual: bool = False

    @nn.compact
    def __call__(self, streams: Streams, conditioning: Conditioning) -> tuple[Streams, None]:
        """The streams after the block, and None, which is what a scan collects of its steps.

        Args:
          streams: image (B, N, d) and context (B, T, d) tokens.
          conditioning: what the modulation of each stream is made from, (B, d), or (B, chunks, d) if it is shared over
            the blocks.
        """
        x, y = streams
        image, context = self._modulations(*conditioning)
        x_out, y_out = self._attend(_modulate(x, image[0:2], x.dtype), _modulate(y, context[0:2], y.dtype))
        second = self._attend_image(_modulate(x, image[6:8], x.dtype)) if self.dual else None
        x = _residual(x, image[2], x_out)
        if self.dual:
            x = _residual(x, image[8], second)
        x_mlp = self._mlp("mlp")
        x = _residual(x, image[5], x_mlp(_modulate(x, image[3:5], x.dtype)))
        if self.pre_only:
            return (x, y), None
        y = _residual(y, context[2], y_out)
        if self.config.context_mlp != "none":
            y_mlp = x_mlp if self.config.context_mlp == "shared" else self._mlp("context_mlp")
            y = _residual(y, context[5], y_mlp(_modulate(y, context[3:5], y.dtype)))
        return (x, y), None

    def _modulations(self, image_conditioning, context_conditioning):
        """For each stream shifts, scales and gates, (chunks, B, 1, d) float32.

        In the order shift, scale, gate of the attention, then of the MLP, then of the second attention of the image
        stream, if there is one.
        """
        kind = Modulation if self.config.modulation == "per_block" else ModulationTable
        image = context = kind(9 if self.dual else 6, name="image_modulation")(image_conditioning)
        if self.config.context_modulation_chunks:
            chunks = 2 if self.pre_only else self.config.context_modulation_chunks
            context = kind(chunks, name="context_modulation")(context_conditioning)
        return tuple(jnp.moveaxis(chunks, 1, 0)[:, :, None] for chunks in (image, context))

    def _attend(self, x, y):
        """Joint attention over the tokens of both streams; the second output is None in a pre-only block."""
        n = x.shape[1]
        own = Projections(self.config, name="attn")
        if self.config.context_attn == "shared":
            other = own
            q, k, v = own.split(jnp.concatenate([x, y], axis=1))
        else:
            other = Projections(self.config, name="context_attn")
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own.split(x), other.split(y), strict=True))
        if self.pre_only:
            heads = attention(query=q[:, :n], key=k, value=v, implementation=self.config.attention)
            return own.join(heads), None
        heads = attention(query=q, key=k, value=v, implementation=self.config.attention)
        return own.join(heads[:, :n]), other.join(heads[:, n:])

    def _attend_image(self, x):
        own = Projections(self.config, name="second_attn")
        q, k, v = own.split(x)
        return own.join(attention(query=q, key=k, value=v, implementation=self.config.attention))

    def _mlp(self, name):
        cfg = self.config
        return MLP(cfg.mlp_ratio * cfg.hidden, cfg.hidden, nn.gelu, cfg.dtype, name=name)  # nn.gelu is the tanh form


class Head(nn.Module):
    """(B, N, d) tokens and (B, d) conditioning -> (B, N, out_dim) float32, 0 at initialisation."""

    out_dim: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], conditioning: Float[Array, "b d"]
    ) -> Float32[Array, "b n {self.out_dim}"]:
        """A norm, modulated, and a linear map."""
        shift_scale = Modulation(2, name="modulation")(conditioning)
        x = _modulate(x, jnp.moveaxis(shift_scale, 1, 0)[:, :, None], jnp.float32)
        # In float32 whatever the compute dtype: an error here is multiplied by sigma / alpha in the estimate of z0.
        return nn.Dense(self.out_dim, dtype=jnp.float32, kernel_init=zeros, name="out")(x)


def apply_blocks(
    config: MMDiTConfig, streams: Streams, conditioning: Conditioning, count: int | None = None
) -> Streams:
    """The first `count` blocks in turn (None: all).

    To be called inside a compact module, which gets the submodules `blocks` and `last_block`. Equal blocks are one
    scanned module, whose parameters have their number as the first axis. Blocks with a second attention (`dual_blocks`)
    and the pre-only block have other parameters and are scanned before, or come after.
    """
    count = config.depth if count is None else count
    for name, places in config.stacks.items():
        length = min(count - places.start, len(places))
        if length <= 0:
            break
        scan = nn.scan(
            # Inside a scan nothing can undo the recomputation, so XLA needs no barrier against that.
            _rematerialized(config, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # flax infers int from the default
            length=length,
        )
        if length < len(places):
            scan = nn.map_variables(scan, "params", partial(jax.tree.map, lambda stack, n=length: stack[:n]))
        streams, _ = scan(config, dual=name == "dual_blocks", name=name)(streams, conditioning)
    if config.context_pre_only and count == config.depth:
        last = _rematerialized(config, prevent_cse=True)
        dual = config.dual_attention == config.depth
        streams, _ = last(config, pre_only=True, dual=dual, name="last_block")(streams, conditioning)
    return streams


def _rematerialized(config: MMDiTConfig, prevent_cse: bool):
    if config.remat == "none":
        return JointBlock
    # Gathered weights are computed again, too. Without remat every layer's would be kept for the backward pass.
    block = nn.map_variables(JointBlock, "params", gather_block_params, init=True) if splits_weights() else JointBlock
    return nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=prevent_cse)


def _modulate(x, shift_scale, dtype):
    """LayerNorm without parameters, then scale and shift: float32 inside, `dtype` out."""
    shift, scale = shift_scale
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON)
    return (x * (1 + scale) + shift).astype(dtype)


def _residual(x, gate, update):
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
