"""Training: from an experiment to a run folder; the step is pure, and everything around it is here."""

from lpl_jax.training.ema import init_emas, update_emas
from lpl_jax.training.loop import Result, train
from lpl_jax.training.objective import ComparisonTerm, LPLTerm, Objective, ReweightingTerm, make_objective
from lpl_jax.training.optimizer import make_optimizer
from lpl_jax.training.state import Frozen, TrainState, abstract_state, apply_gradients, create_state
from lpl_jax.training.step import losses, make_step, train_step

__all__ = [
    "ComparisonTerm",
    "Frozen",
    "LPLTerm",
    "Objective",
    "Result",
    "ReweightingTerm",
    "TrainState",
    "abstract_state",
    "apply_gradients",
    "create_state",
    "init_emas",
    "losses",
    "make_objective",
    "make_optimizer",
    "make_step",
    "train",
    "train_step",
    "update_emas",
]
