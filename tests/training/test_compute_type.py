"""The start of a run: its decoder computes what float32 computes."""

import jax
import numpy as np
import pytest

from lpl_jax import autoencoders
from lpl_jax.data import LatentStore
from lpl_jax.errors import InputError
from lpl_jax.training.compute_type import check_compute_type


@pytest.fixture(scope="module")
def store(stores):
    return LatentStore(stores[32])


@pytest.fixture(scope="module")
def half(tiny_folder):
    return autoencoders.load(tiny_folder, dtype="bfloat16")


def edited(autoencoder, place, edit):
    """The autoencoder with one array of its decoder replaced, by the end of its path."""

    def one(path, leaf):
        return edit(leaf) if jax.tree_util.keystr(path, simple=True, separator="/").endswith(place) else leaf

    return autoencoder.replace(params=jax.tree_util.tree_map_with_path(one, autoencoder.params))


def test_half_precision_that_does_its_work_passes(store, half):
    assert check_compute_type(half, store) is None
    assert check_compute_type(half.with_dtype("float32"), store) is None


def test_half_precision_that_loses_the_picture_is_named(store, half):
    """A constant of 1e5 in all pixels: bfloat16 keeps three digits of the sum, so nothing of the picture."""
    lossy = edited(half, "decoder/up_0/upsample/bias", lambda leaf: leaf + 1e5)
    assert "autoencoder.dtype=bfloat16 is" in (said := check_compute_type(lossy, store) or "")
    assert "% off float32 in up_0" in said


def test_an_overflow_is_named_by_its_tap(store, half):
    """Twice 3e38 is above the largest number of both types."""
    broken = edited(half, "decoder/up_0/upsample/kernel", lambda leaf: np.full(leaf.shape, 3e38, np.float32))
    with pytest.raises(InputError, match=r"bfloat16: up_0 of latents .* is not finite \(nor in float32\)"):
        check_compute_type(broken, store)
