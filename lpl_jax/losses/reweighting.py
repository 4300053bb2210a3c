"""The baseline that only weights (arXiv 2411.04873, Eq. 15): the diffusion loss, heavier where LPL would be active.

It answers whether the perceptual loss helps by what it measures, or only by putting more weight on low noise:

    weight = 1 + w * Var(L_LPL) / Var(L_2) * delta

with delta = 1 where the noise level passes LPL's gate, and w the weight LPL would have. The variances are those of the
unweighted losses over samples, averaged over the steps so far.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from lpl_jax.errors import InputError


class LossVariances(NamedTuple):
    """Running means of the variance over samples of both losses, float32 scalars, and how many batches they are of."""

    diffusion: Float32[Array, ""]
    perceptual: Float32[Array, ""]
    batches: Float32[Array, ""]


def init_variances() -> LossVariances:
    """The state before the first batch."""
    return LossVariances(*(jnp.zeros((), jnp.float32) for _ in LossVariances._fields))


def update_variances(
    state: LossVariances,
    *,
    diffusion_losses: Float[Array, "b"],
    perceptual_losses: Float[Array, "b"],
    active: Bool[Array, "b"],
) -> LossVariances:
    """The state after one more batch, whose variances (with n - 1 in the denominator) are over its active samples.

    A batch with fewer than two of them has no variance and leaves the state as it is. Values of samples that are not
    active are never used, whatever they are. No gradient flows through the state.

    Args:
      diffusion_losses, perceptual_losses: of each sample, unweighted, (B,).
      active: boolean (B,), where the noise level passes the gate (and, where few are decoded, the sample was).

    Raises:
      InputError: shapes that differ.
    """
    _check_shapes(diffusion_losses=diffusion_losses, perceptual_losses=perceptual_losses, active=active)
    diffusion_losses, perceptual_losses = lax.stop_gradient((diffusion_losses, perceptual_losses))
    count = jnp.sum(active, dtype=jnp.float32)
    enough = count >= 2
    batches = state.batches + enough

    def updated(mean, losses):
        losses = jnp.where(active, losses.astype(jnp.float32), 0.0)
        deviation = jnp.where(active, losses - jnp.sum(losses) / jnp.maximum(count, 1.0), 0.0)
        variance = jnp.sum(jnp.square(deviation)) / jnp.maximum(count - 1.0, 1.0)
        # In this form a mean over millions of batches keeps its digits, which a sum in float32 would not.
        return jnp.where(enough, mean + (variance - mean) / jnp.maximum(batches, 1.0), mean)

    return LossVariances(
        updated(state.diffusion, diffusion_losses), updated(state.perceptual, perceptual_losses), batches
    )


def reweighted(
    *,
    diffusion_losses: Float[Array, "b"],
    active: Bool[Array, "b"],
    weight_lpl: Float[Array, ""] | float,
    var_lpl: Float[Array, ""] | float,
    var_l2: Float[Array, ""] | float,
) -> Float32[Array, "b"]:
    """The weighted loss of every sample (Eq. 15), (B,) float32; its mean over the batch is the training loss.

    The weights are not normalised, and no gradient flows through them. As long as `var_l2` is 0, that is before the
    first batch, all weights are 1.

    Args:
      diffusion_losses: (B,), with gradient.
      active: boolean (B,), where LPL would be active.
      weight_lpl: the weight w that LPL would have.
      var_lpl, var_l2: variances of the perceptual and of the diffusion loss, as in `LossVariances`.

    Raises:
      InputError: shapes that differ.
    """
    _check_shapes(diffusion_losses=diffusion_losses, active=active)
    known = var_l2 != 0  # NaN is not: it shall show
    ratio = jnp.where(known, var_lpl / jnp.where(known, var_l2, 1.0), 0.0)
    weights = 1.0 + weight_lpl * ratio * active.astype(jnp.float32)
    return lax.stop_gradient(weights) * diffusion_losses.astype(jnp.float32)


def _check_shapes(**arrays):
    if len({array.shape for array in arrays.values()}) > 1 or next(iter(arrays.values())).ndim != 1:
        given = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InputError(f"one value for each sample is needed, (B,), given {given}")
