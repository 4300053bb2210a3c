"""Whether what an evaluation reads is there: asked before anything is made, as an evaluation may be weeks away."""

from lpl_jax.errors import InputError
from lpl_jax.evaluation import inception_weights
from lpl_jax.evaluation.prompts import read_prompts
from lpl_jax.evaluation.reference import check_reference
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.io.hub import is_hub_id
from lpl_jax.io.paths import to_path


def check_inputs(config: EvaluationConfig, resolution: int) -> None:
    """Raises InputError for a reference, prompts or weights that are named and not there; little of them is read.

    resolution: of the images that will be evaluated.
    """
    if config.features == "inception":
        inception_weights.find_weights(config.inception)
    if config.clip is not None and not is_hub_id(config.clip) and not to_path(config.clip, "evaluation.clip").exists():
        raise InputError(f"evaluation.clip={config.clip}: no such folder, nor a hub id")
    if config.reference is not None:
        check_reference(config, resolution)
    if config.prompts is not None:
        read_prompts(config.prompts, 1)
