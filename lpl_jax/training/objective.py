"""What a step minimises: the diffusion loss, and at most one further term.

    LPLTerm           w * LPL where sigma(t) / alpha(t) <= tau (Sec. 3.2 of the paper)
    ComparisonTerm    w * E-LatentLPIPS or Self-Perceptual (Table 5)
    ReweightingTerm   the diffusion loss itself, weighted with the variances of LPL (Eq. 15, Table 6)

A term is a function: (prediction, objective=, key=, frozen=, weight=, variances=) -> (total loss, LossOutput).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax import parallel
from lpl_jax.denoisers import MMDiT
from lpl_jax.diffusion import Paradigm, loss_weight
from lpl_jax.experiment import Experiment, LossConfig
from lpl_jax.losses import (
    ComparisonConfig,
    LossVariances,
    LPLConfig,
    active_samples,
    block_features,
    calibrate_weight,
    calibrate_weight_by_variance,
    comparison_losses,
    gated_perceptual_loss,
    latent_perceptual_loss,
    perceptual_share,
    reweighted,
    update_variances,
)
from lpl_jax.losses.gate import check_groups
from lpl_jax.training.state import Frozen


class Prediction(NamedTuple):
    """What a term is computed from, for a batch of B.

    z0, noise (B, h, w, C) and t (B,): what was drawn. z0_hat, eps_hat: the network's estimates, float32.
    losses: the weighted diffusion loss by sample, (B,). conditions: the network's arguments after the time.
    """

    z0: jax.Array
    noise: jax.Array
    t: jax.Array
    z0_hat: jax.Array
    eps_hat: jax.Array
    losses: jax.Array
    conditions: tuple


class Samples(NamedTuple):
    """Losses of the single samples, (B,): diffusion; of a comparison, and where that is active."""

    diffusion: jax.Array
    perceptual: jax.Array | None = None
    active: jax.Array | None = None


class LossOutput(NamedTuple):
    """What a loss says beside its value.

    means: metrics that are means over samples. counts: metrics that are sums over samples. samples: a comparison loss
    is calibrated by their variance, and they tell which record of a batch is not finite. variances: updated, of Eq. 15.
    """

    means: dict[str, jax.Array]
    counts: dict[str, jax.Array] = {}  # noqa: RUF012  # never changed
    samples: Samples | None = None
    variances: LossVariances | None = None

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """Means and counts by name."""
        return self.means | self.counts


@dataclass(frozen=True)
class LPLTerm:
    """The Latent Perceptual Loss of the samples under its threshold.

    Attributes:
      config: the loss.
      capacity: how many images of a part of a batch are decoded at the most; None decodes all and masks.
      groups, chunk: of a part in the draw of these, and images decoded at a time; see `gated_perceptual_loss`.
      gamma: of the min-SNR weights, where the config asks for them.
    """

    config: LPLConfig
    capacity: int | None = None
    groups: int | None = None
    chunk: int | None = None
    gamma: float = 5.0

    def __call__(self, step: Prediction, *, objective: "Objective", key, frozen: Frozen, weight, variances):
        """Total loss, scalar, and what is said of it; see the module."""
        paradigm = objective.paradigm
        alpha, sigma = paradigm.alpha_sigma(step.t)
        min_snr = self.config.extra_weight == "min_snr"
        perceptual, details = gated_perceptual_loss(
            frozen.autoencoder,
            self.config,
            z0_hat=step.z0_hat,
            z0=step.z0,
            alpha=alpha,
            sigma=sigma,
            key=key,
            resolution=objective.resolution,
            capacity=self.capacity,
            groups=self.groups,
            chunk=self.chunk,
            sample_weight=loss_weight(paradigm, step.t, "min_snr", gamma=self.gamma) if min_snr else None,
        )
        diffusion = jnp.mean(step.losses)
        total = diffusion + weight * perceptual
        share = perceptual_share(diffusion_loss=diffusion, perceptual_loss=perceptual, weight=weight)
        means = {"loss": total, "diffusion_loss": diffusion, "lpl": perceptual, "lpl_share": share}
        details = {f"lpl/{name}": value for name, value in details.items()}
        counts = {"lpl/decoded": details.pop("lpl/decoded")}
        return total, LossOutput(means | details, counts, Samples(step.losses))

    @property
    def measured(self) -> "LPLTerm":
        """The term whose losses the weight is calibrated on."""
        return self

    def calibrate(self, outputs: Sequence[LossOutput]) -> float:
        """The weight at which LPL is `target_share` of the total loss, from batches that were measured."""
        means = [output.means for output in outputs]
        diffusion, perceptual = (np.array([row[name] for row in means]) for name in ("diffusion_loss", "lpl"))
        share = self.config.target_share
        assert share is not None
        return calibrate_weight(diffusion_losses=diffusion, perceptual_losses=perceptual, target_share=share)


@dataclass(frozen=True)
class ComparisonTerm:
    """E-LatentLPIPS, or the Self-Perceptual loss."""

    config: ComparisonConfig

    def __call__(self, step: Prediction, *, objective: "Objective", key, frozen: Frozen, weight, variances):
        """Total loss, scalar, and what is said of it; see the module."""
        block, paradigm = self.config.block, objective.paradigm
        alpha, sigma = paradigm.alpha_sigma(step.t)
        values, active = comparison_losses(
            self.config,
            frozen.network,
            paradigm,
            z0_hat=step.z0_hat,
            eps_hat=step.eps_hat,
            z0=step.z0,
            noise=step.noise,
            alpha=alpha,
            sigma=sigma,
            key=key,
            resolution=objective.resolution,
            features=block_features(objective.model, block) if block else None,
            conditions=step.conditions,
        )
        diffusion, comparison = jnp.mean(step.losses), jnp.mean(values)
        total = diffusion + weight * comparison
        share = perceptual_share(diffusion_loss=diffusion, perceptual_loss=comparison, weight=weight)
        means = {"loss": total, "diffusion_loss": diffusion, "comparison": comparison, "comparison_share": share}
        return total, LossOutput(means, samples=Samples(step.losses, values, active))

    @property
    def measured(self) -> "ComparisonTerm":
        """The term whose losses the weight is calibrated on."""
        return self

    def calibrate(self, outputs: Sequence[LossOutput]) -> float:
        """The weight at which the loss has `variance_share` of the diffusion loss's variance (App. A.4)."""
        samples = [output.samples for output in outputs if output.samples is not None]
        diffusion = np.concatenate([np.asarray(batch.diffusion) for batch in samples])
        perceptual = np.concatenate([np.asarray(batch.perceptual)[np.asarray(batch.active)] for batch in samples])
        share = self.config.variance_share
        assert share is not None
        return calibrate_weight_by_variance(diffusion_losses=diffusion, perceptual_losses=perceptual, share=share)


@dataclass(frozen=True)
class ReweightingTerm:
    """Eq. 15: `lpl` is only measured, on every sample under its threshold, and weights the diffusion loss."""

    lpl: LPLTerm

    def __call__(self, step: Prediction, *, objective: "Objective", key, frozen: Frozen, weight, variances):
        """Total loss, scalar, and what is said of it; see the module."""
        config = self.lpl.config
        alpha, sigma = objective.paradigm.alpha_sigma(step.t)
        active = active_samples(config, alpha=alpha, sigma=sigma, resolution=objective.resolution)
        estimate = jax.lax.stop_gradient(jnp.where(active[:, None, None, None], step.z0_hat, step.z0))
        perceptual, _ = latent_perceptual_loss(
            frozen.autoencoder, config, z0_hat=estimate, z0=step.z0, chunk=self.lpl.chunk
        )
        losses = dict(diffusion_losses=step.losses, active=active)
        variances = update_variances(variances, perceptual_losses=perceptual, **losses)
        ratio = dict(var_lpl=variances.perceptual, var_l2=variances.diffusion)
        total = jnp.mean(reweighted(weight_lpl=weight, **ratio, **losses))
        lpl = jnp.mean(jnp.where(active, perceptual, 0.0))
        means = {"loss": total, "diffusion_loss": jnp.mean(step.losses), "lpl": lpl}
        return total, LossOutput(means, samples=Samples(step.losses), variances=variances)

    @property
    def config(self) -> LPLConfig:
        """Of the loss whose weight this term takes."""
        return self.lpl.config

    @property
    def measured(self) -> LPLTerm:
        """The term whose losses the weight is calibrated on."""
        return self.lpl

    def calibrate(self, outputs: Sequence[LossOutput]) -> float:
        """The weight that LPL would have."""
        return self.lpl.calibrate(outputs)


Term = LPLTerm | ComparisonTerm | ReweightingTerm


@dataclass(frozen=True)
class Objective:
    """What a step minimises. Hashable, so that a jitted step takes it as a static argument.

    Attributes:
      model: the denoiser, a Linen module.
      paradigm: forward process, target and estimate of z0.
      resolution: side of the images in pixels; scales the perceptual loss's threshold.
      null_label: the label that stands for "no condition".
      loss: weight of the diffusion loss over t, dropped conditions, stratified timesteps, the start of the term.
      term: what is added to the diffusion loss; None: nothing.
      groups: timesteps are spread evenly within each of so many; None: the parts on devices.
      accumulate: number of equal parts that a batch is taken in, one after another.
    """

    model: nn.Module
    paradigm: Paradigm
    resolution: int
    null_label: int
    loss: LossConfig = LossConfig()
    term: Term | None = None
    groups: int | None = None
    accumulate: int = 1

    def at(self, step: int) -> "Objective":
        """What is minimised after so many updates: before `loss.lpl_start` there is no term, and nothing is decoded."""
        return self if step >= self.loss.lpl_start else replace(self, term=None)


def make_objective(experiment: Experiment, shards: int | None = None) -> Objective:
    """What the steps of a resolved experiment minimise.

    shards: parts that devices split a batch into; None: as the mesh that is set does.

    Raises InputError where the images to decode cannot be drawn evenly from these parts.
    """
    shards = parallel.context_shards() if shards is None else shards
    return Objective(
        model=MMDiT(experiment.model),
        paradigm=experiment.paradigm,
        resolution=experiment.resolution,
        null_label=experiment.model.num_classes,
        loss=experiment.loss,
        term=_term(experiment, shards),
        groups=experiment.loss.groups(shards),
        accumulate=experiment.train.accumulate,
    )


def _term(experiment: Experiment, shards: int) -> Term | None:
    """The one further term of an experiment: here it is chosen, and nowhere else."""
    lpl, comparison, loss = experiment.lpl, experiment.comparison, experiment.loss
    if lpl is None:
        return None if comparison is None else ComparisonTerm(comparison)
    batch, parts, groups = experiment.train.batch_size, experiment.train.accumulate, loss.groups(shards)
    active = experiment.paradigm.active_fraction(lpl.tau_at(experiment.resolution))
    capacity = loss.capacity(batch, active, groups, parts)
    check_groups(batch // parts, capacity, groups, shards)
    term = LPLTerm(lpl, capacity, groups, loss.chunk, loss.gamma)
    return term if comparison is None else ReweightingTerm(term)


def decoded_images(objective: Objective, batch_size: int) -> int:
    """Images of a batch that go through the decoder in a step, clean and estimated."""
    term = objective.term
    if term is None or isinstance(term, ComparisonTerm):
        return 0
    if isinstance(term, ReweightingTerm) or term.capacity is None:
        return batch_size
    return term.capacity * objective.accumulate
