"""Every typed part of a config, and the experiment that they make together."""

from lpl_jax.experiment.build import Experiment, build, resolve, to_dict
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.experiment.optimizer import OptimizerConfig

__all__ = ["EvaluationConfig", "Experiment", "OptimizerConfig", "build", "resolve", "to_dict"]
