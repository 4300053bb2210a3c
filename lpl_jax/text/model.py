"""CLIP's text and vision transformers in Flax Linen, and the frozen model that is passed to jitted functions.

Architecture: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), with the
module boundaries of transformers' modeling_clip.py. Arrays are (batch, tokens, width) between the layers.
"""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lpl_jax.errors import InputError
from lpl_jax.text.config import ClipConfig, TextConfig, TowerConfig, VisionConfig

HIGHEST_TOKEN = 2  # eos_token_id of config.json files that were written with a wrong number


class Features(NamedTuple):
    """What a tower returns, all float32.

    Attributes:
      last: (B, T, width): the text tower's final norm is applied, the vision tower has none on all its tokens.
      penultimate: (B, T, width): output of the last layer but one, no norm applied; what SDXL and SD3 condition on.
      pooled: (B, width): the normalised state of the end token (text) or of the class token (vision).
      projected: (B, projection_dim): the pooled state in the space shared by text and images, not normalised; None
        for a tower without projection.
    """

    last: jax.Array
    penultimate: jax.Array
    pooled: jax.Array
    projected: jax.Array | None


def _norm(config: TowerConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, dtype=jnp.float32, name=name)


def _dense(config: TowerConfig, features: int, name: str, **kwargs) -> nn.Dense:
    return nn.Dense(features, dtype=jnp.dtype(config.dtype), name=name, **kwargs)


class Attention(nn.Module):
    """Multi-head self-attention; logits and softmax in float32."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        config = self.config
        head_dim = config.width // config.heads

        def heads(name):
            return _dense(config, config.width, name)(x).reshape(*x.shape[:2], config.heads, head_dim)

        query, key, value = heads("q_proj"), heads("k_proj"), heads("v_proj")
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        if self.causal:
            logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
        attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(value.dtype), value)
        return _dense(config, config.width, "out_proj")(attended.reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers around the activation."""

    config: TowerConfig

    @nn.compact
    def __call__(self, x):
        x = _dense(self.config, self.config.mlp_width, "fc1")(x)
        x = x * nn.sigmoid(1.702 * x) if self.config.activation == "quick_gelu" else nn.gelu(x, approximate=False)
        return _dense(self.config, self.config.width, "fc2")(x)


class Layer(nn.Module):
    """Pre-norm transformer layer; the residual stream stays float32."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.config, self.causal, name="attention")(_norm(self.config, "layer_norm1")(x))
        return x + Mlp(self.config, name="mlp")(_norm(self.config, "layer_norm2")(x))


class TextEmbeddings(nn.Module):
    """Token and position embeddings: (B, T) -> (B, T, width) float32."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens):
        config = self.config
        x = nn.Embed(config.vocab_size, config.width, name="token_embedding")(tokens).astype(jnp.float32)
        return x + nn.Embed(config.positions, config.width, name="position_embedding")(jnp.arange(tokens.shape[1]))


class VisionEmbeddings(nn.Module):
    """Patch, class and position embeddings: (B, H, W, 3) -> (B, 1 + patches, width) float32."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels):
        config = self.config
        patch = (config.patch_size, config.patch_size)
        patches = nn.Conv(
            config.width, patch, patch, "VALID", use_bias=False, dtype=jnp.dtype(config.dtype), name="patch_embedding"
        )(pixels)
        patches = patches.reshape(pixels.shape[0], -1, config.width).astype(jnp.float32)
        first = self.param("class_embedding", nn.initializers.normal(config.width**-0.5), (config.width,))
        first = jnp.broadcast_to(first.astype(jnp.float32), (pixels.shape[0], 1, config.width))
        x = jnp.concatenate([first, patches], axis=1)
        return x + nn.Embed(x.shape[1], config.width, name="position_embedding")(jnp.arange(x.shape[1]))


def _layers(config: TowerConfig, x: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Outputs of the last layer and of the one before it (which are the embeddings if there is one layer only)."""
    penultimate = x
    for index in range(config.layers):
        penultimate, x = x, Layer(config, causal, name=f"layer_{index}")(x)
    return x, penultimate


def _project(config: TowerConfig, pooled: jax.Array) -> jax.Array | None:
    if config.projection_dim is None:
        return None
    return _dense(config, config.projection_dim, "projection", use_bias=False)(pooled).astype(jnp.float32)


class TextTower(nn.Module):
    """Token ids (B, T) int32 -> Features."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens):
        x = TextEmbeddings(self.config, name="embeddings")(tokens)
        x, penultimate = _layers(self.config, x, causal=True)
        x = _norm(self.config, "final_layer_norm")(x)
        eos = self.config.eos_token_id
        end = jnp.argmax(tokens if eos == HIGHEST_TOKEN else tokens == eos, axis=1)  # the first of equal ones
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return Features(x, penultimate, pooled, _project(self.config, pooled))


class VisionTower(nn.Module):
    """Normalised images (B, image_size, image_size, 3) -> Features; token 0 is the class token."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels):
        x = VisionEmbeddings(self.config, name="embeddings")(pixels)
        x = _norm(self.config, "pre_layrnorm")(x)
        x, penultimate = _layers(self.config, x, causal=False)
        pooled = _norm(self.config, "post_layernorm")(x[:, 0])
        return Features(x, penultimate, pooled, _project(self.config, pooled))


class Clip(flax.struct.PyTreeNode):
    """A frozen CLIP model of one tower or both: `params` are leaves, `config` is static.

    Pass it to jitted functions as an argument; captured as a closure its weights would become constants of the program.
    With both towers `params["logit_scale"]` is the logarithm of the factor on cosine similarities.
    """

    params: Any
    config: ClipConfig = flax.struct.field(pytree_node=False)

    @property
    def text_config(self) -> TextConfig:
        """Of the text tower. Raises InputError where there is none."""
        if self.config.text is None:
            raise InputError(f"{self.config.name} has no text tower")
        return self.config.text

    @property
    def vision_config(self) -> VisionConfig:
        """Of the vision tower. Raises InputError where there is none."""
        if self.config.vision is None:
            raise InputError(f"{self.config.name} has no vision tower")
        return self.config.vision

    def encode_text(self, tokens: jax.Array) -> Features:
        """Token ids (B, T), T at most `config.text.positions`, each row with an end token -> Features.

        The mask is causal and nothing else, as in Stable Diffusion: padding after the end token is attended to by
        padding only, and does not change the pooled output.

        Raises:
          InputError: no text tower, or sequences that are too long.
        """
        config = self.text_config
        if tokens.ndim != 2 or tokens.shape[1] > config.positions:
            raise InputError(
                f"tokens of shape {tokens.shape}: {self.config.name} takes (batch, up to {config.positions} tokens)"
            )
        return cast(Features, TextTower(config).apply({"params": self.params["text"]}, tokens))

    def encode_images(self, pixels: jax.Array) -> Features:
        """Images from `preprocess`, (B, image_size, image_size, 3) -> Features.

        Raises:
          InputError: no vision tower, or images of another size.
        """
        config = self.vision_config
        side = config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
            raise InputError(f"images of shape {pixels.shape}: {self.config.name} takes (batch, {side}, {side}, 3)")
        return cast(Features, VisionTower(config).apply({"params": self.params["vision"]}, pixels))


def init(config: ClipConfig, key: jax.Array) -> Clip:
    """A model with random weights."""
    text_key, vision_key = jax.random.split(key)
    params = {}
    if config.text:
        tokens = jnp.zeros((1, config.text.positions), jnp.int32)
        params["text"] = TextTower(config.text).init(text_key, tokens)["params"]
    if config.vision:
        side = config.vision.image_size
        params["vision"] = VisionTower(config.vision).init(vision_key, jnp.zeros((1, side, side, 3)))["params"]
    if config.text and config.vision:
        params["logit_scale"] = jnp.log(1 / 0.07)  # CLIP's initial temperature
    return Clip(params, config)
