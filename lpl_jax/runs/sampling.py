"""Images from a trained denoiser: sampler, guidance, decoder.

What an image shows, its condition, is a label, or the token ids of a prompt with the run's `TextConditioner`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.denoisers import MMDiT, MMDiTConfig
from lpl_jax.diffusion import Paradigm, guided, sample
from lpl_jax.experiment import Experiment, SamplingConfig
from lpl_jax.text import Condition, TextConditioner

ROUNDING = "clip to [-1, 1], (x + 1) * 127.5, nearest, halves to even"
STATIC = ("model", "paradigm", "side", "resolution", "sampler", "steps", "spacing", "guidance")

# (rows (B,), condition (B, ...)) -> uint8 images (B, H, W, 3) on the host.
DrawImages = Callable[[np.ndarray, np.ndarray], np.ndarray]


@functools.partial(jax.jit, static_argnames=STATIC)
def sample_latents(
    params,
    key: jax.Array,
    rows: jax.Array,
    condition: jax.Array,
    text: TextConditioner | None = None,
    *,
    model: MMDiTConfig,
    paradigm: Paradigm,
    side: int,
    resolution: int,
    sampler: str,
    steps: int,
    spacing: str = "trailing",
    guidance: float = 1.0,
) -> jax.Array:
    """Scaled latents (B, side, side, C) under a condition; noise is drawn with `key` and the number of the row alone.

    condition: labels (B,), or with `text` tokens (B, T).

    A model that is conditioned on size and crop is told of an image that was `resolution` pixels large and not cropped.
    """
    shape = (side, side, model.latent_channels)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), shape))(rows)
    noise = parallel.constrain_batch(noise)

    def denoise(z, t, condition) -> Any:
        control = jnp.tile(jnp.array([resolution, resolution, 0.0, 0.0]), (len(z), 1)) if model.control else None
        return MMDiT(model).apply({"params": params}, z, paradigm.time_input(t), *condition, control)

    if text is None:
        context, null = Condition(condition), Condition(jnp.full_like(condition, model.num_classes))
    else:
        context, null = text({"tokens": condition}), text.no_prompt(len(condition))
    step = guided(denoise, guidance, context=context, null_context=parallel.constrain_batch(null))
    return sample(step, noise, paradigm, sampler=sampler, steps=steps, spacing=spacing)


@jax.jit
def decode_to_uint8(autoencoder: Autoencoder, latents: jax.Array) -> jax.Array:
    """Scaled latents -> uint8 images (B, H, W, 3)."""
    return to_uint8(autoencoder.decode(latents))


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> uint8, by the rule `ROUNDING`."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def image_sampler(
    experiment: Experiment,
    params,
    autoencoder: Autoencoder,
    text: TextConditioner | None = None,
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> DrawImages:
    """function(rows (B,), condition) -> uint8 images (B, H, W, 3) on the host; condition as in `sample_latents`.

    The image of a row depends on (seed, row, condition) and the sampler only: not on the batch it is in, nor on the
    devices (but for the rounding of float32, which other batch shapes may order differently).

    Args:
      experiment: gives model, paradigm and resolution.
      params: of the denoiser (the raw ones or an average).
      text: the tower of a run on text; conditions are then tokens (B, T).
      sampling: None is the experiment's.
      mesh: the devices over which a batch is split (B must be a multiple of its parts); None is one device.
    """
    sampling, paradigm = sampling or experiment.sampling, experiment.paradigm
    sampling.check_for(paradigm)
    draw = functools.partial(
        sample_latents,
        model=experiment.model,
        paradigm=paradigm,
        side=experiment.resolution // autoencoder.config.downsample,
        resolution=experiment.resolution,
        sampler=sampling.sampler or paradigm.samplers[0],
        steps=sampling.steps,
        spacing=sampling.spacing,
        guidance=sampling.guidance_at(experiment.resolution),
    )
    key = jax.random.key(seed)
    if mesh is None:
        return lambda rows, condition: np.asarray(
            decode_to_uint8(autoencoder, draw(params, key, rows, condition, text))
        )
    key, autoencoder, text = parallel.put_replicated((key, autoencoder, text), mesh)
    decode = jax.jit(decode_to_uint8, out_shardings=parallel.replicated(mesh))

    def images(rows, condition):
        with jax.set_mesh(mesh):
            rows, condition = parallel.put_global((rows, condition), mesh)
            return np.asarray(decode(autoencoder, draw(params, key, rows, condition, text)))

    return images


def in_batches(images: Callable[[np.ndarray], np.ndarray], start: int, stop: int, batch_size: int) -> np.ndarray:
    """images(rows) for rows start..stop-1, in batches of one size: the last one is filled up and cut again."""
    found = []
    for first in range(start, stop, batch_size):
        rows = np.arange(first, first + batch_size, dtype=np.int32).clip(max=stop - 1)
        found.append(images(rows)[: stop - first])
    return np.concatenate(found)
