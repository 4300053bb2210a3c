"""Diffusion and flow matching: schedules, paradigms, time sampling, loss weights, samplers and guidance."""

from lpl_jax.diffusion.guidance import guided, rescaled_guidance
from lpl_jax.diffusion.paradigms import PARADIGMS, Paradigm, paradigm
from lpl_jax.diffusion.samplers import SAMPLERS, check_sampler, ddim_grid, flow_grid, sample
from lpl_jax.diffusion.weighting import LOSS_WEIGHTS, loss_weight

__all__ = [
    "LOSS_WEIGHTS",
    "PARADIGMS",
    "SAMPLERS",
    "Paradigm",
    "check_sampler",
    "ddim_grid",
    "flow_grid",
    "guided",
    "loss_weight",
    "paradigm",
    "rescaled_guidance",
    "sample",
]
