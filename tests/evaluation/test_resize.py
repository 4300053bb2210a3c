"""TensorFlow 1's bilinear resize: against its definition, and against torch-fidelity's where that is installed."""

import jax
import numpy as np
import pytest

from lpl_jax.evaluation.resize import tf1_bilinear

SIZES = [
    ((512, 512), (299, 299)),
    ((64, 64), (299, 299)),
    ((299, 300), (299, 299)),
    ((50, 70), (299, 299)),
    ((1, 5), (3, 2)),
    ((301, 17), (7, 40)),
]
resize = jax.jit(tf1_bilinear, static_argnums=(1, 2))


def random_images(sides):
    return np.random.default_rng(0).integers(0, 256, (2, *sides, 3)).astype(np.float32)


def matrix(old, new):
    """(new, old) weights in float64, at positions in float32 as TensorFlow computes them."""
    positions = np.float32(old / new) * np.arange(new, dtype=np.float32)
    weights = np.zeros((new, old))
    for row, position in enumerate(positions):
        lower = int(np.floor(position))
        weights[row, lower] += 1 - (position - lower)
        weights[row, min(lower + 1, old - 1)] += position - lower
    return weights


@pytest.fixture(scope="module")
def their_resize(torch_fidelity):
    return torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_definition(old, new):
    images = random_images(old)
    expected = np.einsum("yh,xw,bhwc->byxc", matrix(old[0], new[0]), matrix(old[1], new[1]), images, optimize=True)
    # two interpolations of values up to 255, each with three roundings of relative size 2^-24
    np.testing.assert_allclose(resize(images, *new), expected, rtol=0, atol=6 * 255 * 2**-24)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_torch_fidelity(their_resize, old, new):
    torch = pytest.importorskip("torch")
    images = random_images(old)
    expected = their_resize(torch.from_numpy(images).permute(0, 3, 1, 2), size=new, align_corners=False)
    # the same operations in the same order; a compiler may fuse a product and a sum, which leaves out a rounding each
    np.testing.assert_allclose(resize(images, *new), expected.permute(0, 2, 3, 1), rtol=0, atol=4 * 255 * 2**-24)


def test_not_aligned_by_half_a_pixel():
    """With half pixels, two pixels 0 and 4 would become 0, 1, 3, 4."""
    line = np.array([0.0, 4.0], np.float32).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(tf1_bilinear(line, 1, 4).ravel(), [0, 2, 4, 4])


def test_no_antialiasing_and_same_size():
    line = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1) ** 2
    np.testing.assert_array_equal(tf1_bilinear(line, 2, 1).ravel(), [0, 16])
    np.testing.assert_array_equal(tf1_bilinear(line, 8, 1), line)
