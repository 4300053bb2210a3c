"""The decoder's compute type, tried on real latents before a run begins.

Half precision that overflows, or that loses what tells two images apart, would train on noise without a word.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import LatentStore
from lpl_jax.errors import InputError

IMAGES = 4  # of the store, evenly spaced
# What a compute type may be off by, as a share of a map's variation. bfloat16 is off by 0.4 to 0.8 % in the bundled
# decoder, and by 0.6 to 1.5 % in one of Stable Diffusion's size with random weights.
MOST = 0.1


def check_compute_type(autoencoder: Autoencoder, store: LatentStore) -> str | None:
    """Decodes some latents of the store in the autoencoder's type and in float32, and compares all taps and the image.

    Returns:
      None where they agree, or float32 is the type; else a line that names the tap that is off most.

    Raises:
      InputError: a tap, or the image, is not finite; it names the first one, and says whether it is so in float32.
    """
    dtype = autoencoder.config.dtype
    if dtype == "float32":
        return None
    latents = jnp.asarray(_latents(store), jnp.float32)
    names = [*autoencoder.config.tap_names, "the image"]
    found, exact = (jax.device_get(_maps(each, latents)) for each in (autoencoder, autoencoder.with_dtype("float32")))
    for name, ours, theirs in zip(names, found, exact, strict=True):
        if not np.isfinite(ours).all():
            kind = f"in float32 up to {np.abs(theirs).max():.3g}" if np.isfinite(theirs).all() else "nor in float32"
            raise InputError(
                f"autoencoder.dtype={dtype}: {name} of latents of {store.path} is not finite ({kind}): "
                "give --config.autoencoder.dtype=float32, or other weights"
            )
    off = [_distance(ours, theirs) for ours, theirs in zip(found, exact, strict=True)]
    if max(off) <= MOST:
        return None
    worst = int(np.argmax(off))
    return (
        f"autoencoder.dtype={dtype} is {100 * off[worst]:.0f} % off float32 in {names[worst]}: "
        "--config.autoencoder.dtype=float32 is exact"
    )


def _latents(store: LatentStore) -> np.ndarray:
    rows = np.unique(np.linspace(0, len(store) - 1, IMAGES).astype(int))
    return np.stack([store[int(row)].mean[0] for row in rows])


@jax.jit
def _maps(autoencoder: Autoencoder, raw: jax.Array) -> tuple[jax.Array, ...]:
    latents = autoencoder.scale(raw)
    maps = *autoencoder.features(latents), autoencoder.decode(latents)
    return tuple(each.astype(jnp.float32) for each in maps)


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root mean square of the difference, over that of the variation in space, which is what LPL compares."""
    variation = theirs - theirs.mean((1, 2), keepdims=True)
    return float(np.sqrt(np.square(ours - theirs).mean() / max(np.square(variation).mean(), 1e-30)))
