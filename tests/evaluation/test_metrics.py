"""From features to numbers: known answers, intervals, and what is left out with a reason."""

import dataclasses

import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.evaluation.extract import Features
from lpl_jax.evaluation.frechet import statistics
from lpl_jax.evaluation.metrics import prdc_rows, score
from lpl_jax.evaluation.prdc import prdc
from lpl_jax.evaluation.reference import Reference
from lpl_jax.evaluation.spectrum import SpectrumSum
from lpl_jax.experiment.evaluation import EvaluationConfig

RNG = np.random.default_rng(0)
COUNT, WIDTH = 200, 8


def features(shift=0.0, seed=1, spectrum=True):
    rng = np.random.default_rng(seed)
    arrays = {
        "pool": (rng.standard_normal((COUNT, WIDTH)) + shift).astype(np.float32),
        "spatial": rng.standard_normal((COUNT, 5)).astype(np.float32),
        "logits": rng.standard_normal((COUNT, 4)).astype(np.float32),
    }
    images = rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    return Features(arrays, SpectrumSum.of_images(images) if spectrum else None)


def reference_of(found):
    kinds = {kind: statistics(found.arrays[kind]) for kind in ("pool", "spatial")}
    return Reference(found, kinds, {})


CONFIG = EvaluationConfig(splits=2, resamples=5)


def test_identical_sets():
    found = features()
    metrics, absent = score(found, reference_of(found), CONFIG)
    assert metrics["fid"].value == pytest.approx(0, abs=1e-6)
    assert metrics["sfid"].value == pytest.approx(0, abs=1e-6)
    assert [metrics[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert [metrics[f"spectrum_{band}"].value for band in ("low", "middle", "high")] == [0, 0, 0]
    assert set(absent) == {"clip_score"}


def test_a_shift_is_the_fid_and_intervals_hold_the_value():
    real, fake = features(), features(shift=2.0)
    metrics, _ = score(fake, reference_of(real), CONFIG, clip_scores=np.array([20.0, 30.0, 25.0, 25.0]))
    assert metrics["fid"].value == pytest.approx(4 * WIDTH, rel=1e-5)  # the same draws, moved: covariances are equal
    assert metrics["sfid"].value == pytest.approx(0, abs=1e-6)
    assert metrics["precision"].value < 0.6
    assert metrics["clip_score"].value == 25
    for name, found in metrics.items():
        assert found.low <= found.value <= found.high, name
    assert metrics["fid"].low > 2 * WIDTH


def test_no_intervals_where_none_are_wanted():
    found = features()
    metrics, _ = score(found, reference_of(found), EvaluationConfig(splits=2, resamples=0))
    assert all(metric.low is None and metric.high is None for metric in metrics.values())


def test_the_classifier_gives_no_fid():
    found = features()
    del found.arrays["spatial"]
    reference = Reference(found, {"pool": statistics(found.arrays["pool"])}, {})
    metrics, _ = score(found, reference, EvaluationConfig(features="classifier", resamples=0))
    assert "cfd" in metrics
    assert not {"fid", "sfid", "inception_score"} & set(metrics)


def test_a_reference_of_statistics_alone():
    found = features()
    reference = Reference(None, {"pool": statistics(found.arrays["pool"])}, {})
    metrics, absent = score(found, reference, CONFIG)
    assert set(metrics) == {"fid", "inception_score"}
    assert "no statistics of spatial features" in absent["sfid"]
    for name in ("precision", "recall", "density", "coverage", "spectrum_low", "spectrum_high"):
        assert "without images" in absent[name]


def test_spectra_need_square_images_of_one_size():
    real = features()
    _, absent = score(features(spectrum=False), reference_of(real), CONFIG)
    assert absent["spectrum_low"] == "images are not square"
    other = Features(real.arrays, SpectrumSum.of_images(RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)))
    _, absent = score(other, reference_of(real), CONFIG)
    assert absent["spectrum_high"] == "images have 32 pixels, those of the reference 16"


def test_what_too_few_images_do_not_allow_is_left_out_with_the_reason():
    found = features()
    metrics, absent = score(found, reference_of(found), EvaluationConfig(splits=500, k=3, k_density=200, resamples=0))
    assert absent["inception_score"] == "evaluation.splits=500 parts of 200 images"
    assert absent["coverage"] == absent["precision"] == "evaluation.k=200 neighbours in a set of 200 images"
    assert {"fid", "sfid", "spectrum_low"} <= set(metrics)


def test_prdc_takes_a_subset_of_a_larger_reference():
    """Drawn with the seed, and not of the distances, which take all."""
    real, fake = features(), features(seed=2)
    config = EvaluationConfig(splits=2, resamples=0, prdc_references=50)
    rows = prdc_rows(COUNT, config)
    assert len(set(rows)) == 50 and np.array_equal(rows, prdc_rows(COUNT, config))
    assert not np.array_equal(rows, prdc_rows(COUNT, dataclasses.replace(config, seed=1)))
    assert prdc_rows(50, config) is None and prdc_rows(COUNT, dataclasses.replace(config, prdc_references=None)) is None
    metrics, _ = score(fake, reference_of(real), config)
    whole, _ = score(fake, reference_of(real), CONFIG)
    expected = prdc(real=real.arrays["pool"][rows], fake=fake.arrays["pool"]).means()
    assert {name: metrics[name].value for name in expected} == pytest.approx(expected)
    assert metrics["fid"].value == whole["fid"].value and metrics["recall"] != whole["recall"]
    _, absent = score(fake, reference_of(real), dataclasses.replace(config, prdc_references=3))
    assert absent["recall"] == "evaluation.k=3 neighbours in a set of 3 images"


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(features="vgg"), "features='vgg'.*inception, classifier"),
        (dict(num_images=0), "num_images=0.*auto, or 2 to 10,000,000"),
        (dict(num_images="all"), "num_images='all'.*auto, or 2 to 10,000,000"),
        (dict(k=1.5), "k=1.5"),
        (dict(resamples=1), "resamples=1.*2 or more give intervals, 0 gives none"),
        (dict(every=0), "every=0"),
    ],
)
def test_configs_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**fields)


@pytest.mark.parametrize("given, missing", [("clip", "prompts"), ("prompts", "clip")])
def test_clip_score_of_images_without_prompts_of_their_own_needs_both(given, missing):
    with pytest.raises(InputError, match=f"{given} is given without evaluation.{missing}"):
        EvaluationConfig(**{given: "a"}).check_clip_score()
