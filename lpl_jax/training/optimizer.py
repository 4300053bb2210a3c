"""AdamW with warm-up and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lpl_jax.experiment import OptimizerConfig
from lpl_jax.parallel import leaf_path


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of the update made at step n (counted from 0), as a float32 scalar.

    For an int it is computed on the host: on a device it would come after all steps that are waiting there.

    Warm-up: (n + 1) / warmup_steps of the full rate, so the first update does something and update `warmup_steps` is
    the first at the full rate.
    """

    def schedule(step: Any) -> Any:
        xp = np if isinstance(step, int) else jnp
        step = xp.asarray(step, xp.float32)
        factor = xp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "cosine":
            assert config.total_steps is not None  # `OptimizerConfig.check`
            done = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
            factor *= 0.5 * (1 + xp.cos(xp.pi * xp.clip(done, 0.0, 1.0)))
        return config.learning_rate * factor

    return schedule


def decay_mask(params):
    """True for the leaves that weight decay acts on: those named `kernel`.

    By name, as in a stack of scanned layers biases and scales have two axes too.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_path(path).rsplit("/", 1)[-1] == "kernel", params)


def make_optimizer(config: OptimizerConfig) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimizer and its learning rate as a function of the step (for the metrics)."""
    schedule = learning_rate_schedule(config)
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule
