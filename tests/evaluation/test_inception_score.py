"""The Inception score: against its definition written out, and in the cases with a known answer."""

import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.evaluation.inception_score import inception_score


def definition(logits, bounds):
    scores = []
    for start, end in bounds:
        p = np.exp(np.float64(logits[start:end]))
        p /= p.sum(1, keepdims=True)
        divergences = [sum(row * (np.log(row) - np.log(p.mean(0)))) for row in p]
        scores.append(np.exp(sum(divergences) / len(divergences)))
    mean = sum(scores) / len(scores)
    return mean, np.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))


@pytest.mark.parametrize(
    ("count", "splits", "bounds"),
    [
        (12, 3, [(0, 4), (4, 8), (8, 12)]),
        (11, 3, [(0, 3), (3, 7), (7, 11)]),
        (7, 1, [(0, 7)]),
        (2, 2, [(0, 1), (1, 2)]),
    ],
)
def test_definition(count, splits, bounds):
    logits = np.random.default_rng(1).normal(size=(count, 9), scale=3).astype(np.float32)
    mean, std = inception_score(logits, splits)
    np.testing.assert_allclose((mean, std), definition(logits, bounds), rtol=1e-12, atol=1e-12)
    assert type(mean) is float
    assert type(std) is float


def test_uniform_predictions_score_one():
    mean, std = inception_score(np.full((40, 1008), 3.25, np.float32))
    assert mean == pytest.approx(1, abs=1e-12)
    assert std == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("height", [100.0, 1e4])  # with the second, probabilities are 0
def test_sure_and_balanced_predictions_score_the_number_of_classes(height):
    logits = np.tile(height * np.eye(8, 9, dtype=np.float32), (10, 1))  # the ninth class never occurs
    mean, std = inception_score(logits)
    assert mean == pytest.approx(8, rel=1e-12)
    assert std == pytest.approx(0, abs=1e-12)


def test_order_decides_and_nothing_is_shuffled():
    sure = 100 * np.eye(4)
    assert inception_score(np.repeat(sure, 5, axis=0), 4)[0] == pytest.approx(1)  # one class in each part
    assert inception_score(np.tile(sure, (5, 1)), 5)[0] == pytest.approx(4)


@pytest.mark.parametrize(
    ("logits", "splits", "message"),
    [
        (np.zeros((9, 4)), 10, "splits=10 for 9 images"),
        (np.zeros((9, 4)), 0, "splits=0"),
        (np.zeros(9), 3, r"shape \(9,\)"),
        (np.zeros((9, 0)), 3, r"shape \(9, 0\)"),
        (np.array([[0.0, np.nan], [0, 0]]), 1, "infinite or undefined"),
    ],
)
def test_refused(logits, splits, message):
    with pytest.raises(InputError, match=message):
        inception_score(logits, splits)
