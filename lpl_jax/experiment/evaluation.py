"""What an evaluation measures, and against what."""

import dataclasses

from lpl_jax.errors import InputError

FEATURES = ("inception", "classifier")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Section `evaluation` of a config; `configs/base.py` says what each field means."""

    num_images: int = 50_000
    batch_size: int = 64
    seed: int = 0
    features: str = "inception"
    inception: str | None = None
    clip: str | None = None
    prompts: str | None = None
    reference: str | None = None
    reference_images: int | None = None
    cache: str | None = None
    k: int = 3
    k_density: int | None = None
    splits: int = 10
    resamples: int = 20
    every: int | None = None
    every_images: int = 256

    def __post_init__(self):
        _one_of("features", self.features, FEATURES)
        for name in ("num_images", "batch_size", "k", "splits", "every_images"):
            _at_least(name, getattr(self, name), 1)
        for name in ("k_density", "every", "reference_images"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        _at_least("resamples", self.resamples, 0)
        if self.resamples == 1:
            raise InputError("evaluation.resamples=1 is not possible: 2 or more give intervals, 0 gives none")

    def check_clip_score(self) -> None:
        """Raises an InputError for images that no prompts made, unless CLIP and prompts are given together."""
        if (self.clip is None) != (self.prompts is None):
            given, missing = ("clip", "prompts") if self.prompts is None else ("prompts", "clip")
            raise InputError(f"evaluation.{given} is given without evaluation.{missing}: CLIPScore needs both")


def _one_of(name: str, value, possible) -> None:
    if value not in possible:
        raise InputError(f"evaluation.{name}={value!r} is not possible: it must be one of {', '.join(possible)}")


def _at_least(name: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"evaluation.{name}={value!r} is not possible: it must be a whole number, {least} or more")
