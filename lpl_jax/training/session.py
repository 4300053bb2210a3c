"""What stays the same while a run trains."""

import dataclasses

import optax
from jax.sharding import Mesh

from lpl_jax.data import LatentStore
from lpl_jax.experiment import Experiment
from lpl_jax.io.paths import AnyPath
from lpl_jax.training.objective import Objective
from lpl_jax.training.periodic import Evaluate


@dataclasses.dataclass(frozen=True)
class Session:
    """What stays the same from a start of a run to its end.

    resumed: whether the folder held this run before. evaluate: called every `evaluation.every` steps; None: never.
    weight: of the term, as it was taken from another run at the start; None: it was not.
    """

    experiment: Experiment
    objective: Objective
    optimizer: optax.GradientTransformation
    mesh: Mesh
    store: LatentStore
    workdir: AnyPath
    label: str
    resumed: bool
    evaluate: Evaluate | None
    weight: float | None = None
