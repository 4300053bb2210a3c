"""Images from a trained denoiser: sampler, guidance, decoder."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.denoisers import MMDiT, MMDiTConfig
from lpl_jax.diffusion import Paradigm, guided, sample
from lpl_jax.errors import InputError


@functools.partial(jax.jit, static_argnames=("model", "paradigm", "side", "sampler", "steps", "spacing", "guidance"))
def sample_latents(
    params,
    keys: jax.Array,
    labels: jax.Array,
    *,
    model: MMDiTConfig,
    paradigm: Paradigm,
    side: int,
    sampler: str,
    steps: int,
    spacing: str = "trailing",
    guidance: float = 1.0,
) -> jax.Array:
    """Scaled latents (B, side, side, C) for labels (B,); row i starts from noise drawn with keys[i] alone."""
    shape = (side, side, model.latent_channels)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def denoise(z, t, context):
        return MMDiT(model).apply({"params": params}, z, paradigm.time_input(t), context)

    null = jnp.full_like(labels, model.num_classes)
    step = guided(denoise, guidance, context=labels, null_context=null)
    return sample(step, noise, paradigm, sampler=sampler, steps=steps, spacing=spacing)


@jax.jit
def decode_to_uint8(autoencoder: Autoencoder, latents: jax.Array) -> jax.Array:
    return to_uint8(autoencoder.decode(latents))


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> uint8: clipped, (x + 1) * 127.5, rounded to the nearest (halves to even)."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def generate(
    params,
    autoencoder: Autoencoder,
    labels: Sequence[int],
    *,
    seed: int,
    batch_size: int = 64,
    model: MMDiTConfig,
    paradigm: Paradigm,
    resolution: int,
    sampler: str | None = None,
    **options,
) -> np.ndarray:
    """Images uint8 (N, resolution, resolution, 3), one for each label.

    Image i depends on (seed, i, label) and the sampler only, not on the batch size.

    Args:
      params: of the denoiser (the raw ones or an average).
      sampler: None is the paradigm's first one.
      options: steps, guidance, spacing, see `sample_latents`.
    Raises:
      InputError: a label that the model does not have, or sampler options that cannot be.
    """
    labels = np.asarray(labels, np.int32)
    if labels.size == 0 or labels.min() < 0 or labels.max() > model.num_classes:
        raise InputError(f"labels must be 0 to {model.num_classes - 1}, or {model.num_classes} for no class")
    side = resolution // autoencoder.config.downsample
    draw = functools.partial(
        sample_latents, model=model, paradigm=paradigm, side=side, sampler=sampler or paradigm.samplers[0], **options
    )
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(labels)))
    batch_size, images = min(batch_size, len(labels)), []
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, start + batch_size).clip(max=len(labels) - 1)  # the last batch is filled up
        latents = draw(params, keys[rows], labels[rows])
        images.append(np.asarray(decode_to_uint8(autoencoder, latents)))
    return np.concatenate(images)[: len(labels)]
