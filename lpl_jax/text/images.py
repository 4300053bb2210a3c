"""From 8-bit images to what CLIP's vision tower takes."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from lpl_jax.errors import InputError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(images: Iterable[np.ndarray], size: int = 224) -> np.ndarray:
    """Resize the shorter side to `size` (bicubic, antialiased, rounded to 8 bits), cut the centre, normalise.

    These are the steps of Radford et al. (2021) and of transformers' CLIPImageProcessor with its PIL backend.

    Args:
      images: uint8 arrays (H, W, 3), which may differ in size; an array (B, H, W, 3) is one way to give them.
      size: `config.vision.image_size`.

    Returns:
      (B, size, size, 3) float32.

    Raises:
      InputError: no images, or other types or shapes.
    """
    cut = [_cut(np.asarray(image), size) for image in images]
    if not cut:
        raise InputError("preprocess: no images were given")
    return (np.stack(cut).astype(np.float32) / 255 - MEAN) / STD


def _cut(image: np.ndarray, size: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise InputError(f"preprocess: an image of shape {image.shape}, {image.dtype}; needed: (H, W, 3), uint8")
    height, width = image.shape[:2]
    shorter = min(height, width)
    height, width = (int(size * side / shorter) for side in (height, width))  # rounded down, as theirs
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
