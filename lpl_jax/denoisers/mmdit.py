"""The multimodal diffusion transformer (Esser et al. 2024) on latents, conditioned on a class or on text."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Num, PRNGKeyArray

from lpl_jax.denoisers.blocks import MLP, Head, Modulation, apply_blocks, xavier_uniform
from lpl_jax.denoisers.config import MMDiTConfig
from lpl_jax.denoisers.embeddings import patchify, position_embedding, sinusoidal_embedding, unpatchify
from lpl_jax.errors import InputError

SINUSOID_DIM = 256  # width of the input of the time and control MLPs
normal = nn.initializers.normal(0.02)


class PositionTable(nn.Module):
    """Positions of the largest grid, of which a smaller one takes the centre: (rows*columns, hidden) float32.

    Part of the parameters, as in the files of Stable Diffusion 3, but never trained: no gradient reaches it.
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(self, rows: int, columns: int) -> Float32[Array, "{rows}*{columns} hidden"]:
        """The centre of the table, row by row; both sides are at most those of the table."""
        cfg = self.config
        side = cfg.position_table

        def computed(key, shape):
            return position_embedding(side, side, cfg.hidden, cfg.base_grid).reshape(shape)

        table = jax.lax.stop_gradient(self.param("bias", computed, (side, side, cfg.hidden)))
        top, left = (side - rows) // 2, (side - columns) // 2
        return table[top : top + rows, left : left + columns].reshape(rows * columns, cfg.hidden)


class MMDiT(nn.Module):
    """Predicts noise, v or velocity: which of them is a matter of training. Its output is exactly 0 at initialisation.

    Parameter shapes do not depend on the size of the latents: one tree of parameters serves every resolution (up to the
    size of the position table, if the config has one).
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        time: Num[Array, "b"],
        context: Int[Array, "b"] | Float[Array, "b tokens width"],
        pooled: Float[Array, "b pooled"] | None = None,
        control: Num[Array, "b 4"] | None = None,
        *,
        stop_after: int | None = None,
    ) -> Float32[Array, "b h w c"] | Float32[Array, "b patches hidden"]:
        """Predict, from `z_t`, what the model was trained for.

        latents: (B, h, w, C), scaled. time: (B,) on the scale 0 to 1000. context: integer labels (B,) in
        0..num_classes, where num_classes means "no class" (a label above it gives NaN), or text tokens
        (B, T, context_dim). pooled: (B, pooled_dim), if the config has it. control: (B, 4), if the config has it:
        height and width of the original image, top and left of the crop, in pixels. Returns (B, h, w, C) float32.

        stop_after: return the tokens of the image stream after that many blocks instead, (B, N, hidden) float32 with
        N patches row by row, and compute nothing after them; with all `depth` blocks, what the head is given. The
        parameters are those of the full network.

        Raises InputError for a shape or dtype that does not fit the config, or a block that there is not.
        """
        cfg = self.config
        _check(cfg, latents, time, context, pooled, control)
        if stop_after is not None:
            _check_block(cfg, stop_after, self.is_initializing())
        rows, columns = cfg.grid(*latents.shape[1:3])

        # Patches in float32: a few inputs per token cost nothing and z_t is not rounded.
        x = patchify(latents.astype(jnp.float32), cfg.patch_size)
        x = nn.Dense(cfg.hidden, dtype=jnp.float32, kernel_init=xavier_uniform, name="patch_embed")(x)
        if cfg.position_table:
            positions = PositionTable(cfg, name="position_table")(rows, columns)
        else:
            positions = position_embedding(rows, columns, cfg.hidden, cfg.base_grid)
        x = (x + positions).astype(cfg.dtype)
        y = self._context_tokens(context)
        c = nn.silu(self._conditioning_vector(time, pooled, control))

        conditioning = self._block_conditioning(c)
        if stop_after is not None:
            x, _ = apply_blocks(cfg, (x, y), conditioning, stop_after)
            return x.astype(jnp.float32)
        x, _ = apply_blocks(cfg, (x, y), conditioning)
        x = Head(cfg.patch_size**2 * cfg.latent_channels, name="head")(x, c)
        return unpatchify(x, rows, columns, cfg.patch_size)

    def _context_tokens(self, context):
        """(B, T, d) in the compute dtype; T = 1 for class labels."""
        cfg = self.config
        if cfg.num_classes:
            table = nn.Embed(cfg.num_classes + 1, cfg.hidden, embedding_init=normal, name="label_embed")
            return table(context)[:, None].astype(cfg.dtype)
        return nn.Dense(cfg.hidden, dtype=cfg.dtype, kernel_init=xavier_uniform, name="context_embed")(context)

    def _conditioning_vector(self, time, pooled, control):
        """(B, d) float32: the sum of the embeddings of all that is known beside the context tokens."""
        cfg = self.config

        def embed(name, values):
            return MLP(cfg.hidden, cfg.hidden, nn.silu, jnp.float32, normal, name=name)(values)

        c = embed("time_mlp", sinusoidal_embedding(time, SINUSOID_DIM))
        if cfg.pooled_dim:
            c = c + embed("pooled_mlp", pooled.astype(jnp.float32))
        if cfg.control:
            pairs = sinusoidal_embedding(control.reshape(-1, 2, 2), SINUSOID_DIM // 2).reshape(-1, 2, SINUSOID_DIM)
            c = c + embed("size_mlp", pairs[:, 0]) + embed("crop_mlp", pairs[:, 1])
        return c

    def _block_conditioning(self, c):
        """What the blocks make the modulation of the image and of the context stream from."""
        cfg = self.config
        if cfg.modulation == "per_block":
            return c, c
        image = context = Modulation(6, name="image_modulation")(c)
        if cfg.context_modulation_chunks:
            context = Modulation(cfg.context_modulation_chunks, name="context_modulation")(c)
        return image, context


@functools.partial(jax.jit, static_argnums=0, inline=True)  # so that the network is traced once for all its uses
def init(config: MMDiTConfig, key: PRNGKeyArray) -> dict:
    """Fresh float32 parameters, as DiT initialises them. Pure: may be jitted, sharded, or given to `jax.eval_shape`."""
    p = config.patch_size
    latents = jnp.zeros((1, p, p, config.latent_channels))
    context = jnp.zeros((1,), jnp.int32) if config.num_classes else jnp.zeros((1, 1, config.context_dim))
    pooled = jnp.zeros((1, config.pooled_dim)) if config.pooled_dim else None
    control = jnp.zeros((1, 4)) if config.control else None
    variables: Any = MMDiT(config).init(key, latents, jnp.zeros((1,)), context, pooled, control)
    return variables["params"]


def _check(cfg, latents, time, context, pooled, control):
    """Raises InputError if an input does not fit the config or the other inputs."""
    if latents.ndim != 4 or latents.shape[-1] != cfg.latent_channels:
        raise InputError(f"latents of shape {latents.shape} given, possible is (B, h, w, {cfg.latent_channels})")
    batch = latents.shape[0]
    if time.shape != (batch,):
        raise InputError(f"time of shape {time.shape} given, possible is {(batch,)}")
    if cfg.num_classes:
        if context.shape != (batch,) or not jnp.issubdtype(context.dtype, jnp.integer):
            raise InputError(
                f"context of shape {context.shape} and dtype {context.dtype} given, possible are integer class labels "
                f"of shape {(batch,)} in 0..{cfg.num_classes}, since the model has num_classes = {cfg.num_classes}"
            )
    elif (
        context.ndim != 3
        or (context.shape[0], context.shape[2]) != (batch, cfg.context_dim)
        or not jnp.issubdtype(context.dtype, jnp.floating)
    ):
        raise InputError(
            f"context of shape {context.shape} and dtype {context.dtype} given, possible are float text tokens "
            f"of shape ({batch}, T, {cfg.context_dim}), since the model has context_dim = {cfg.context_dim}"
        )
    _check_optional("pooled", pooled, (batch, cfg.pooled_dim) if cfg.pooled_dim else None)
    _check_optional("control", control, (batch, 4) if cfg.control else None)


def _check_block(cfg, stop_after, initializing):
    if type(stop_after) is not int or not 1 <= stop_after <= cfg.depth:
        raise InputError(f"stop_after = {stop_after!r} given, possible is a block from 1 to depth = {cfg.depth}")
    if initializing:
        raise InputError(f"stop_after = {stop_after} given at initialisation, which needs all of the network")


def _check_optional(name, value, shape):
    given = None if value is None else value.shape
    if given != shape:
        raise InputError(f"{name} of shape {given} given, possible with this model is {shape}")
