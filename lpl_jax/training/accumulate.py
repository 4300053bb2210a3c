"""Gradient accumulation: a batch in several parts, one after another inside one compiled step.

Memory is that of one part, and of a float32 gradient beside the state. What a step computes is that of the full batch
where losses are means over samples; what is drawn differs, as each part has a key of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lpl_jax.parallel import constrain_batch
from lpl_jax.training.objective import LossOutput


def over_parts(function: Callable, carry: Any, rows: Any, key: jax.Array, count: int) -> tuple[Any, LossOutput]:
    """function(carry, rows, key) -> (carry, LossOutput), on `count` equal parts of the rows in turn.

    rows: tree of arrays (B, ...), B divisible by count; each device's rows are split into as many parts, so that none
    moves. key: the parts are given fold_in(key, 0), fold_in(key, 1) ...; one part is given the key itself.
    Returns the last carry, and the output of all rows: means over the parts, sums of counts, and samples in the order
    of the parts. Variances belong in the carry.
    """
    if count == 1:
        return function(carry, rows, key)

    def split(array):
        return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)

    def body(carry, part):
        index, rows = part
        return function(carry, constrain_batch(rows), jax.random.fold_in(key, index))

    carry, parts = jax.lax.scan(body, carry, (jnp.arange(count), jax.tree.map(split, rows)))
    return carry, LossOutput(
        means=jax.tree.map(lambda values: jnp.mean(values, axis=0), parts.means),
        counts=jax.tree.map(lambda values: jnp.sum(values, axis=0), parts.counts),
        samples=jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts.samples),
    )
