"""Order statistics by counting against `top_k` and against NumPy's sort, on values made to be awkward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.losses import outlier_mask
from lpl_jax.losses.quantiles import METHODS, by_counting, kth_smallest

# (values on an axis, ranks, type): tiny ones, whole runs of 256, and one that has to be filled up
CASES = (
    (1, (1, 1), "float32"),
    (7, (1, 7), "bfloat16"),
    (48, (1, 47), "float16"),
    (512, (10, 501), "bfloat16"),
    (700, (14, 686, 350), "float32"),
    (700, (14, 686, 350), "bfloat16"),
)
CHANNELS = 16


def random_bits(rng, shape, dtype):
    """Floats with random bits: every size from the smallest to infinity, without NaN."""
    width = 8 * jnp.dtype(dtype).itemsize
    values = rng.integers(0, 2**width, shape, np.uint64).astype(f"uint{width}").view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values), values.dtype.type(0), values)


def awkward(rng, shape, dtype):
    """One pattern for each channel in turn, (N, C)."""
    normal = rng.standard_normal(shape)
    infinite = np.where(rng.random(shape) < 0.1, np.inf, normal) * rng.choice([-1, 1], shape)
    zeros = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    patterns = [
        normal,
        np.abs(normal) + 100,
        -np.abs(normal) - 100,
        np.round(normal * 2) / 2,  # ties, and zeros of both signs
        zeros,
        np.where(rng.random(shape) < 0.3, normal, zeros),
        infinite,
        rng.choice([-np.inf, np.inf, 0.0], shape),
        np.full(shape, rng.standard_normal()),
        np.sort(normal, axis=0),
        1 + 2.0**-20 * rng.integers(0, 5, shape),  # differ in the last bits
        rng.standard_t(1.0, shape),
    ]
    with np.errstate(over="ignore"):  # float16: infinities are welcome
        patterns = [values.astype(jnp.dtype(dtype)) for values in patterns]
    patterns += [random_bits(rng, shape, dtype)] * 2
    return np.stack([patterns[c % len(patterns)][:, c] for c in range(shape[1])], axis=1)


@pytest.mark.parametrize(("count", "ranks", "dtype"), CASES)
def test_counting_equals_top_k_and_sort(count, ranks, dtype):
    methods = [jax.jit(functools.partial(kth_smallest, ranks=ranks, method=name)) for name in ("counting", "top_k")]
    for seed in range(20):
        values = awkward(np.random.default_rng(seed), (count, CHANNELS), dtype)
        ordered = np.sort(values.astype(np.float32), axis=0)
        for rank, counted, by_top_k in zip(ranks, *(method(values) for method in methods), strict=True):
            assert counted.dtype == by_top_k.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(np.asarray(counted, np.float32), ordered[rank - 1])
            np.testing.assert_array_equal(np.asarray(counted, np.float32), np.asarray(by_top_k, np.float32))


@pytest.mark.parametrize(
    ("bits_per_pass", "unroll", "dtype"),
    [(1, False, "float32"), (4, False, "float32"), (2, True, "bfloat16"), (2, False, "bfloat16")],
)
def test_every_form_of_the_passes(bits_per_pass, unroll, dtype):
    rng = np.random.default_rng(0)
    values = np.stack([awkward(rng, (300, CHANNELS), dtype) for _ in range(2)])
    found = jax.jit(functools.partial(by_counting, ranks=(6, 294), bits_per_pass=bits_per_pass, unroll=unroll))(values)
    ordered = np.sort(values.astype(np.float32), axis=1)
    for rank, value in zip((6, 294), found, strict=True):
        np.testing.assert_array_equal(np.asarray(value, np.float32), ordered[:, rank - 1])


def test_counts_beyond_sixteen_bits():
    # Two counts share an integer for a run of values only: here all values, or all but a few, lie below a limit.
    values = np.stack([np.full(70_000, 1.0), np.r_[np.full(66_000, -1.0), np.full(4_000, 2.0)]], 1).astype(np.float32)
    found = kth_smallest(values, (1, 66_000, 66_001), "counting")
    assert np.stack(found).tolist() == [[1, -1], [1, -1], [1, 2]]


def test_auto_counts_where_the_type_allows_it():
    values = np.random.default_rng(0).standard_normal((64, 2))
    assert "top_k" not in str(jax.make_jaxpr(lambda v: kth_smallest(v, (3,)))(values.astype(np.float32)))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(kth_smallest(values, (3,))[0], np.sort(values, axis=0)[2])
        with pytest.raises(InputError, match="float64"):
            kth_smallest(values, (3,), "counting")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_read_floats_in_each_pass(platform):
    # Lowered for them without having one: no loop, hence no array of integers that outlives a pass.
    def lowered(platform):
        traced = jax.jit(lambda v: kth_smallest(v, (3, 60))).trace(jax.ShapeDtypeStruct((64, 8), jnp.bfloat16))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.while" not in lowered(platform) and "optimization_barrier" in lowered(platform)
    assert "stablehlo.while" in lowered("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_are_the_same_whatever_the_method(dtype):
    masks = {
        method: jax.jit(functools.partial(outlier_mask, closing=1, opening=3, quantile_method=method))
        for method in METHODS
    }
    for seed in range(5):
        rng = np.random.default_rng(seed)
        maps = np.stack([awkward(rng, (400, 32), dtype) for _ in range(2)]).reshape(2, 20, 20, 32)
        maps[0, 3, 4, 0] = np.nan  # keeps the map whole
        maps[1, 5:7, 5:7, 0] = 60  # 4 of 400 pixels: fewer than the upper 2 %, or they would be its limit
        found = {method: np.asarray(mask(maps)) for method, mask in masks.items()}
        assert found["top_k"][0, ..., 0].all() and not found["top_k"][1, 6, 6, 0]
        for method in METHODS:
            np.testing.assert_array_equal(found[method], found["top_k"])


@pytest.mark.parametrize(
    ("values", "ranks", "method", "message"),
    [
        (np.zeros((8, 2), np.float32), (0,), "auto", r"ranks=\(0,\)"),
        (np.zeros((8, 2), np.float32), (1, 9), "top_k", "N = 8"),
        (np.zeros((8, 2), np.float32), (), "auto", r"ranks=\(\)"),
        (np.zeros((8, 2), np.float32), (1,), "sort", "'sort'"),
        (np.zeros((8, 2), np.int32), (1,), "auto", "int32"),
        (np.zeros(8, np.float32), (1,), "auto", r"\(8,\)"),
    ],
)
def test_refusals(values, ranks, method, message):
    with pytest.raises(InputError, match=message):
        kth_smallest(values, ranks, method)


@pytest.mark.parametrize("bits_per_pass", [0, 3])
def test_refusal_of_bits(bits_per_pass):
    with pytest.raises(InputError, match=f"bits_per_pass={bits_per_pass}"):
        by_counting(jnp.zeros((8, 2)), (1,), bits_per_pass=bits_per_pass, unroll=False)
