"""From features of two sets of images to the numbers of a result card, with intervals."""

from collections.abc import Callable

import numpy as np

from lpl_jax import parallel
from lpl_jax.evaluation.bootstrap import bootstrap_interval, bootstrap_std, frechet_interval
from lpl_jax.evaluation.cards import Metric
from lpl_jax.evaluation.extract import Features
from lpl_jax.evaluation.frechet import frechet_distance, statistics
from lpl_jax.evaluation.inception_score import inception_score
from lpl_jax.evaluation.prdc import prdc
from lpl_jax.evaluation.reference import Reference
from lpl_jax.evaluation.spectrum import band_errors, band_means, profile_error
from lpl_jax.experiment.evaluation import EvaluationConfig

DISTANCES = {"inception": {"fid": "pool", "sfid": "spatial"}, "classifier": {"cfd": "pool"}}
PRDC_NAMES = ("precision", "recall", "density", "coverage")
FROM_STATISTICS = "the reference is a file of statistics, without images"


def score(
    generated: Features, reference: Reference, config: EvaluationConfig, clip_scores: np.ndarray | None = None
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics by name, and for each one that is not computed the reason.

    Args:
      clip_scores: (N,) of the generated images and their prompts.
    """
    metrics, absent = {}, {}
    for name, kind in DISTANCES[config.features].items():
        if kind in reference.statistics:
            metrics[name] = _distance(generated.arrays[kind], reference.statistics[kind], config)
        else:
            absent[name] = "the reference file has no statistics of spatial features"
    if config.features == "inception" and len(generated) < config.splits:
        absent["inception_score"] = f"evaluation.splits={config.splits} parts of {len(generated)} images"
    elif config.features == "inception":
        metrics["inception_score"] = _inception_score(generated.arrays["logits"], config)
    neighbours, smaller = max(config.k, config.k_density or 0), len(generated)
    if reference.features is None:
        absent |= dict.fromkeys(PRDC_NAMES, FROM_STATISTICS)
    elif neighbours >= (smaller := min(smaller, len(reference.features), config.prdc_references or smaller)):
        reason = f"evaluation.k={neighbours} neighbours in a set of {smaller} images"
        absent |= dict.fromkeys(PRDC_NAMES, reason)
    else:
        metrics |= _prdc(generated, reference.features, config)
    spectra, missing = _spectra(generated, reference, config)
    metrics |= spectra
    absent |= missing
    if clip_scores is None:
        absent["clip_score"] = "no prompts and CLIP weights were given (evaluation.prompts, evaluation.clip)"
    else:
        metrics["clip_score"] = _mean(clip_scores, config)
    return metrics, absent


def prdc_rows(count: int, config: EvaluationConfig) -> np.ndarray | None:
    """Which of `count` reference images PRDC takes, ascending, drawn with the seed; None: all.

    All pairs of references are compared for their radii: 1.28 million of them would be 660 times the work of 50,000.
    """
    if config.prdc_references is None or count <= config.prdc_references:
        return None
    return np.sort(np.random.default_rng(config.seed).permutation(count)[: config.prdc_references])


def _mean(values: np.ndarray, config: EvaluationConfig) -> Metric:
    """Mean of per-image values, with the percentile interval of the bootstrap."""
    value = float(np.mean(values, dtype=np.float64))
    if not config.resamples:
        return Metric(value)
    # These resamples cost nothing: enough of them for the percentiles.
    return Metric(value, *map(float, bootstrap_interval(values, seed=config.seed, resamples=1000)))


def _around(value: float, statistic: Callable[[np.ndarray], float], count: int, config: EvaluationConfig) -> Metric:
    """A statistic, never negative, that resampling biases: the interval is centred on the estimate, of the spread."""
    if not config.resamples:
        return Metric(value)
    spread = bootstrap_std(statistic, count, seed=config.seed, resamples=config.resamples)
    return Metric(value, float(max(0.0, value - 1.96 * spread)), float(value + 1.96 * spread))


def _distance(features, reference, config) -> Metric:
    if not config.resamples:
        return Metric(frechet_distance(statistics(features), reference))
    return Metric(*map(float, frechet_interval(features, reference, seed=config.seed, resamples=config.resamples)))


def _inception_score(logits, config) -> Metric:
    mean, _ = inception_score(logits, config.splits)
    return _around(mean, lambda rows: inception_score(logits[rows], config.splits)[0], len(logits), config)


def _prdc(generated: Features, reference: Features, config) -> dict[str, Metric]:
    with parallel.no_mesh():
        real, fake = reference.arrays["pool"], generated.arrays["pool"]
        if (rows := prdc_rows(len(reference), config)) is not None:
            real = real[rows]
        found = prdc(real=real, fake=fake, k=config.k, k_density=config.k_density)
    return {name: _mean(np.asarray(getattr(found, name), np.float64), config) for name in PRDC_NAMES}


def _spectra(generated: Features, reference: Reference, config) -> tuple[dict[str, Metric], dict[str, str]]:
    names = [f"spectrum_{band}" for band in ("low", "middle", "high")]
    theirs = reference.features.spectrum if reference.features else None
    if theirs is None or generated.spectrum is None:
        return {}, dict.fromkeys(names, FROM_STATISTICS if reference.features is None else "images are not square")
    ours = generated.spectrum
    if ours.resolution != theirs.resolution:
        reason = f"images have {ours.resolution} pixels, those of the reference {theirs.resolution}"
        return {}, dict.fromkeys(names, reason)

    def errors(rows):
        profile = ours.profiles[rows].mean(axis=0, dtype=np.float64)
        return band_means(profile_error(profile, theirs.profile), ours.resolution)

    return {
        f"spectrum_{band}": _around(value, lambda rows, band=band: float(errors(rows)[band]), ours.count, config)
        for band, value in band_errors(ours, theirs).items()
    }, {}
