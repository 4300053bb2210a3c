"""Exact order statistics of every channel of a map: by `lax.top_k`, or by counting, which sorts nothing.

Counting finds the bits of the k-th smallest value from the highest down, as a radix select does: floats are read as
unsigned integers of the same order, and each pass over the values counts how many lie below the next candidates. All
ranks share a pass, and there are as many passes as the type has bits, divided by the bits decided in one pass.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lpl_jax.errors import InputError

METHODS = ("auto", "top_k", "counting")

_KEYS = {16: jnp.uint16, 32: jnp.uint32}
# Two counts share one int32, the lower in its first 16 bits; a run of so many values fills neither. Runs are short
# since their sums are what the threads of a CPU share among them.
_RUN = 256


def kth_smallest(
    values: Float[Array, "*batch n c"], ranks: Sequence[int], method: str = "auto"
) -> tuple[Float[Array, "*batch c"], ...]:
    """The values of these ranks along the second last axis, exact in every float type.

    Both methods give the same values, whatever ties and infinities there are. 0.0 and -0.0 are one value, and which
    of the two is returned is not specified. Along an axis that holds NaN nothing is specified: NaN has no rank.

    Args:
      values: (..., N, C).
      ranks: counted from 1 = the smallest, each at most N.
      method: "top_k"; "counting", for floats of 16 or 32 bits, faster and with less memory (docs/decisions.md);
        "auto" is counting where the type allows it.

    Returns:
      One array (..., C) for each rank, in the type of `values`.

    Raises:
      InputError: a rank outside 1 to N, another method, or a type without counting.
    """
    if method not in METHODS:
        raise InputError(f"kth_smallest: method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    if values.ndim < 2 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(f"kth_smallest: values must be floats (..., N, C), given {values.dtype} {values.shape}")
    if not ranks or not all(1 <= rank <= values.shape[-2] for rank in ranks):
        raise InputError(f"kth_smallest: ranks={tuple(ranks)} must lie between 1 and N = {values.shape[-2]}")
    if method == "top_k" or (method == "auto" and _bits(values.dtype) not in _KEYS):
        return _top_k(values, ranks)
    # By the platform that is compiled for, which ahead of time need not be the one that runs this. A CPU does one
    # count at a time, so that narrow passes are best; accelerators do several from one read.
    return lax.platform_dependent(
        values,
        cpu=partial(by_counting, ranks=ranks, bits_per_pass=1, unroll=False),
        default=partial(by_counting, ranks=ranks, bits_per_pass=2, unroll=True),
    )


def by_counting(
    values: Float[Array, "*batch n c"], ranks: Sequence[int], *, bits_per_pass: int, unroll: bool
) -> tuple[Float[Array, "*batch c"], ...]:
    """`kth_smallest` by counting passes.

    Args:
      values: (..., N, C), floats of 16 or 32 bits.
      ranks: as there.
      bits_per_pass: b, a divisor of the number of bits; each pass counts against 2^b - 1 candidates.
      unroll: write the passes out. The integers are then computed from `values` in each pass; a loop keeps an array of
        them, as large as `values`, but compiles faster.

    Raises:
      InputError: a type or `bits_per_pass` that is not possible.
    """
    bits = _bits(values.dtype)
    if bits not in _KEYS:
        raise InputError(f"counting needs floats of 16 or 32 bits, given {values.dtype}; cast them, or use top_k")
    if bits_per_pass < 1 or bits % bits_per_pass:
        raise InputError(f"bits_per_pass={bits_per_pass} does not divide the {bits} bits of {values.dtype}")
    if unroll:
        # Else the layout of what computed the values (space-to-batch convolutions on TPUs) leaks into every pass.
        values = lax.optimization_barrier(values)
    keys = _runs(_to_keys(values))
    unsigned = keys.dtype.type

    def one_pass(step, found):
        shift = jnp.asarray(bits - bits_per_pass * (step + 1)).astype(unsigned)
        digits = [jnp.zeros(prefix.shape, unsigned) for prefix in found]
        for candidate in range(1, 2**bits_per_pass):
            limits = [prefix | (unsigned(candidate) << shift) for prefix in found]
            for i, below in enumerate(_count_below(keys, limits)):
                digits[i] += (below < ranks[i]).astype(unsigned)
        return tuple(prefix | (digit << shift) for prefix, digit in zip(found, digits, strict=True))

    found = tuple(jnp.zeros((*values.shape[:-2], values.shape[-1]), unsigned) for _ in ranks)
    passes = bits // bits_per_pass
    if unroll:
        for step in range(passes):
            found = one_pass(step, found)
    else:
        found = lax.fori_loop(0, passes, one_pass, found)
    return tuple(_from_keys(keys, values.dtype) for keys in found)


def _top_k(values, ranks):
    count = values.shape[-2]
    values = values.swapaxes(-1, -2)  # top_k works on the last axis

    def one(rank):
        if rank > count // 2:
            return lax.top_k(values, count - rank + 1)[0][..., -1]
        return -lax.top_k(-values, rank)[0][..., -1]

    return tuple(one(rank) for rank in ranks)


def _bits(dtype):
    return 8 * jnp.dtype(dtype).itemsize


def _to_keys(values):
    """Unsigned integers in the order of the floats: positive ones get the top bit, negative ones are inverted."""
    unsigned = _KEYS[_bits(values.dtype)]
    bits, top = lax.bitcast_convert_type(values, unsigned), unsigned(1 << (_bits(values.dtype) - 1))
    return jnp.where(bits & top, ~bits, bits | top)


def _from_keys(keys, dtype):
    top = keys.dtype.type(1 << (_bits(dtype) - 1))
    return lax.bitcast_convert_type(jnp.where(keys & top, keys ^ top, ~keys), dtype)


def _runs(keys):
    """(..., N, C) as (..., runs, length, C), filled up with the largest key, which is below no limit."""
    *batch, count, channels = keys.shape
    length = min(count, _RUN)
    runs = math.ceil(count / length)
    if fill := runs * length - count:
        rows = jnp.full((*batch, fill, channels), jnp.iinfo(keys.dtype).max, keys.dtype)
        keys = jnp.concatenate([keys, rows], axis=-2)
    return keys.reshape(*batch, runs, length, channels)


def _count_below(keys, limits):
    """How many keys lie below each limit (..., C); two limits at a time, since both then need only one sum."""
    counts = []
    for i in range(0, len(limits), 2):
        marks = [(keys < limit[..., None, None, :]).astype(jnp.int32) for limit in limits[i : i + 2]]
        packed = jnp.sum(sum(mark << (16 * j) for j, mark in enumerate(marks)), axis=-2)
        counts += [jnp.sum((packed >> (16 * j)) & 0xFFFF, axis=-2) for j in range(len(marks))]
    return counts
