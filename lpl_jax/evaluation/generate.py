"""Images from a trained denoiser: sampler, guidance, decoder.

What an image shows is given as a label, or as the token numbers of a prompt with the run's `TextConditioner`.
"""

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
from lpl_jax.text import Condition, TextConditioner

ROUNDING = "clip to [-1, 1], (x + 1) * 127.5, nearest, halves to even"
STATIC = ("model", "paradigm", "side", "resolution", "sampler", "steps", "spacing", "guidance")


@functools.partial(jax.jit, static_argnames=STATIC)
def sample_latents(
    params,
    key: jax.Array,
    rows: jax.Array,
    given: jax.Array,
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
    """Scaled latents (B, side, side, C) of what is given; noise is drawn with `key` and the number of the row alone.

    given: labels (B,), or with `text` tokens (B, T).

    A model that is conditioned on size and crop is told of an image that was `resolution` pixels large and not cropped.
    """
    shape = (side, side, model.latent_channels)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), shape))(rows)
    noise = parallel.constrain_batch(noise)

    def denoise(z, t, condition):
        control = jnp.tile(jnp.array([resolution, resolution, 0.0, 0.0]), (len(z), 1)) if model.control else None
        return MMDiT(model).apply({"params": params}, z, paradigm.time_input(t), *condition, control)

    if text is None:
        condition, null = Condition(given), Condition(jnp.full_like(given, model.num_classes))
    else:
        condition, null = text({"tokens": given}), text.no_prompt(len(given))
    step = guided(denoise, guidance, context=condition, null_context=parallel.constrain_batch(null))
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
    text: TextConditioner | None = None,
    sampler: str | None = None,
    mesh: Mesh | None = None,
    **options,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """function(rows (B,), given) -> uint8 images (B, resolution, resolution, 3) on the host; given as `sample_latents`.

    The image of a row depends on (seed, row, what is given) and the sampler only: not on the batch it is in, nor on the
    devices (but for the rounding of float32, which other batch shapes may order differently).

    Args:
      params: of the denoiser (the raw ones or an average).
      text: the tower of a run on text; prompts are then given as tokens (B, T).
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
        return lambda rows, given: np.asarray(decode_to_uint8(autoencoder, draw(params, key, rows, given, text)))
    key, autoencoder, text = parallel.put_replicated((key, autoencoder, text), mesh)
    decode = jax.jit(decode_to_uint8, out_shardings=parallel.replicated(mesh))

    def make(rows, given):
        with jax.set_mesh(mesh):
            rows, given = parallel.put_global((rows, given), mesh)
            return np.asarray(decode(autoencoder, draw(params, key, rows, given, text)))

    return make


def generate(
    params, autoencoder: Autoencoder, given: Sequence, *, mesh: Mesh | None = None, batch_size: int = 64, **options
) -> np.ndarray:
    """Images uint8 (N, resolution, resolution, 3), one for each label or prompt; image i is row i of `image_maker`.

    Args:
      given: labels (N,), or with the option `text` tokens (N, T).
      batch_size: images at a time; rounded up to what the mesh can split.
      options: of `image_maker`; `seed`, `model`, `paradigm` and `resolution` are needed.
    Raises:
      InputError: nothing given, a label that the model does not have, or sampler options that cannot be.
    """
    given, classes = np.asarray(given, np.int32), options["model"].num_classes
    if options.get("text") is None and (given.size == 0 or given.min() < 0 or given.max() > classes):
        raise InputError(f"labels must be 0 to {classes - 1}, or {classes} for no class")
    if not given.size:
        raise InputError("nothing to draw: give at least one prompt")
    make, shards = image_maker(params, autoencoder, mesh=mesh, **options), parallel.batch_shards(mesh) if mesh else 1
    batch_size = -(-min(batch_size, len(given)) // shards) * shards
    return in_batches(lambda rows: make(rows, given[rows]), 0, len(given), batch_size)


def in_batches(images: Callable[[np.ndarray], np.ndarray], start: int, stop: int, batch_size: int) -> np.ndarray:
    """images(rows) for rows start..stop-1, in batches of one size: the last one is filled up and cut again."""
    found = []
    for first in range(start, stop, batch_size):
        rows = np.arange(first, first + batch_size, dtype=np.int32).clip(max=stop - 1)
        found.append(images(rows)[: stop - first])
    return np.concatenate(found)
