"""The weight that gives the perceptual loss its share of the total."""

import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.losses import calibrate_weight, perceptual_share


def test_weight_gives_the_share():
    rng = np.random.default_rng(0)
    diffusion, perceptual = rng.uniform(0.1, 0.2, 50), rng.uniform(0.0, 2.0, 50)
    weight = calibrate_weight(diffusion_losses=diffusion, perceptual_losses=perceptual, target_share=0.2)
    assert isinstance(weight, float)
    np.testing.assert_allclose(weight, 0.25 * diffusion.mean() / perceptual.mean(), rtol=1e-12)
    means = dict(diffusion_loss=jnp.asarray(diffusion.mean()), perceptual_loss=jnp.asarray(perceptual.mean()))
    np.testing.assert_allclose(perceptual_share(**means, weight=jnp.asarray(weight)), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("diffusion", "perceptual", "share", "message"),
    [
        ([0.1], [0.1], 0.0, "target_share=0.0"),
        ([0.1], [0.1], 1.0, "target_share=1.0"),
        ([0.1], [0.0, 0.0], 0.2, "2 perceptual losses is 0.0.*more loss.calibration_batches"),
        ([0.1], [0.1, np.nan], 0.2, "perceptual losses is nan"),
        ([], [0.1], 0.2, "0 diffusion losses"),
    ],
)
def test_refusals(diffusion, perceptual, share, message):
    with pytest.raises(InputError, match=message):
        calibrate_weight(diffusion_losses=diffusion, perceptual_losses=perceptual, target_share=share)
