import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.denoisers import init


@pytest.fixture(scope="session")
def random_params():
    """Maker of parameters that are all away from their initial zeros and ones, so that everything has an effect."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            noise = rng.standard_normal(leaf.shape)
            name = path[-1].key
            # Products with a kernel keep the size of their input.
            value = noise / np.sqrt(leaf.shape[-2]) if name == "kernel" else 0.1 * noise + (name == "scale")
            return jnp.asarray(value, jnp.float32)

        return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init(config, jax.random.key(0))))

    return make


@pytest.fixture(scope="session")
def example():
    """Maker of random inputs that fit a config, in the order in which MMDiT takes them."""

    def make(config, batch=2, height=8, width=8, seed=1):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        time = jnp.asarray(rng.uniform(0, 1000, batch), jnp.float32)
        context = jnp.arange(batch) % config.num_classes if config.num_classes else normal(batch, 5, config.context_dim)
        pooled = normal(batch, config.pooled_dim) if config.pooled_dim else None
        control = jnp.asarray(rng.uniform(0, 800, (batch, 4)), jnp.float32) if config.control else None
        return normal(batch, height, width, config.latent_channels), time, context, pooled, control

    return make
