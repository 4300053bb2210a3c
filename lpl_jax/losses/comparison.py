"""The losses that the paper compares LPL with (Tables 5 and 6), behind one configuration.

"latent_lpips": E-LatentLPIPS on the latents. "self_perceptual": features of a frozen copy of the denoiser. Both are
added to the diffusion loss, on all samples or where the noise level passes a gate (the rows marked with a dagger).
"reweighting": no further loss, but the diffusion loss weighted as Eq. 15 says, with the variances of LPL. The other two
comparisons are LPL with taps="rgb" and the diffusion loss's weighting="min_snr".
"""

import dataclasses
import math
from dataclasses import MISSING
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray
from typing_extensions import override

from lpl_jax.diffusion import Paradigm
from lpl_jax.errors import InputError
from lpl_jax.fields import Part, above, field
from lpl_jax.limits import DEPTH, NOISE_LEVEL, SIDE, WEIGHT
from lpl_jax.losses.gate import active_samples
from lpl_jax.losses.latent_lpips import latent_lpips
from lpl_jax.losses.self_perceptual import Features, sample_second_t, self_perceptual_loss


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(Part, section="comparison"):
    """Which comparison loss, in place of LPL, on which samples and with which weight (Tables 5 and 6).

    Hashable: a static argument under jit.
    """

    kind: Literal["latent_lpips", "self_perceptual", "reweighting"] = field(
        MISSING, "latent_lpips | self_perceptual | reweighting (Eq. 15; lpl says of which LPL)"
    )
    network: str | None = field(
        None,
        "latent_lpips: file of the published weights | self_perceptual: run or denoiser trained with the diffusion "
        "loss alone; None: what the run starts from",
    )
    block: int | None = field(
        None, "self_perceptual: tokens after this block, counted from 1 (paper: 8, 16 or 28)", DEPTH
    )
    tau: float | None = field(
        None,
        "largest noise level sigma/alpha that takes part, for tau_ref_resolution; None: every sample",
        above(0, NOISE_LEVEL),
    )
    tau_ref_resolution: int | None = field(None, "image side that tau is stated for", SIDE)
    weight: float | None = field(None, "factor on the loss; None: calibrated by variance_share", WEIGHT)
    variance_share: float | None = field(
        None,
        "calibrate the weight to this variance over the diffusion loss's (App. A.4: 0.1, the default)",
        above(0, 1000),
    )

    @override
    def check(self) -> None:
        if (self.tau is None) != (self.tau_ref_resolution is None):
            raise InputError("comparison.tau and comparison.tau_ref_resolution are given together or not at all")
        self._check_kind()
        if self.kind != "reweighting" and self.weight is None and self.variance_share is None:
            object.__setattr__(self, "variance_share", 0.1)
        if self.weight is not None and self.variance_share is not None:
            raise InputError("comparison.weight and comparison.variance_share: give one of the two")

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
        if self.tau is None or self.tau_ref_resolution is None:
            return math.inf
        return self.tau * resolution / self.tau_ref_resolution


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
