"""Precision, recall, density, coverage against their definitions and the prdc package; ties, memory, devices."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prdc import compute_prdc

from lpl_jax.errors import InputError
from lpl_jax.evaluation.prdc import _compare_step, _distances, _neighbour_step, prdc

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("precision", "recall", "density", "coverage")
DTYPES = ["float64", "float32"]


def normal(seed, n, d=32, scale=1.0, shift=0.0):
    return (scale * np.random.default_rng(seed).standard_normal((n, d)) + shift).astype(np.float32)


def clustered(seed, n, d=32, spread=1e-2):
    """Around 5 far centres, the same for all seeds; the last of them is left to odd seeds."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).standard_normal((5, d))
    return (centres[rng.integers(4 + seed % 2, size=n)] + spread * rng.standard_normal((n, d))).astype(np.float32)


def by_definition(real, fake, k, k_density):
    """All pairs in float64, differences first: nothing cancels, and equal points have distance 0."""

    def distances(x, y):
        return np.sqrt(((x[:, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(-1)).astype(np.float32)

    def radii(x, k):
        own = distances(x, x)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, 1)[:, k - 1]

    between = distances(real, fake)
    in_density_balls = between < radii(real, k_density)[:, None]
    return dict(
        precision=(between < radii(real, k)[:, None]).any(0),
        recall=(between < radii(fake, k)[None, :]).any(1),
        density=in_density_balls.sum(0) / k_density,
        coverage=between.min(1) < radii(real, k_density),
    )


def assert_same(found, expected):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(found, field), expected[field], err_msg=field)


SETS = {
    "normal": (normal(0, 150), normal(1, 110, scale=0.9, shift=0.1)),
    "clustered": (clustered(0, 150, spread=0.5), clustered(1, 110, spread=0.5)),
    "tight": (clustered(0, 150), clustered(1, 110)),  # too tight for float32: neighbours at 0.005 of the norm
    "far from 0": (normal(2, 150, shift=1000), normal(3, 110, scale=0.9, shift=1000.1)),
}


@pytest.mark.parametrize("name, dtype", [(n, d) for n in SETS for d in DTYPES if (n, d) != ("tight", "float32")])
def test_every_sample_as_defined(name, dtype):
    real, fake = SETS[name]
    found = prdc(real=real, fake=fake, k=2, k_density=4, block=64, dtype=dtype)
    expected = by_definition(real, fake, 2, 4)
    assert 0 < expected["precision"].mean() <= 1 and 0 < expected["coverage"].mean() < 1  # it could be wrong
    assert_same(found, expected)
    assert (found.k, found.k_density, found.dtype) == (2, 4, dtype)
    assert [getattr(found, field).shape for field in FIELDS] == [(110,), (150,), (110,), (150,)]
    assert found.precision.dtype == found.recall.dtype == found.coverage.dtype == bool
    assert found.means() == pytest.approx({field: expected[field].mean() for field in FIELDS}, rel=1e-15)


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_as_the_prdc_package(dtype):
    """Two sizes of neighbourhood per call, one for each pair of metrics."""
    pairs = {name: (make(4, 600), make(5, 500)) for name, make in (("normal", normal), ("tight", clustered))}
    pairs["clustered"] = clustered(4, 600, spread=0.5), clustered(5, 500, spread=0.5)
    for name, (real, fake) in pairs.items():
        if (name, dtype) == ("tight", "float32"):
            continue
        for k, k_density in ((3, 5), (5, 1)):
            with contextlib.redirect_stdout(io.StringIO()):
                theirs, theirs_density = (compute_prdc(real, fake, nearest_k=n) for n in (k, k_density))
            theirs |= {metric: theirs_density[metric] for metric in ("density", "coverage")}
            # metrics count samples or pairs: less than one pair is equality
            found = prdc(real=real, fake=fake, k=k, k_density=k_density, block=256, dtype=dtype).means()
            assert found == pytest.approx(theirs, abs=0.1 / (600 * 5)), name


def test_dtype_is_float64_where_there_is_one():
    """And the session is left as it was: 64-bit types are on inside the call only."""
    assert prdc(real=SETS["normal"][0], fake=SETS["normal"][1], block=64).dtype == "float64"
    assert jnp.ones(()).dtype == jnp.float32


@pytest.mark.parametrize("block", [1, 37, 110, 4096])
def test_blocks_do_not_matter(block):
    """A single row, sizes that do not divide both sets, more rows than there are."""
    real, fake = (x[:20] if block == 1 else x for x in SETS["normal"])
    assert_same(prdc(real=real, fake=fake, block=block, dtype="float32"), by_definition(real, fake, 3, 3))


# Ties and rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_sets(dtype):
    """Each point has itself at distance 0 and k - 1 others nearer than the k-th, which ties with the radius."""
    for shift in (0, 100):
        real = normal(6, 300, d=2048, shift=shift)
        for fake in (real, real.copy(), real[::-1]):
            found = prdc(real=real, fake=fake, block=128, dtype=dtype).means()
            if dtype == "float32":  # the tie may go either way for each of the N points
                assert 1 <= found.pop("density") <= 4 / 3
            assert found == dict.fromkeys(found, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_have_empty_balls(dtype):
    """Of k + 1 equal points the k nearest are at distance 0, and nothing is nearer than that."""
    for shift in (0, 50):
        few = normal(7, 40, d=512, shift=shift)
        many, twice = np.repeat(few, 3, 0), np.tile(few, (2, 1))
        assert prdc(real=many, fake=many, k=2, block=32, dtype=dtype).means() == dict.fromkeys(FIELDS, 0.0)
        # of 2 equal points the second nearest is another one: balls with both copies in them
        found = prdc(real=twice, fake=many, k=2, block=32, dtype=dtype)
        assert_same(found, by_definition(twice, many, 2, 2))
        assert found.means() == dict(precision=1, recall=0, density=1, coverage=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_points_are_at_distance_zero(dtype):
    """Though norms and products are summed in different orders."""
    x = jnp.asarray(normal(7, 64, d=2048, shift=5))
    with jax.enable_x64(dtype == "float64"):
        distances, *_ = _distances(x, x, np.zeros(2048, dtype), 0, 0, 64, 64)
    assert (np.diag(distances) == 0).all() and (distances == 0).sum() == 64


def test_collapsed_generator():
    """All images alike, at a real one: precise, no recall, and one ball covered, with whoever has it within reach."""
    real = normal(8, 100)
    fake = np.repeat(real[:1], 50, 0)
    found = prdc(real=real, fake=fake, block=32)
    assert_same(found, by_definition(real, fake, 3, 3))
    assert found.precision.all() and not found.recall.any() and found.coverage[0] and found.coverage.mean() < 0.5


def test_equal_distances_are_not_less():
    """A line of points at distance 5, whose mean is no round number: every comparison is a tie or clear."""
    real = np.arange(11, dtype=np.float32)[:, None] * np.float32([[3.0, 4.0]]) + np.float32([[0.0, 0.5]])
    fake = real + np.float32([[30.0, 40.0]])  # the first fake is where the last real point is
    found = prdc(real=real, fake=fake, k=1, block=4)
    assert_same(found, by_definition(real, fake, 1, 1))
    # neighbours are at distance 5 = radius: only a point in the same place is strictly inside
    np.testing.assert_array_equal(found.density, [1] + 10 * [0])
    np.testing.assert_array_equal(found.coverage, 10 * [False] + [True])


# Arguments


def test_neighbours_per_metric():
    real, fake = SETS["normal"]
    mixed, three, five = (
        prdc(real=real, fake=fake, k=k, k_density=k_density, block=64)
        for k, k_density in ((3, 5), (3, None), (5, None))
    )
    for field, single in zip(FIELDS, (three, three, five, five), strict=True):
        np.testing.assert_array_equal(getattr(mixed, field), getattr(single, field))
    assert mixed.means() != three.means() != five.means()
    assert_same(prdc(real=real, fake=fake, k=5, k_density=1, block=64), by_definition(real, fake, 5, 1))


@pytest.mark.parametrize("make", [jnp.asarray, lambda x: x.astype(np.float64), lambda x: np.asfortranarray(x)])
def test_kinds_of_arrays(make):
    real, fake = SETS["normal"]
    assert_same(prdc(real=make(real), fake=make(fake), block=64), by_definition(real, fake, 3, 3))


def test_half_precision_features():
    real, fake = (x.astype(np.float16) for x in SETS["normal"])
    assert_same(prdc(real=real, fake=fake, block=64), by_definition(real, fake, 3, 3))


def test_blocks_are_dealt_out_to_devices():
    real, fake = SETS["normal"]
    found = prdc(real=real, fake=fake, k=2, k_density=3, block=40, dtype="float32", devices=jax.devices()[1:4])
    assert_same(found, by_definition(real, fake, 2, 3))


def test_radii_of_all_but_oneself():
    real = normal(9, 4)
    assert_same(prdc(real=real, fake=real + 0.1, k=3), by_definition(real, real + np.float32(0.1), 3, 3))
    with pytest.raises(InputError, match="4 neighbours asked for of 4 real and 9 fake samples; possible: 1 up to one"):
        prdc(real=real, fake=normal(1, 9), k=4)
    with pytest.raises(InputError, match="4 neighbours asked for of 9 real and 4 fake"):
        prdc(real=normal(1, 9), fake=real, k=1, k_density=4)
    with pytest.raises(InputError, match="0 neighbours asked for"):
        prdc(real=real, fake=real, k=2, k_density=0)


def test_what_is_refused():
    real, fake = SETS["normal"]
    with pytest.raises(InputError, match=r"real \(150, 32\) and fake \(110, 31\)"):
        prdc(real=real, fake=fake[:, 1:])
    with pytest.raises(InputError, match=r"\(N, D\) and \(M, D\)"):
        prdc(real=real[0], fake=fake[0])
    with pytest.raises(InputError, match="fake features are int64"):
        prdc(real=real, fake=fake.astype(np.int64))
    with pytest.raises(InputError, match="dtype 'float16'"):
        prdc(real=real, fake=fake, dtype="float16")
    with pytest.raises(InputError, match="block 0"):
        prdc(real=real, fake=fake, block=0)
    for value in (np.nan, np.inf):
        broken = fake.copy()
        broken[3, 4] = value
        with pytest.raises(InputError, match="fake features have infinite or undefined"):
            prdc(real=real, fake=broken)
        with pytest.raises(InputError, match="real features have infinite or undefined"):
            prdc(real=jnp.asarray(broken), fake=fake)


# Memory and benchmark


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_at_full_size(dtype):
    """50,000 x 50,000 x 2048: what the compiled steps allocate beside the features is far from 4 GB, or from N x M."""
    n, d, k, block = 50_000, 2048, 5, 2048

    def shape(*size, dtype=np.float32):
        return jax.ShapeDtypeStruct(size, dtype)

    number, features, centre = shape(dtype=np.int32), shape(n, d), shape(d, dtype=dtype)
    found = shape(n, dtype=bool), shape(n, dtype=np.int32), shape(n, dtype=bool), shape(n)
    with jax.enable_x64(dtype == "float64"):
        steps = (
            _neighbour_step.lower(shape(n, k), features, centre, number, number, block=block),
            _compare_step.lower(
                found, 3 * (shape(n),), features, features, centre, number, number, blocks=(block, block)
            ),
        )
        for step, copies in zip(steps, (1, 2), strict=True):
            memory = step.compile().memory_analysis()
            assert memory.argument_size_in_bytes >= copies * n * d * 4  # the features are counted there
            extra = memory.temp_size_in_bytes + memory.output_size_in_bytes
            extra += memory.argument_size_in_bytes - copies * n * d * 4
            assert extra < 0.5e9


@pytest.mark.slow
def test_benchmark_in_miniature(tmp_path):
    command = [sys.executable, "benchmarks/prdc.py", "--count", "60", "--width", "40", "--repeats", "1"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == f"{result['date']}-prdc.json"
    assert result["size"] == dict(real=60, fake=60, dimensions=40, k=3)
    assert set(result["methods"]) == {"lpl_jax float64", "lpl_jax float32", "prdc"}
    assert all(method["median_seconds"] > 0 and 0 < method["recall"] < 1 for method in result["methods"].values())
    assert result["largest_difference"]["lpl_jax float64"] < 1e-12
    assert result["machine"]["cores"] >= 1 and "jax" in result["machine"]


@pytest.mark.slow
def test_as_the_prdc_package_at_length():
    """Inception's width, with near neighbours in 16 dimensions: equal numbers, in both types."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((16, 2048))
    real, fake = (
        ((s * rng.standard_normal((4000, 16)) + m) @ basis).astype(np.float32) for s, m in ((1, 0), (0.9, 0.05))
    )
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = compute_prdc(real, fake, nearest_k=3)
    assert prdc(real=real, fake=fake).means() == pytest.approx(theirs, abs=1e-12)
    assert prdc(real=real, fake=fake, dtype="float32").means() == pytest.approx(theirs, abs=3 / 4000)
