"""Softmax attention by name, so that an accelerator's own kernel can be chosen in the configuration."""

import jax

from lpl_jax.errors import InputError


def _xla(query, key, value):
    # Named, because jax's own default for this argument may change; logits and softmax are float32 in it.
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


IMPLEMENTATIONS = {"xla": _xla}


def attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "xla") -> jax.Array:
    """softmax(query key^T / sqrt(head size)) value, without a mask.

    query (B, Nq, heads, head size), key and value (B, Nk, heads, head size) -> (B, Nq, heads, head size) in the dtype
    of `query`; the softmax is float32. Raises InputError for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attention {implementation!r} given, possible is one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](query, key, value)
