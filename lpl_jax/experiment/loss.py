"""The diffusion loss, and how the perceptual loss enters a step."""

import dataclasses
import math
from typing import Literal

from lpl_jax.diffusion import LOSS_WEIGHTS
from lpl_jax.fields import Part, above, between, field, one_of, whole, word_or
from lpl_jax.limits import BATCH, STEP

# Share of a batch that the economical setting decodes. With five taps of Stable Diffusion's decoder a step of paper796
# then takes about 1.2 times the operations of one without LPL, at 256 and at 512 px (docs/flops.md).
ECONOMICAL_SHARE = 1 / 12


@dataclasses.dataclass(frozen=True)
class LossConfig(Part, section="loss"):
    """The diffusion loss, and how the perceptual loss enters a step."""

    weighting: str = field("none", "weight of the diffusion loss over t: none | min_snr", one_of(*LOSS_WEIGHTS))
    gamma: float = field(5.0, "min_snr: upper bound of the signal-to-noise ratio", above(0, 1e6))
    label_dropout: float = field(
        0.1, "probability of training without the class or prompt, for guidance", between(0, 1)
    )
    lpl_capacity: str | int = field(
        "auto",
        "decoded images of a batch: auto (expected + 10 %) | economical | all | a number",
        word_or(BATCH, "auto", "economical", "all"),
    )
    lpl_groups: Literal["auto"] | int = field(
        "auto",
        "they are drawn from as many equal groups of it: auto (parts on devices) | a number",
        word_or(BATCH, "auto"),
    )
    lpl_chunk: Literal["auto"] | int = field(
        "auto",
        "images that a device decodes at a time: auto (as many as fill 512 x 512 px) | a number",
        word_or(BATCH, "auto"),
    )
    stratified_t: bool = field(
        False, "spread the timesteps of each group evenly over their distribution: less noise in LPL"
    )
    calibration_batches: int = field(
        50, "batches that weights are calibrated on, when the term begins", whole(1, 10**6)
    )
    lpl_start: int = field(0, "updates before LPL, or a comparison loss, begins; steps before decode nothing", STEP)

    def groups(self, shards: int) -> int:
        """Groups that decoded images are drawn from: as given, or the parts that devices split a batch into."""
        return shards if self.lpl_groups == "auto" else self.lpl_groups

    @property
    def chunk(self) -> int | None:
        """Images that a device decodes at a time; None: by their size."""
        return None if self.lpl_chunk == "auto" else self.lpl_chunk

    def capacity(self, batch_size: int, active_fraction: float, groups: int, parts: int = 1) -> int | None:
        """Images that a step decodes, or None for all of a batch; with several parts of a batch, that one of them does.

        "auto": 1.1 times the expected number under the threshold, rounded up to equal parts of the groups.
        "economical": `ECONOMICAL_SHARE` of the batch, rounded down to equal parts, but at least one of each group.
        """
        if isinstance(self.lpl_capacity, int):
            return self.lpl_capacity // parts
        if self.lpl_capacity == "all":
            return None
        batch_size //= parts
        if self.lpl_capacity == "auto":
            wanted = math.ceil(max(1, math.ceil(1.1 * active_fraction * batch_size)) / groups)
        else:
            wanted = max(1, int(ECONOMICAL_SHARE * batch_size / groups))
        return min(batch_size, wanted * groups)
