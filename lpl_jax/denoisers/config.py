"""The denoiser's configuration and its presets."""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

import jax
from typing_extensions import override

from lpl_jax.denoisers.attention import IMPLEMENTATIONS
from lpl_jax.errors import InputError, nearest
from lpl_jax.fields import Part, check_names, field, one_of, whole
from lpl_jax.limits import DEPTH, PARAMETERS

# What the forward pass of a block keeps for the backward pass; "none" keeps everything.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products of activations with weights are kept; attention logits, which have batch axes, are not.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

WIDTH = whole(1, 2**16)
WIDTH_OR_NONE = whole(0, 2**16)
SIDE = whole(1, 4096)  # of a grid of patches


@dataclass(frozen=True)
class MMDiTConfig(Part, section="model"):
    """Shape and options of an `MMDiT`. The defaults of the sharing options give the block of Stable Diffusion 3.

    The condition is either a class label (`num_classes` > 0: one context token from a table of `num_classes` + 1 rows,
    the last one meaning "no class") or text (`context_dim` > 0: one context token per text token).

    Raises InputError for a field that cannot be used.
    """

    hidden: int = field(MISSING, "width of the streams", WIDTH)
    depth: int = field(MISSING, "number of blocks, the pre-only one included", DEPTH)
    heads: int = field(MISSING, "attention heads; hidden / heads is the head size", WIDTH)
    latent_channels: int = field(4, "channels of the latents, in and out", WIDTH, derived="the autoencoder")
    patch_size: int = field(2, "side of a patch, latent pixels", whole(1, 64))
    mlp_ratio: int = field(4, "hidden width of the MLPs, in units of the width", whole(1, 64))
    num_classes: int = field(0, 'rows of the class table (one more stands for "no class"); 0: text', whole(0, 10**6))
    context_dim: int = field(0, "width of the text tokens; 0: class labels", WIDTH_OR_NONE, derived="the text tower")
    pooled_dim: int = field(
        0,
        "width of a pooled text vector, added to the time embedding; 0: none",
        WIDTH_OR_NONE,
        derived="the text tower",
    )
    control: bool = field(False, "condition on original size and crop of each image, by two MLPs")
    context_attn: Literal["own", "shared"] = field(
        "own", "attention projections of the context stream: own | shared with the image stream"
    )
    context_mlp: Literal["own", "shared", "none"] = field("own", "MLP of the context stream: own | shared | none")
    modulation: Literal["per_block", "single"] = field(
        "per_block", "a Linear per block | single: one for all blocks and a table per block (adaLN-single)"
    )
    context_modulation_chunks: int = field(
        6, "6 (own) | 3 (own, without MLP) | 0 (those of the image stream)", one_of(0, 3, 6)
    )
    context_pre_only: bool = field(
        True, "the last block's context only feeds the attention (it has no output to anything)"
    )
    qk_norm: bool = field(True, "RMS-normalise queries and keys (Stable Diffusion 3.0 medium does not)")
    dual_attention: int = field(
        0, "number of first blocks with a second attention, among image tokens (SD 3.5 medium)", whole(0, 1000)
    )
    base_grid: int = field(16, "patches per side at the base resolution: range of the position coordinates", SIDE)
    position_table: int = field(
        0,
        "side of a table of positions, part of the parameters, of which a grid takes the centre; 0: positions are "
        "computed, and every grid spans the range of the base grid",
        whole(0, 4096),
    )
    attention: str = field("xla", "implementation of softmax attention", one_of(*IMPLEMENTATIONS))
    remat: str = field(
        "none",
        "what the backward pass recomputes: none | full (all of a block) | dots (all but its matrix products)",
        one_of("none", *REMAT_POLICIES),
    )
    dtype: Literal["float32", "bfloat16"] = field(
        "float32", "of matrix products and of the token streams; parameters are always float32"
    )

    @override
    def check(self) -> None:
        # Of the image stream's blocks alone: four matrices of the attention, and those of the MLP.
        least = self.depth * (4 + 2 * self.mlp_ratio) * self.hidden**2
        if least > PARAMETERS:
            raise InputError(
                f"model.hidden={self.hidden} and model.depth={self.depth} make {least:.1e} parameters or more; "
                f"possible are up to {PARAMETERS:.0e}"
            )
        self._require(self.hidden % self.heads == 0, "heads", f"a divisor of hidden={self.hidden}")
        self._require(self.hidden % 4 == 0, "hidden", "a multiple of 4 (sine and cosine of two coordinates)")
        if (self.num_classes > 0) == (self.context_dim > 0):
            raise InputError(
                f"model.num_classes={self.num_classes} and model.context_dim={self.context_dim} are not possible: "
                "exactly one must be above 0 (class labels or text)"
            )
        chunks = (0, 3) if self.context_mlp == "none" else (0, 6)
        self._require(
            self.context_modulation_chunks in chunks,
            "context_modulation_chunks",
            f"{chunks[1]} (its own) or 0 (those of the image stream) with context_mlp={self.context_mlp!r}",
        )
        most = self.depth if self.modulation == "per_block" else 0
        self._require(
            self.dual_attention <= most,
            "dual_attention",
            f"0 to {most} with depth={self.depth} and modulation={self.modulation!r}",
        )

    def _require(self, holds: bool, name: str, possible: str) -> None:
        if not holds:
            raise InputError(f"model.{name}={getattr(self, name)!r} is not possible: it must be {possible}")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden // self.heads

    @property
    def stacks(self) -> dict[str, range]:
        """Equal blocks, which are stacked in one module: its name and the places of its blocks in the network.

        The pre-only block is the module `last_block`, by itself.
        """
        stacked = self.depth - self.context_pre_only
        dual = min(self.dual_attention, stacked)
        groups = {"dual_blocks": range(dual), "blocks": range(dual, stacked)}
        return {name: places for name, places in groups.items() if places}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (rows, columns) of a latent of `height` x `width`.

        Raises InputError if patches do not tile it, or are more than the position table has.
        """
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"latents of {height} x {width} given, possible are multiples of patch_size = {self.patch_size}"
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        if self.position_table and max(rows, columns) > self.position_table:
            raise InputError(
                f"latents of {rows} x {columns} patches given, possible is up to position_table = "
                f"{self.position_table} on each side"
            )
        return rows, columns


# The context stream runs through the image stream's attention projections with its own shift, scale and gate; no MLP.
# All blocks are alike, so the last one's context gate is a parameter without effect.
_LIGHT_CONTEXT: dict[str, Any] = dict(
    context_attn="shared", context_mlp="none", context_modulation_chunks=3, context_pre_only=False, num_classes=1000
)

PRESETS = {
    # For tests, 0.4M: the block of Stable Diffusion 3.
    "tiny": MMDiTConfig(hidden=64, depth=3, heads=4, num_classes=10),
    # For runs on a CPU, 8.8M: paper796 in small.
    "small": MMDiTConfig(hidden=256, depth=6, heads=4, **_LIGHT_CONTEXT),
    # The paper prints "28 blocks, hidden 1536, 796M parameters", which no MMDiT can be. This is the design whose size
    # (786M, 792M with control and a pooled text vector) and FLOPs agree with its tables: a reconstruction.
    "paper796": MMDiTConfig(hidden=1152, depth=28, heads=16, **_LIGHT_CONTEXT),
    # The true two-stream block at the width of DiT-XL, 1.33B.
    "xl_two_stream": MMDiTConfig(hidden=1152, depth=28, heads=16, num_classes=1000),
    # The printed depth and width with the true two-stream block, 2.36B (Stable Diffusion 3 medium has 24 such blocks).
    "sd3_faithful": MMDiTConfig(hidden=1536, depth=28, heads=24, num_classes=1000),
    # The printed depth and width at about the printed size, 817M: every weight shared, one modulation for all blocks.
    "literal1536": MMDiTConfig(
        hidden=1536,
        depth=28,
        heads=24,
        num_classes=1000,
        context_attn="shared",
        context_mlp="shared",
        modulation="single",
        context_modulation_chunks=0,
        context_pre_only=False,
    ),
}


def preset(name: str, **overrides) -> MMDiTConfig:
    """The named preset with some fields changed.

    Text conditioning takes two: `preset("small", num_classes=0, context_dim=768)`.
    Raises InputError for an unknown preset or field, or for a combination that cannot be.
    """
    if name not in PRESETS:
        raise InputError(
            f"model.preset={name!r} is not possible{nearest(name, PRESETS)}: it must be one of {', '.join(PRESETS)}"
        )
    check_names(overrides, [item.name for item in fields(MMDiTConfig)], "model.{}")
    return replace(PRESETS[name], **overrides)
