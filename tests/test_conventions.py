"""Conventions of the package that no linter knows."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from lpl_jax.denoisers.embeddings import patchify
from lpl_jax.diffusion import paradigm
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, active_samples


def test_shapes_are_checked_while_tests_run():
    """Calls that would work, but with arrays that are not those of the signature."""
    with pytest.raises(TypeCheckError, match="patchify"):
        patchify(jnp.zeros((1, 4, 4, 4), int), 2)
    with pytest.raises(TypeCheckError, match="active_samples"):
        active_samples(LPLConfig.paper(), alpha=jnp.ones(3), sigma=jnp.ones(1), resolution=512)


def test_a_refusal_in_words_comes_before_the_check_of_shapes():
    with pytest.raises(InputError, match="z0 and noise must have the same shape"):
        paradigm("flow").add_noise(z0=jnp.zeros((1, 2)), noise=jnp.zeros((1, 3)), t=jnp.zeros(1))


def test_numpy_arrays_will_do():
    assert patchify(np.zeros((1, 4, 4, 4), np.float32), 2).shape == (1, 4, 16)
