"""Image preprocessing against transformers' CLIPImageProcessor."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from lpl_jax.errors import InputError
from lpl_jax.text import preprocess

SIZES = [(300, 401), (401, 300), (224, 224), (225, 224), (37, 50), (17, 90), (333, 1000), (1, 3)]


def photo(height, width, seed=0):
    """Smooth areas, edges and noise, so that the filter's overshoot is clipped somewhere."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)).astype(int)
    return np.clip(image + rng.integers(-30, 30, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [224, 33])
def test_equal_to_transformers(side):
    images = [photo(*size) for size in SIZES]
    theirs = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    reference = theirs([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    ours = preprocess(images, side)
    assert ours.shape == (len(SIZES), side, side, 3) and ours.dtype == np.float32
    # the same 8-bit pixels (one step would be 0.014); three roundings of float32 at values up to 2.6
    assert np.abs(ours - reference.transpose(0, 2, 3, 1)).max() < 2e-6


def test_known_values():
    black, white = preprocess([np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)], 8)
    np.testing.assert_allclose(black[0, 0], [-1.79226, -1.75210, -1.48022], atol=1e-4)
    np.testing.assert_allclose(white[7, 7], [1.93034, 2.07489, 2.14590], atol=1e-4)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(InputError, match=r"\(4, 4, 3\), float32; needed: \(H, W, 3\), uint8"):
        preprocess([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(InputError, match=r"\(4, 4\), uint8"):
        preprocess([np.zeros((4, 4), np.uint8)])
    with pytest.raises(InputError, match="no images"):
        preprocess([])
