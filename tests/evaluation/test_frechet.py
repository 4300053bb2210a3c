"""Fréchet distance against closed forms and scipy's matrix square root; streaming statistics; statistics files."""

import io
import zipfile

import numpy as np
import pytest
from scipy.linalg import sqrtm

from lpl_jax.errors import InputError
from lpl_jax.evaluation.frechet import (
    Gaussian,
    Statistics,
    frechet_distance,
    merge,
    psd_root,
    read_statistics,
    statistics,
    write_statistics,
)

D = 24


def draw(seed, n, d=D, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def gaussian(seed, decay=0.0):
    """A covariance with known eigenvectors, and eigenvalues from 1 down to exp(-decay)."""
    rng = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return Gaussian(rng.standard_normal(D), (vectors * np.exp(-decay * np.linspace(0, 1, D))) @ vectors.T)


# Statistics


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_statistics_are_those_of_numpy(chunk):
    features = draw(0, 100)
    stats = statistics(features, chunk=chunk)
    assert stats.count == 100 and stats.mean.dtype == stats.scatter.dtype == np.float64
    np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(features.T), rtol=1e-12, atol=1e-12 * features.var())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_are_in_float64(dtype):
    """Values near 1000 with a spread of some units: float32 sums of squares would lose the covariance."""
    features = (1000 + 4 * np.random.default_rng(0).standard_normal((3000, 5))).astype(dtype)
    exact = features.astype(np.float64)
    stats = statistics(features, chunk=64)
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.covariance, np.cov(exact.T), rtol=1e-10, atol=1e-10)


def test_parts_merge_in_any_order():
    features = draw(1, 90) + 1e3
    a, b, c = (statistics(part) for part in np.split(features, [1, 30]))  # a part may be a single sample
    for whole in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        assert whole.count == 90
        np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-13)
        np.testing.assert_allclose(whole.covariance, np.cov(features.T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (3, 0), (2, 2, 2)])
def test_features_need_rows_and_columns(shape):
    with pytest.raises(InputError, match=r"possible: \(samples, dimensions\)"):
        statistics(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_must_be_finite(value):
    features = draw(2, 10)
    features[7, 3] = value
    with pytest.raises(InputError, match="infinite or undefined"):
        statistics(features, chunk=4)


def test_what_has_no_distance():
    one = statistics(np.zeros((1, 3)))
    with pytest.raises(InputError, match="at least 2 samples, 1 given"):
        frechet_distance(one, statistics(draw(0, 9, 3)))
    with pytest.raises(InputError, match="3 and 4 dimensions"):
        frechet_distance(statistics(draw(0, 9, 3)), statistics(draw(0, 9, 4)))
    with pytest.raises(InputError, match="3 and 4 dimensions"):
        merge(one, statistics(np.zeros((1, 4))))


# Distance: closed forms


def test_shift_is_the_squared_length():
    a = gaussian(0, decay=10)
    delta = np.linspace(-1, 2, D)
    b = Gaussian(a.mean + delta, a.covariance)
    assert frechet_distance(a, b) == pytest.approx(delta @ delta, rel=1e-10)


@pytest.mark.parametrize("s", [1e-12, 1e-3, 0.5, 1.0, 3.0, 1e12])
def test_isotropic_scale(s):
    """D (s1 - s2)^2, for standard deviations 1 and s; equal ones differ by rounding alone."""
    zero = np.zeros(D)
    found = frechet_distance(Gaussian(zero, np.eye(D)), Gaussian(zero, s**2 * np.eye(D)))
    assert found == pytest.approx(D * (1 - s) ** 2, rel=1e-12, abs=1e-12)


def test_diagonal_covariances():
    rng = np.random.default_rng(0)
    s, t = np.exp(3 * rng.standard_normal((2, D)))
    zero = np.zeros(D)
    found = frechet_distance(Gaussian(zero, np.diag(s**2)), Gaussian(zero, np.diag(t**2)))
    assert found == pytest.approx(((s - t) ** 2).sum(), rel=1e-10)


def test_opposite_point_masses_and_lines():
    """Constant features: the distance of the points. A line against a line across it: the sum of both variances."""
    a, b = statistics(np.zeros((5, 3))), statistics(np.ones((5, 3)))
    assert frechet_distance(a, b) == 3.0
    t = np.array([-1.0, 0, 1])[:, None]
    x, y = statistics(t * [1, 0, 0]), statistics(t * [0, 2, 0])
    assert frechet_distance(x, y) == pytest.approx(1 + 4, rel=1e-12)
    assert frechet_distance(x, statistics(t * [3, 0, 0])) == pytest.approx((1 - 3) ** 2, rel=1e-12)


@pytest.mark.parametrize("n", [2, 5, D - 1, D, 500])
def test_a_set_has_no_distance_to_itself(n):
    features = draw(3, n)
    stats = statistics(features)
    same = statistics(features[::-1], chunk=3)
    # 2 tr(S) cancels, so what is left is its rounding, or that of sqrt(eps) where directions have no variance
    assert 0 <= frechet_distance(stats, stats) < 1e-7 * np.trace(stats.covariance)
    assert 0 <= frechet_distance(stats, same) < 1e-7 * np.trace(stats.covariance)


# Distance: against scipy and across arguments


def by_sqrtm(a, b):
    delta = a.mean - b.mean
    root = sqrtm(a.covariance @ b.covariance)
    return delta @ delta + np.trace(a.covariance + b.covariance - 2 * np.real(root))


@pytest.mark.parametrize("decay", [0, 3, 8])
def test_as_scipys_where_that_is_stable(decay):
    a, b = gaussian(4, decay), gaussian(5, decay)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)


def test_as_scipys_on_samples():
    a, b = statistics(draw(6, 300)), statistics(draw(7, 200))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)


@pytest.mark.parametrize("n, m", [(2, 2), (2, 300), (10, 6), (10, 300), (D, D)])
def test_fewer_samples_than_dimensions(n, m):
    """The nuclear norm of the product of the centred samples is the trace of the root, without any covariance."""
    x, y = draw(8, n), draw(9, m)
    a, b = statistics(x), statistics(y)
    found = frechet_distance(a, b)
    overlap = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / np.sqrt((n - 1) * (m - 1))
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    assert found == pytest.approx(expected, rel=1e-7)
    assert found == pytest.approx(frechet_distance(b, a), rel=1e-7)


@pytest.mark.parametrize("n", [2, 5, D, 500])
def test_a_root_has_the_rank_of_the_samples(n):
    covariance = statistics(draw(13, n)).covariance
    root = psd_root(covariance)
    assert root.shape == (D, min(n - 1, D))
    np.testing.assert_allclose(root @ root.T, covariance, rtol=0, atol=1e-12 * np.trace(covariance))


@pytest.mark.parametrize("s, t", [(1e-12, 1e12), (1e12, 1e12), (1e-12, 1e-12), (1e-12, 1.0)])
@pytest.mark.parametrize("n", [10, 100])
def test_scales_and_symmetry(s, t, n):
    """Scaling both sets scales the distance by the square; swapping them changes nothing."""
    x, y = draw(10, n), draw(11, n)
    a, b = statistics(s * x), statistics(t * y)
    found = frechet_distance(a, b)
    assert np.isfinite(found) and found > 0
    assert found == pytest.approx(frechet_distance(b, a), rel=1e-7)
    unit = frechet_distance(statistics(s / t * x), statistics(y))
    assert found == pytest.approx(t**2 * unit, rel=1e-7)


def test_variances_that_span_all_of_float64():
    """The large directions fix the distance; the small ones, beyond rounding, must not make it undefined."""
    scales = np.logspace(-12, 12, D)
    rng = np.random.default_rng(12)
    a, b = (statistics(rng.standard_normal((n, D)) * scales) for n in (50, 60))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)
    assert 0 < frechet_distance(a, b) < np.trace(a.covariance + b.covariance) + ((a.mean - b.mean) ** 2).sum()


# Files


@pytest.fixture
def file(tmp_path):
    def write(**arrays):
        path = tmp_path / "statistics.npz"
        np.savez(path, **arrays)
        return path

    return write


def test_written_statistics_come_back(tmp_path):
    path = tmp_path / "stats.npz"
    pool, spatial = statistics(draw(0, 50)), statistics(draw(1, 50, 7))
    write_statistics(path, pool, spatial)
    for kind, stats in (("pool", pool), ("spatial", spatial)):
        back = read_statistics(path, kind)
        assert back.count == 50
        np.testing.assert_array_equal(back.mean, stats.mean)
        np.testing.assert_array_equal(back.covariance, stats.covariance)
        assert frechet_distance(back, stats) < 1e-12 * np.trace(stats.covariance)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.npz"]


def test_written_files_are_those_of_the_others(tmp_path):
    """What pytorch-fid and guided-diffusion's evaluator look up: mu, sigma, mu_s, sigma_s."""
    pool, spatial = statistics(draw(0, 50)), statistics(draw(1, 50, 7))
    write_statistics(tmp_path / "both.npz", pool, spatial)
    write_statistics(tmp_path / "pool.npz", pool)
    write_statistics(tmp_path / "unknown.npz", Gaussian(pool.mean, pool.covariance))
    with np.load(tmp_path / "both.npz") as content:
        assert set(content) == {"mu", "sigma", "mu_s", "sigma_s", "num_images", "checksum"}
        np.testing.assert_allclose(content["mu"], draw(0, 50).mean(0), rtol=1e-12)
        np.testing.assert_allclose(content["sigma_s"], np.cov(draw(1, 50, 7).T), rtol=1e-9, atol=1e-12)
    with np.load(tmp_path / "pool.npz") as content:
        assert set(content) == {"mu", "sigma", "num_images", "checksum"}
    assert read_statistics(tmp_path / "unknown.npz").count is None


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    write_statistics(path, statistics(draw(0, 50)))
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        write_statistics(path, statistics(draw(1, 50)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_others(tmp_path, dtype, save):
    """ADM's have the images too (arr_0), which may be a pickle for all that is read of it."""
    stats = statistics(draw(0, 50))
    arrays = dict(mu=stats.mean.astype(dtype), sigma=stats.covariance.astype(dtype))
    images = np.array([print], dtype=object)
    save(tmp_path / "adm.npz", arr_0=images, mu_s=arrays["mu"][:3], sigma_s=arrays["sigma"][:3, :3], **arrays)
    back = read_statistics(tmp_path / "adm.npz")
    assert back.count is None and back.mean.dtype == back.covariance.dtype == np.float64
    tolerance = 2 * np.finfo(dtype).eps
    np.testing.assert_allclose(back.mean, stats.mean, rtol=tolerance)
    np.testing.assert_allclose(back.covariance, stats.covariance, rtol=tolerance)
    assert read_statistics(tmp_path / "adm.npz", "spatial").mean.shape == (3,)


def test_rounding_is_not_asymmetry(file):
    sigma = np.array([[2.0, 1.0], [1.0 + 1e-7, 2.0]])
    found = read_statistics(file(mu=np.zeros(2), sigma=sigma)).covariance
    np.testing.assert_array_equal(found, found.T)


EYE = np.eye(3)
BROKEN = {
    "no sigma": (dict(mu=np.zeros(3)), "lacks sigma .* it has mu"),
    "images only": (dict(arr_0=np.zeros(3)), "lacks mu and sigma .* it has arr_0"),
    "matrix as mean": (dict(mu=EYE, sigma=EYE), r"mu is float64 \(3, 3\)"),
    "another size": (dict(mu=np.zeros(4), sigma=EYE), r"mu has shape \(4,\) and sigma \(3, 3\)"),
    "not square": (dict(mu=np.zeros(3), sigma=EYE[:2]), r"mu has shape \(3,\) and sigma \(2, 3\)"),
    "empty": (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"mu is float64 \(0,\)"),
    "complex": (dict(mu=np.zeros(3), sigma=EYE * 1j), "sigma: an array of complex128, not of numbers"),
    "text": (dict(mu=np.array(["a", "b", "c"]), sigma=EYE), "mu: an array of <U1, not of numbers"),
    "pickle": (dict(mu=np.zeros(3), sigma=np.array([[print]], object)), "sigma: an array of object, not of numbers"),
    "undefined": (dict(mu=np.zeros(3), sigma=np.nan * EYE), "sigma has infinite or undefined"),
    "infinite": (dict(mu=np.array([0, np.inf, 0]), sigma=EYE), "mu has infinite or undefined"),
    "asymmetric": (dict(mu=np.zeros(3), sigma=EYE + np.eye(3, k=1)), "sigma is not symmetric"),
    "negative": (dict(mu=np.zeros(3), sigma=-EYE), "sigma has negative variances"),
    "count": (dict(mu=np.zeros(3), sigma=EYE, num_images=np.zeros(2)), r"num_images is float64 \(2,\)"),
    "half an image": (
        dict(mu=np.zeros(3), sigma=EYE, num_images=np.float64(2.5)),
        "num_images is 2.5; possible",
    ),
    "one image": (dict(mu=np.zeros(3), sigma=EYE, num_images=np.int64(1)), "num_images is 1.0; possible"),
    "correlations": (dict(mu=np.zeros(3), sigma=2 - EYE), "sigma has correlations above 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_hold_no_statistics(file, case):
    arrays, message = BROKEN[case]
    path = file(**arrays)
    with pytest.raises(InputError, match=message) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value)


def test_spatial_statistics_are_asked_for_by_name(file):
    path = file(mu=np.zeros(3), sigma=EYE)
    with pytest.raises(InputError, match="lacks mu_s and sigma_s .spatial statistics."):
        read_statistics(path, "spatial")
    with pytest.raises(InputError, match="'sfid' asked for, possible: pool, spatial"):
        read_statistics(path, "sfid")


def test_damaged_files(tmp_path):
    write_statistics(tmp_path / "whole.npz", statistics(draw(0, 50)))
    whole = (tmp_path / "whole.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # among the values, which the archive's checksum covers
    damaged = {"empty": b"", "text": b"mu sigma", "half": whole[: len(whole) // 2], "flipped": bytes(flipped)}
    buffer = io.BytesIO()
    np.save(buffer, EYE)
    damaged["one array"] = buffer.getvalue()
    for name, content in damaged.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.npz cannot be read as a file of arrays"):
            read_statistics(path)
    for path in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(InputError, match="cannot be read as a file of arrays"):
            read_statistics(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_checksums_are_compared(tmp_path, save):
    path = tmp_path / "statistics.npz"
    save(path, mu=np.zeros(3), sigma=EYE)
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo("sigma.npy").CRC.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(checksum, b"1234"))
    with pytest.raises(InputError, match="Bad CRC-32"):
        read_statistics(path)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    """Headers that promise terabytes are refused before anything is allocated; so are headers that are no literal."""

    def header(text):
        body = text.encode().ljust(118 - 10) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body

    huge = header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}")
    code = header("{'descr': '<f8', 'fortran_order': False, 'shape': (__import__('os').getpid(),)}")
    for content, message in (
        (huge, "of float64 has 8,000,000,000,000 bytes"),
        (code, "cannot be read"),
        (b"", "cannot be"),
    ):
        path = tmp_path / "hostile.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", content)
            archive.writestr("sigma.npy", content)
        with pytest.raises(InputError, match=message):
            read_statistics(path)


def test_frozen():
    stats = Statistics(2, np.zeros(1), np.zeros((1, 1)))
    with pytest.raises(AttributeError):
        stats.count = 3


@pytest.mark.slow
def test_full_size():
    """2048 dimensions, the second set with fewer samples than that."""
    rng = np.random.default_rng(0)
    spread = np.exp(-np.arange(2048) / 300)
    x, y = (rng.standard_normal((n, 2048)) * spread for n in (4000, 500))
    a, b = statistics(x), statistics(y)
    overlap = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / np.sqrt(3999 * 499)
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
