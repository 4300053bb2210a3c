"""Images from a trained denoiser: sampler, guidance, decoder."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.denoisers import MMDiT, MMDiTConfig
from lpl_jax.diffusion import Paradigm, guided, sample
from lpl_jax.errors import InputError

ROUNDING = "clip to [-1, 1], (x + 1) * 127.5, nearest, halves to even"
STATIC = ("model", "paradigm", "side", "resolution", "sampler", "steps", "spacing", "guidance")


@functools.partial(jax.jit, static_argnames=STATIC)
def sample_latents(
    params,
    key: jax.Array,
    rows: jax.Array,
    labels: jax.Array,
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
    """Scaled latents (B, side, side, C) for labels (B,); noise is drawn with `key` and the number of the row alone.

    A model that is conditioned on size and crop is told of an image that was `resolution` pixels large and not cropped.
    """
    shape = (side, side, model.latent_channels)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), shape))(rows)
    noise = parallel.constrain_batch(noise)

    def denoise(z, t, context):
        control = jnp.tile(jnp.array([resolution, resolution, 0.0, 0.0]), (len(z), 1)) if model.control else None
        return MMDiT(model).apply({"params": params}, z, paradigm.time_input(t), context, control=control)

    null = jnp.full_like(labels, model.num_classes)
    step = guided(denoise, guidance, context=labels, null_context=null)
    return sample(step, noise, paradigm, sampler=sampler, steps=steps, spacing=spacing)


@jax.jit
def decode_to_uint8(autoencoder: Autoencoder, latents: jax.Array) -> jax.Array:
    """Scaled latents -> uint8 images (B, H, W, 3)."""
    return to_uint8(autoencoder.decode(latents))


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> uint8, by the rule `ROUNDING`."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def image_maker(
    params,
    autoencoder: Autoencoder,
    *,
    seed: int,
    model: MMDiTConfig,
    paradigm: Paradigm,
    resolution: int,
    sampler: str | None = None,
    mesh: Mesh | None = None,
    **options,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """function(rows (B,), labels (B,)) -> uint8 images (B, resolution, resolution, 3) on the host.

    The image of a row depends on (seed, row, label) and the sampler only: not on the batch it is in, nor on the
    devices (but for the rounding of float32, which other batch shapes may order differently).

    Args:
      params: of the denoiser (the raw ones or an average).
      sampler: None is the paradigm's first one.
      mesh: the devices over which a batch is split (B must be a multiple of its parts); None is one device.
      options: steps, guidance, spacing, see `sample_latents`.
    """
    draw = functools.partial(
        sample_latents,
        model=model,
        paradigm=paradigm,
        side=resolution // autoencoder.config.downsample,
        resolution=resolution,
        sampler=sampler or paradigm.samplers[0],
        **options,
    )
    key = jax.random.key(seed)
    if mesh is None:
        return lambda rows, labels: np.asarray(decode_to_uint8(autoencoder, draw(params, key, rows, labels)))
    key, autoencoder = parallel.put_replicated((key, autoencoder), mesh)
    decode = jax.jit(decode_to_uint8, out_shardings=parallel.replicated(mesh))

    def make(rows, labels):
        with jax.set_mesh(mesh):
            rows, labels = parallel.put_global((rows, labels), mesh)
            return np.asarray(decode(autoencoder, draw(params, key, rows, labels)))

    return make


def generate(params, autoencoder: Autoencoder, labels: Sequence[int], *, batch_size: int = 64, **options) -> np.ndarray:
    """Images uint8 (N, resolution, resolution, 3), one for each label; image i is row i of `image_maker`.

    Args:
      options: of `image_maker`; `seed`, `model`, `paradigm` and `resolution` are needed.
    Raises:
      InputError: a label that the model does not have, or sampler options that cannot be.
    """
    labels, classes = np.asarray(labels, np.int32), options["model"].num_classes
    if labels.size == 0 or labels.min() < 0 or labels.max() > classes:
        raise InputError(f"labels must be 0 to {classes - 1}, or {classes} for no class")
    make = image_maker(params, autoencoder, **options)
    return in_batches(lambda rows: make(rows, labels[rows]), 0, len(labels), min(batch_size, len(labels)))


def in_batches(images: Callable[[np.ndarray], np.ndarray], start: int, stop: int, batch_size: int) -> np.ndarray:
    """images(rows) for rows start..stop-1, in batches of one size: the last one is filled up and cut again."""
    found = []
    for first in range(start, stop, batch_size):
        rows = np.arange(first, first + batch_size, dtype=np.int32).clip(max=stop - 1)
        found.append(images(rows)[: stop - first])
    return np.concatenate(found)
