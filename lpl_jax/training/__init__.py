"""Training: from an experiment to a run folder; the step is pure, and everything around it is here."""

from lpl_jax.training.ema import init_emas, update_emas
from lpl_jax.training.loop import Result, train
from lpl_jax.training.optimizer import make_optimizer
from lpl_jax.training.state import TrainState, abstract_state, apply_gradients, create_state
from lpl_jax.training.step import Objective, losses, train_step

__all__ = [
    "Objective",
    "Result",
    "TrainState",
    "abstract_state",
    "apply_gradients",
    "create_state",
    "init_emas",
    "losses",
    "make_optimizer",
    "train",
    "train_step",
    "update_emas",
]
