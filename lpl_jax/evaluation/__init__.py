"""Evaluation: images from checkpoints, feature networks, metrics with intervals, result cards."""

from lpl_jax.evaluation.cards import Card, Metric, compare, read_card, write_card
from lpl_jax.evaluation.frechet import frechet_distance, read_statistics, statistics, write_statistics
from lpl_jax.evaluation.inception_score import inception_score
from lpl_jax.evaluation.prdc import prdc
from lpl_jax.experiment.evaluation import EvaluationConfig

__all__ = [
    "Card",
    "EvaluationConfig",
    "Metric",
    "compare",
    "frechet_distance",
    "inception_score",
    "prdc",
    "read_card",
    "read_statistics",
    "statistics",
    "write_card",
    "write_statistics",
]
