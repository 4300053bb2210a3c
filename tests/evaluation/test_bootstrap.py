"""Bootstrap: intervals against the theory of means, spreads against resampling done by hand, and what is refused."""

import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.evaluation import bootstrap
from lpl_jax.evaluation.bootstrap import bootstrap_interval, bootstrap_std, frechet_interval
from lpl_jax.evaluation.frechet import Gaussian, frechet_distance, statistics


def values(n=400):
    return 3 + 2 * np.random.default_rng(0).standard_normal(n)


@pytest.mark.parametrize("level, width", [(0.95, 1.960), (0.5, 0.6745)])
def test_interval_of_a_mean(level, width):
    """mean +- z s / sqrt(n); the quantiles of 4000 resamples are good to some percent."""
    x = values()
    low, high = bootstrap_interval(x, seed=1, resamples=4000, level=level)
    half = width * x.std() / np.sqrt(len(x))
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_interval_of_a_share():
    """Of bool values, as precision and recall are: never outside [0, 1], and no width where all agree."""
    x = np.arange(300) < 30
    low, high = bootstrap_interval(x, seed=0)
    half = 1.96 * np.sqrt(0.1 * 0.9 / 300)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.3 * half)
    assert bootstrap_interval(np.ones(10, bool), seed=0) == (1.0, 1.0)


def test_the_seed_decides():
    x = values(50)
    first = bootstrap_interval(x, seed=0)
    assert first == bootstrap_interval(x, seed=0) == bootstrap_interval(list(x), seed=0)
    assert first != bootstrap_interval(x, seed=1)


def test_std_of_any_statistic():
    x = values()
    found = bootstrap_std(lambda rows: x[rows].mean(), len(x), seed=3, resamples=1000)
    assert found == pytest.approx(x.std() / 20, rel=0.1)  # error of a deviation from 1000: 1 / sqrt(2000)
    given = iter([1.0, 2.0, 6.0])
    assert bootstrap_std(lambda rows: next(given), 30, seed=0, resamples=3) == pytest.approx(7**0.5)  # unbiased
    seen = []
    bootstrap_std(lambda rows: seen.append(rows) or 0.0, 30, seed=3, resamples=5)
    assert len(seen) == 5 and all(rows.shape == (30,) and rows.min() >= 0 and rows.max() < 30 for rows in seen)
    assert all(len(set(rows)) < 30 for rows in seen)  # with replacement
    assert bootstrap_std(lambda rows: float(len(seen)), 30, seed=0, resamples=4) == 0


@pytest.mark.parametrize("chunk", [40, 4096])
def test_frechet_interval_is_resampling_by_hand(chunk, monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6))
    features = (rng.standard_normal((150, 6)) @ mixing + 100).astype(np.float32)
    reference = statistics(rng.standard_normal((200, 6)) @ mixing + 100.5)
    found = frechet_interval(features, reference, seed=5, resamples=30)
    assert found.value == frechet_distance(statistics(features), reference)
    spread = bootstrap_std(
        lambda rows: frechet_distance(statistics(features[rows]), reference), 150, seed=5, resamples=30
    )
    assert found.high - found.value == pytest.approx(1.96 * spread, rel=1e-8)
    assert found.value - found.low == pytest.approx(1.96 * spread, rel=1e-8) and found.low > 0


def test_frechet_interval_covers_new_samples():
    """Its width is that of the distances of sets drawn anew from the same distribution."""
    rng = np.random.default_rng(1)
    reference = Gaussian(np.full(3, 0.3), np.eye(3))
    fresh = [frechet_distance(statistics(rng.standard_normal((400, 3))), reference) for _ in range(200)]
    found = frechet_interval(rng.standard_normal((400, 3)), reference, seed=0, resamples=200)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.std(fresh), rel=0.35)


def test_frechet_interval_ends_at_zero():
    features = np.random.default_rng(0).standard_normal((50, 4))
    found = frechet_interval(features, statistics(features), seed=0, resamples=5)
    assert found.low == 0 <= found.value < 1e-8 < found.high


def test_what_is_refused():
    features, reference = np.random.default_rng(0).standard_normal((5, 2)), Gaussian(np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match="1 samples and 200 resamples"):
        bootstrap_interval([1.0], seed=0)
    with pytest.raises(InputError, match="5 samples and 1 resamples"):
        bootstrap_std(len, 5, seed=0, resamples=1)
    with pytest.raises(InputError, match="5 samples and 0 resamples"):
        frechet_interval(features, reference, seed=0, resamples=0)
    with pytest.raises(InputError, match="at least 2 samples"):
        frechet_interval(features[:1], reference, seed=0)
    with pytest.raises(InputError, match="2 and 3 dimensions"):
        frechet_interval(features, Gaussian(np.zeros(3), np.eye(3)), seed=0)
    with pytest.raises(InputError, match=r"values of shape \(3, 2\)"):
        bootstrap_interval(np.zeros((3, 2)), seed=0)
    with pytest.raises(InputError, match="all finite"):
        bootstrap_interval([0.0, np.nan], seed=0)
    for level in (0, 1, 95):
        with pytest.raises(InputError, match=f"level={level} given"):
            bootstrap_interval(values(), seed=0, level=level)
