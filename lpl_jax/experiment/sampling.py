"""How images are generated."""

import dataclasses
from typing import Literal

from lpl_jax.diffusion import Paradigm, check_sampler, rescaled_guidance
from lpl_jax.errors import InputError
from lpl_jax.fields import Part, field
from lpl_jax.limits import COUNT, GUIDANCE, SAMPLER_STEPS, SIDE


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Part, section="sampling"):
    """How images are generated."""

    sampler: Literal["ddim", "euler", "rk4"] | None = field(
        None, "ddim (eps, v) | euler | rk4 (flow); None: ddim or euler"
    )
    steps: int = field(50, "steps of the sampler", SAMPLER_STEPS)
    guidance: float = field(1.5, "classifier-free guidance scale; 1: none", GUIDANCE)
    guidance_resolution: int | None = field(
        None, "image side that guidance is stated for; at s times that side it is 1 + s (guidance - 1)", SIDE
    )
    spacing: Literal["trailing", "leading"] = field("trailing", "timesteps of ddim: trailing | leading")
    per_class: int = field(4, "images of each class in a grid", COUNT)
    weights: str | None = field(None, "params or the name of an average; None: the first average")

    def check_for(self, paradigm: Paradigm) -> None:
        """Raises InputError for a sampler, a number of steps, or a spacing, that the paradigm does not have."""
        if self.sampler is not None and self.sampler not in paradigm.samplers:
            possible = ", ".join(paradigm.samplers)
            raise InputError(f"sampling.sampler={self.sampler!r} with paradigm {paradigm.name!r}; possible: {possible}")
        try:
            check_sampler(paradigm, self.sampler or paradigm.samplers[0], self.steps, self.spacing)
        except InputError as error:
            raise InputError(f"sampling: {error}") from None

    def guidance_at(self, resolution: int) -> float:
        """The guidance scale for images of this side."""
        if self.guidance_resolution is None:
            return self.guidance
        return rescaled_guidance(self.guidance, resolution / self.guidance_resolution)
