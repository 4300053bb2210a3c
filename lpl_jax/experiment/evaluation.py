"""What an evaluation measures, and against what."""

import dataclasses
from typing import Literal

from typing_extensions import override

from lpl_jax.errors import InputError
from lpl_jax.fields import Part, field, whole, word_or
from lpl_jax.limits import BATCH, IMAGES, REFERENCES, SEED, STEPS

NEIGHBOURS = whole(1, 10_000)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Part, section="evaluation"):
    """What an evaluation measures, and how."""

    num_images: int | Literal["auto"] = field(
        50_000,
        "images to generate, or to take of a given set; auto: as many as the reference",
        word_or(IMAGES, "auto"),
    )
    batch_size: int = field(64, "images at a time, over all devices; changes no number", BATCH)
    seed: int = field(0, "of the generated images, of subsets and of the bootstrap", SEED)
    features: Literal["inception", "classifier"] = field(
        "inception", "inception (FID) | classifier (our small network: relative comparisons only)"
    )
    inception: str | None = field(None, "weights file of the FID Inception; None: looked for in the usual places")
    clip: str | None = field(None, "CLIPScore: CLIP folder or hub id, such as openai/clip-vit-large-patch14")
    prompts: str | None = field(
        None,
        "what a run on text draws (None: captions of its store), and CLIPScore's texts: a store with captions, or a "
        "text file with a line for each image in turn (of a run on classes: for each class)",
    )
    reference: str | None = field(None, "folder of images | .npz images or statistics; None: the run's data")
    reference_images: int | None = field(
        None, "how many of the reference images to use, drawn at random; None: all", REFERENCES
    )
    cache: str | None = field(None, "where features are kept; None: in the output folder")
    prdc_references: int | None = field(
        50_000,
        "largest number of reference images of precision, recall, density and coverage, drawn at random; None: all",
        REFERENCES,
    )
    k: int = field(3, "nearest neighbours of precision and recall, and of density and coverage", NEIGHBOURS)
    k_density: int | None = field(None, "nearest neighbours of density and coverage, where they differ", NEIGHBOURS)
    splits: int = field(10, "parts of the Inception score", whole(1, 10_000))
    resamples: int = field(20, "bootstrap resamples of the distances; 0: no intervals", whole(0, 100_000))
    every: int | None = field(None, "steps between small evaluations during training; None: never", STEPS)
    every_images: int = field(256, "images of such a small evaluation, with the classifier's features", IMAGES)

    @override
    def check(self) -> None:
        if self.resamples == 1:
            raise InputError("evaluation.resamples=1 is not possible: 2 or more give intervals, 0 gives none")

    def check_reference(self) -> None:
        """Raises an InputError where the number of images is that of a reference which is not named."""
        if self.num_images == "auto" and self.reference is None:
            raise InputError(
                "evaluation.num_images=auto takes as many images as the reference has: give evaluation.reference "
                "(CC12M: its validation images), or a number"
            )

    def check_clip_score(self) -> None:
        """Raises an InputError for images that no prompts made, unless CLIP and prompts are given together."""
        if (self.clip is None) != (self.prompts is None):
            given, missing = ("clip", "prompts") if self.prompts is None else ("prompts", "clip")
            raise InputError(f"evaluation.{given} is given without evaluation.{missing}: CLIPScore needs both")
