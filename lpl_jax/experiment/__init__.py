"""Every typed part of a config, and the experiment that they make together."""

from lpl_jax.experiment.build import Experiment, build, narrow_gate, resolve, to_dict
from lpl_jax.experiment.data import AutoencoderSource, DataConfig
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.experiment.loss import LossConfig
from lpl_jax.experiment.sampling import SamplingConfig
from lpl_jax.experiment.sections import config_dict, documentation, is_optional
from lpl_jax.experiment.training import CheckpointConfig, EMAConfig, OptimizerConfig, TrainConfig, ema_name

__all__ = [
    "AutoencoderSource",
    "CheckpointConfig",
    "DataConfig",
    "EMAConfig",
    "EvaluationConfig",
    "Experiment",
    "LossConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "TrainConfig",
    "build",
    "config_dict",
    "documentation",
    "ema_name",
    "is_optional",
    "narrow_gate",
    "resolve",
    "to_dict",
]
