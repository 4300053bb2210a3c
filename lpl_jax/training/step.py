"""One training step: diffusion loss, and a further term on the same prediction (Sec. 3.2 of the paper).

    batch {mean, logvar, label | tokens} --sample--> z0 --add_noise(t, noise)--> z_t --model--> prediction D
    diffusion loss: mean of (D - target)^2            z0_hat from z_t, D, t (float32)
    perceptual loss: decoder features of z0_hat and z0 where sigma(t)/alpha(t) <= tau
    loss = diffusion + weight * perceptual --grad--> optimizer --> params, EMAs

The same D feeds both losses: one evaluation of the network, no second forward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lpl_jax import parallel
from lpl_jax.data import sample_posterior
from lpl_jax.diffusion import loss_weight
from lpl_jax.diffusion.timesteps import stratified_uniform
from lpl_jax.losses import LossVariances
from lpl_jax.text import TextConditioner
from lpl_jax.training.accumulate import over_parts
from lpl_jax.training.objective import LossOutput, Objective, Prediction, Samples
from lpl_jax.training.state import Frozen, TrainState, apply_gradients


def losses(
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    frozen: Frozen,
    *,
    objective: Objective,
    weight: jax.Array | float = 0.0,
    variances: LossVariances | None = None,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, LossOutput]:
    """Total loss of one batch, scalar float32, and what there is to say of it.

    Args:
      params: of `objective.model`.
      batch: mean and logvar (B, h, w, C), raw moments of the encoder's posterior; label (B,) int32, or tokens and what
        else the text tower takes; control (B, 4), original sizes and crops, where the model is conditioned on them.
      key: every draw comes from it: posterior sample, t, noise, dropped conditions, which images are decoded.
      frozen: the autoencoder decodes and knows the latents' scale; the others as the objective needs them.
      weight: scalar, of the objective's term.
      variances: of the losses so far, for the re-weighting of Eq. 15.
      t: (B,) in the paradigm's unit, and noise: (B, h, w, C); given by tests that need fixed inputs.
    """
    paradigm = objective.paradigm
    latent_key, t_key, noise_key, drop_key, gate_key = jax.random.split(key, 5)
    z0 = frozen.autoencoder.scale(sample_posterior(latent_key, mean=batch["mean"], logvar=batch["logvar"]))
    t = _times(t_key, len(z0), objective) if t is None else t
    noise = jax.random.normal(noise_key, z0.shape) if noise is None else noise
    conditions = _conditions(batch, drop_key, objective, frozen.text)

    z_t = paradigm.add_noise(z0=z0, noise=noise, t=t)
    prediction: Any = objective.model.apply({"params": params}, z_t, paradigm.time_input(t), *conditions)
    squared = jnp.square(prediction.astype(jnp.float32) - paradigm.target(z0=z0, noise=noise, t=t)).mean((1, 2, 3))
    by_sample = loss_weight(paradigm, t, objective.loss.weighting, gamma=objective.loss.gamma) * squared
    if objective.term is None:
        diffusion = jnp.mean(by_sample)
        means = {"loss": diffusion, "diffusion_loss": diffusion}
        return diffusion, LossOutput(means, samples=Samples(by_sample), variances=variances)
    z0_hat, eps_hat = paradigm.estimate(z_t=z_t, prediction=prediction, t=t)
    step = Prediction(z0, noise, t, z0_hat, eps_hat, by_sample, conditions)
    return objective.term(step, objective=objective, key=gate_key, frozen=frozen, weight=weight, variances=variances)


def _conditions(batch, key, objective: Objective, text: TextConditioner | None) -> tuple:
    """The model's arguments after the time: context, pooled text or None, size and crop or None."""
    dropped = jax.random.bernoulli(key, objective.loss.label_dropout, batch["mean"].shape[:1])
    if text is None:
        condition = jnp.where(dropped, objective.null_label, batch["label"]), None
    else:
        condition = text(batch, dropped, jax.random.fold_in(key, 1))
    return (*condition, batch.get("control"))


def _times(key, batch: int, objective: Objective):
    paradigm = objective.paradigm
    if not objective.loss.stratified_t:
        return paradigm.sample_t(key, (batch,))
    groups = parallel.context_shards() if objective.groups is None else objective.groups
    return paradigm.time_of(stratified_uniform(key, groups, batch // groups))


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    seed_key: jax.Array,
    frozen: Frozen,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_start: int = 0,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of parameters, optimizer state and EMAs. Pure; jit it once with the keyword arguments bound.

    Every random draw comes from `fold_in(seed_key, state.step)`: a run that is stopped and resumed draws the same.
    Where the loss or the gradient is not finite the step counts, and changes nothing else (`apply_gradients`).
    Arguments as in `losses`. The metrics also hold the norms of gradient and parameters. With several parts of a batch
    the gradient is summed in float32, and the variances of Eq. 15 are updated by each part.
    """
    frozen = frozen.replace(autoencoder=parallel.gather_decoder(frozen.autoencoder))
    key = jax.random.fold_in(seed_key, state.step)
    gradient = jax.grad(functools.partial(losses, objective=objective, weight=state.lpl_weight), has_aux=True)

    def add_part(carry, rows, key):
        total, variances = carry
        batch, fixed = rows
        grads, output = gradient(state.params, batch, key, frozen, variances=variances, **fixed)
        variances = output.variances
        grads = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return (grads, variances), LossOutput(output.means, output.counts)

    # Sums lie where the parameters do, so that no device ever holds a complete gradient.
    zeros = None if objective.accumulate == 1 else parallel.constrain_params(jax.tree.map(jnp.zeros_like, state.params))
    rows = batch, dict(t=t, noise=noise)
    (grads, variances), output = over_parts(add_part, (zeros, state.variances), rows, key, objective.accumulate)
    grads = jax.tree.map(lambda total: total / objective.accumulate, grads)
    loss = output.means["loss"]
    state, norms = apply_gradients(state, grads, optimizer, loss=loss, variances=variances, ema_start=ema_start)
    return state, output.metrics | norms


def make_step(objective: Objective, optimizer, state: TrainState, mesh: Mesh, *, ema_start: int = 0):
    """The jitted train step of a run: (state, batch, seed_key, frozen) -> (state, metrics). The state is donated.

    objective: of the steps that this program takes, `Objective.at`. state: may be ShapeDtypeStructs.
    """
    return jax.jit(
        functools.partial(train_step, objective=objective, optimizer=optimizer, ema_start=ema_start),
        donate_argnums=0,
        # Stated, so that the new state lies where the old one does and can take its memory.
        out_shardings=(parallel.param_sharding(state, mesh), parallel.replicated(mesh)),
    )
