"""Training: from a config to a run folder; the step is pure, and everything around it is here."""

from lpl_jax.training.build import Experiment, build, resolve, to_dict
from lpl_jax.training.loop import Result, train
from lpl_jax.training.optimizer import OptimizerConfig
from lpl_jax.training.state import TrainState, abstract_state, apply_gradients, create_state
from lpl_jax.training.step import Objective, losses, train_step
from lpl_jax.training.workdir import load_run

__all__ = [
    "Experiment",
    "Objective",
    "OptimizerConfig",
    "Result",
    "TrainState",
    "abstract_state",
    "apply_gradients",
    "build",
    "create_state",
    "load_run",
    "losses",
    "resolve",
    "to_dict",
    "train",
    "train_step",
]
