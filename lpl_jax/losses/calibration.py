"""The weight of a perceptual loss in the total loss, from the share that it should have in its size or its variance."""

import math

import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from lpl_jax.errors import InputError


def calibrate_weight(*, diffusion_losses: ArrayLike, perceptual_losses: ArrayLike, target_share: float) -> float:
    """The weight w at which w * LPL / (L_diff + w * LPL) of the mean losses is `target_share`.

    The paper's best weight makes the perceptual loss about a fifth of the total (Fig. 9), but its unit depends on the
    reductions and on the autoencoder; a share does not. Measure both losses on some batches of the first checkpoint,
    as the training step returns them (gate and batch mean included), then keep the weight.

    Args:
      diffusion_losses, perceptual_losses: values over batches, any shapes.
      target_share: share of the total, in (0, 1).

    Raises:
      InputError: a share outside (0, 1), no values, values that are not finite, or mean losses that are not positive.
    """
    if not 0 < target_share < 1:
        raise InputError(f"target_share={target_share} is outside (0, 1)")
    diffusion = _positive_mean("diffusion", diffusion_losses)
    perceptual = _positive_mean("perceptual", perceptual_losses)
    return target_share / (1 - target_share) * diffusion / perceptual


def calibrate_weight_by_variance(
    *, diffusion_losses: ArrayLike, perceptual_losses: ArrayLike, share: float = 0.1
) -> float:
    """The weight w at which Var(w * L_perceptual) = share * Var(L_diff) over samples (arXiv 2411.04873, App. A.4).

    How the paper weights the losses that it compares LPL with, whatever their units, beside the diffusion loss.

    Args:
      diffusion_losses, perceptual_losses: unweighted loss of each sample over a calibration set, any shapes; the
        perceptual one of the samples that are active only, where it is gated.
      share: positive.

    Raises:
      InputError: a share that is not positive, fewer than two values, or variances that are not finite and positive.
    """
    if not 0 < share < math.inf:
        raise InputError(f"share={share} is not a positive number")
    diffusion = _positive_variance("diffusion", diffusion_losses)
    perceptual = _positive_variance("perceptual", perceptual_losses)
    return math.sqrt(share * diffusion / perceptual)


def perceptual_share(
    *, diffusion_loss: Float[Array, ""], perceptual_loss: Float[Array, ""], weight: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Share of the weighted perceptual loss in the total: w * LPL / (L_diff + w * LPL)."""
    weighted = weight * perceptual_loss
    return weighted / (diffusion_loss + weighted)


def _positive_mean(name: str, values: ArrayLike) -> float:
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if values.size else math.nan
    if not 0 < mean < math.inf:
        raise InputError(
            f"the mean of {values.size} {name} losses is {mean}: to calibrate the weight it must be finite and "
            "positive (if no sample passed the gate, more loss.calibration_batches help)"
        )
    return mean


def _positive_variance(name: str, values: ArrayLike) -> float:
    values = np.asarray(values, np.float64)
    variance = float(values.var(ddof=1)) if values.size > 1 else math.nan
    if not 0 < variance < math.inf:
        raise InputError(
            f"the variance of {values.size} {name} losses is {variance}: to calibrate the weight it must be finite and "
            "positive (give the losses of single samples, two or more)"
        )
    return variance
