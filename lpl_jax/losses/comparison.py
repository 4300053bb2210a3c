"""The losses that the paper compares LPL with (Tables 5 and 6), behind one configuration.

"latent_lpips": E-LatentLPIPS on the latents. "self_perceptual": features of a frozen copy of the denoiser. Both are
added to the diffusion loss, on all samples or where the noise level passes a gate (the rows marked with a dagger).
"reweighting": no further loss, but the diffusion loss weighted as Eq. 15 says, with the variances of LPL. The other two
comparisons are LPL with taps="rgb" and the diffusion loss's weighting="min_snr".
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from lpl_jax.diffusion import Paradigm
from lpl_jax.errors import InputError
from lpl_jax.losses.gate import active_samples
from lpl_jax.losses.latent_lpips import latent_lpips
from lpl_jax.losses.self_perceptual import Features, sample_second_t, self_perceptual_loss

KINDS = ("latent_lpips", "self_perceptual", "reweighting")


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Which comparison, on which samples and with which weight. Hashable: a static argument under jit.

    Attributes:
      kind: one of `KINDS`.
      network: latent_lpips: file of the published weights. self_perceptual: folder of a run or of a denoiser that was
        trained with the diffusion loss alone; None takes the parameters that the run starts from.
      block: self_perceptual: tokens behind this block, counted from 1.
      tau, tau_ref_resolution: gate on sigma/alpha, as for LPL; None takes every sample.
      weight: factor on the loss; None calibrates it so that its variance is `variance_share` of the diffusion loss's
        (App. A.4).
    """

    kind: str
    network: str | None = None
    block: int | None = None
    tau: float | None = None
    tau_ref_resolution: int | None = None
    weight: float | None = None
    variance_share: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"comparison.kind={self.kind!r} is not none, {', '.join(KINDS)}")
        if (self.tau is None) != (self.tau_ref_resolution is None):
            raise InputError("comparison.tau and comparison.tau_ref_resolution are given together or not at all")
        if self.tau is not None and not (self.tau > 0 and self.tau_ref_resolution > 0):
            raise InputError(
                f"comparison.tau={self.tau}, tau_ref_resolution={self.tau_ref_resolution}: must be positive"
            )
        self._check_kind()
        if self.kind != "reweighting" and self.weight is None and self.variance_share is None:
            object.__setattr__(self, "variance_share", 0.1)
        if self.weight is not None and self.variance_share is not None:
            raise InputError("comparison.weight and comparison.variance_share: give one of the two")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise InputError(f"comparison.weight={self.weight} must be finite and not negative")

    def _check_kind(self):
        wanted = {
            "latent_lpips": ("network",),
            "self_perceptual": ("block",),
            "reweighting": (),
        }[self.kind]
        possible = {
            "latent_lpips": ("network", "tau", "weight", "variance_share"),
            "self_perceptual": ("network", "block", "tau", "weight", "variance_share"),
            "reweighting": (),
        }[self.kind]
        for name in ("network", "block", "tau", "weight", "variance_share"):
            if getattr(self, name) is not None and name not in possible:
                raise InputError(f"comparison.{name} is given, but comparison.kind={self.kind!r} has no use for it")
            if getattr(self, name) is None and name in wanted:
                raise InputError(f"comparison.kind={self.kind!r} needs comparison.{name}")

    def tau_at(self, resolution: float) -> float:
        """The threshold on sigma/alpha for images of this side in pixels; infinite where there is no gate."""
        return math.inf if self.tau is None else self.tau * resolution / self.tau_ref_resolution


def comparison_losses(
    config: ComparisonConfig,
    network: Any,
    paradigm: Paradigm,
    *,
    z0_hat: Float[Array, "b h w c"],
    eps_hat: Float[Array, "b h w c"],
    z0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    alpha: Float[Array, "b"],
    sigma: Float[Array, "b"],
    key: PRNGKeyArray,
    resolution: float,
    features: Features | None = None,
    conditions: tuple = (),
) -> tuple[Float32[Array, "b"], Bool[Array, "b"]]:
    """The unweighted loss of every sample and where it counts.

    Args:
      config: of kind latent_lpips or self_perceptual.
      network: `LatentLPIPS`, or the frozen denoiser's parameters.
      paradigm: of the training, in which the second timesteps of self_perceptual are drawn.
      z0_hat, eps_hat, z0, noise: both estimates and what they estimate, each (B, h, w, C).
      alpha, sigma: coefficients at each sample's timestep, (B,).
      key: draws the second timesteps of self_perceptual.
      resolution: image side in pixels, which tau is scaled to.
      features, conditions: of self_perceptual, see there.

    Returns:
      (B,) float32, 0 where not active, and the gate (B,) bool.
    """
    active = lax.stop_gradient(active_samples(config, alpha=alpha, sigma=sigma, resolution=resolution))
    # As in the gate of LPL: what does not count is replaced before anything is computed from it.
    z0_hat, eps_hat = (
        jnp.where(active[:, None, None, None], estimate, lax.stop_gradient(true).astype(estimate.dtype))
        for estimate, true in ((z0_hat, z0), (eps_hat, noise))
    )
    if config.kind == "latent_lpips":
        loss = latent_lpips(network, z0_hat=z0_hat, z0=z0)
    elif features is None:
        raise InputError(f"comparison.kind={config.kind!r} needs the features of a denoiser, see `block_features`")
    else:
        t = sample_second_t(paradigm, key, alpha.shape)
        loss = self_perceptual_loss(
            features,
            network,
            paradigm,
            z0_hat=z0_hat,
            eps_hat=eps_hat,
            z0=z0,
            noise=noise,
            t=t,
            conditions=conditions,
        )
    return jnp.where(active, loss, 0.0), active
