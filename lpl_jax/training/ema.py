"""Exponential moving averages of the parameters, several side by side.

An average is named by its decay ("0.9999"), so that the name says all there is to know about it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lpl_jax.experiment.training import ema_names


def init_emas(params, decays: Sequence[float]) -> dict:
    """One copy of the parameters per decay. Raises InputError where a decay is given twice."""
    return {name: jax.tree.map(jnp.copy, params) for name in ema_names(decays)}


def update_emas(emas: dict, params, step, start: int = 0) -> dict:
    """Averages after update number `step` (1 for the first): e <- d e + (1 - d) p, and e <- p while step <= start."""

    def update(decay):
        return lambda e, p: jnp.where(step <= start, p, e + (1 - decay) * (p - e))

    return {name: jax.tree.map(update(float(name)), ema, params) for name, ema in emas.items()}
