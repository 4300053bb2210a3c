"""How images are generated."""

import dataclasses
from typing import Literal

from lpl_jax.diffusion import rescaled_guidance
from lpl_jax.fields import Part, at_least, field


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Part, section="sampling"):
    """How images are generated."""

    sampler: Literal["ddim", "euler", "rk4"] | None = field(
        None, "ddim (eps, v) | euler | rk4 (flow); None: ddim or euler"
    )
    steps: int = field(50, "steps of the sampler", at_least(1))
    guidance: float = field(1.5, "classifier-free guidance scale; 1: none")
    guidance_resolution: int | None = field(
        None, "image side that guidance is stated for; at s times that side it is 1 + s (guidance - 1)", at_least(1)
    )
    spacing: Literal["trailing", "leading"] = field("trailing", "timesteps of ddim: trailing | leading")
    per_class: int = field(4, "images of each class in a grid", at_least(1))
    weights: str | None = field(None, "params or the name of an average; None: the first average")

    def guidance_at(self, resolution: int) -> float:
        """The guidance scale for images of this side."""
        if self.guidance_resolution is None:
            return self.guidance
        return rescaled_guidance(self.guidance, resolution / self.guidance_resolution)
