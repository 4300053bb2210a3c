"""Configurations of CLIP's text and vision towers, from and to transformers' config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lpl_jax.errors import InputError
from lpl_jax.fields import fits

ACTIVATIONS = ("quick_gelu", "gelu")
# Of fields that are sizes; far above what is published, and far below what takes minutes to refuse.
LARGEST = dict(width=2**16, layers=1000, heads=2**12, mlp_width=2**18, projection_dim=2**16)
LARGEST |= dict(vocab_size=2**24, positions=2**16, eos_token_id=2**24, image_size=2**14, patch_size=2**14)


@dataclass(frozen=True)
class TowerConfig:
    """What both towers have: a pre-norm transformer.

    Attributes:
      width, layers, heads, mlp_width: sizes of the transformer.
      activation: "quick_gelu" (x * sigmoid(1.702 x), OpenAI's weights) or "gelu" (exact, most of LAION's weights).
      norm_eps: epsilon of every LayerNorm.
      projection_dim: width of the embedding shared by text and images; None for a tower without projection.
      dtype: compute type of the matrix products, "float32" or "bfloat16"; norms and softmax are float32.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection_dim: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        sizes = {name: most for name, most in LARGEST.items() if hasattr(self, name)}
        for name, most in sizes.items():
            given = getattr(self, name)
            if name == "projection_dim" and given is None:
                continue
            if type(given) is not int or not (0 if name == "eos_token_id" else 1) <= given <= most:
                raise InputError(f"CLIP tower with {name}={given!r}: must be a whole number from 1 to {most}")
        if not fits(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise InputError(f"CLIP tower with norm_eps={self.norm_eps!r}: must be a number between 0 and 1")
        if self.width % self.heads:
            raise InputError(f"CLIP tower of width={self.width}: not divisible by heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"CLIP tower with activation={self.activation!r}: possible: {', '.join(ACTIVATIONS)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"CLIP tower with dtype={self.dtype!r}: possible: float32, bfloat16")


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """Text tower.

    Attributes:
      vocab_size: rows of the token table.
      positions: longest sequence, 77 in every published model.
      eos_token_id: the pooled output is read at its first occurrence. 2 is a historical mistake in published
        config.json files and means "at the highest token number", which is the end token of an unextended vocabulary.
    """

    vocab_size: int = 49408
    positions: int = 77
    eos_token_id: int = 49407


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Vision tower: square images of `image_size` pixels in square patches of `patch_size`."""

    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise InputError(f"image_size={self.image_size}: not divisible by patch_size={self.patch_size}")


@dataclass(frozen=True)
class ClipConfig:
    """One tower or both. `name` is what it was loaded from: shown to people, not used in computations."""

    name: str = "clip"
    text: TextConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self):
        if self.text is None and self.vision is None:
            raise InputError(f"{self.name}: a CLIP model needs a text tower, a vision tower or both")
        if self.text and self.vision:
            widths = (self.text.projection_dim, self.vision.projection_dim)
            if widths[0] != widths[1] or widths[0] is None:
                raise InputError(
                    f"{self.name}: projection_dim of text and vision are {widths}: they must be one number"
                )

    @classmethod
    def tiny(cls, **changes) -> "ClipConfig":
        """Both towers at a size for tests."""
        shared: dict[str, Any] = dict(layers=2, projection_dim=12)
        text = TextConfig(16, heads=2, mlp_width=32, vocab_size=99, positions=12, eos_token_id=98, **shared)
        vision = VisionConfig(24, heads=3, mlp_width=48, image_size=16, patch_size=8, **shared)
        return replace(cls(name="tiny", text=text, vision=vision), **changes)


# Ours -> transformers' name and its default, which config.json files may leave out.
SHARED_FIELDS = {
    "heads": ("num_attention_heads", {"text": 8, "vision": 12}),
    "width": ("hidden_size", {"text": 512, "vision": 768}),
    "layers": ("num_hidden_layers", {"text": 12, "vision": 12}),
    "mlp_width": ("intermediate_size", {"text": 2048, "vision": 3072}),
    "activation": ("hidden_act", {"text": "quick_gelu", "vision": "quick_gelu"}),
    "norm_eps": ("layer_norm_eps", {"text": 1e-5, "vision": 1e-5}),
}
OWN_FIELDS = {
    "text": {
        "vocab_size": ("vocab_size", 49408),
        "positions": ("max_position_embeddings", 77),
        "eos_token_id": ("eos_token_id", 49407),
    },
    "vision": {"image_size": ("image_size", 224), "patch_size": ("patch_size", 32)},
}
CLASSES = {
    "CLIPModel": ("text", "vision"),
    "CLIPTextModel": ("text",),
    "CLIPTextModelWithProjection": ("text",),
    "CLIPVisionModel": ("vision",),
    "CLIPVisionModelWithProjection": ("vision",),
}
MODEL_TYPES = {"clip": "CLIPModel", "clip_text_model": "CLIPTextModel", "clip_vision_model": "CLIPVisionModel"}


def from_transformers(
    config: Mapping[str, Any], *, name: str, tower: str | None = None, dtype: str = "float32"
) -> ClipConfig:
    """The configuration that a transformers config.json describes.

    Args:
      config: the parsed file, of one of `CLASSES`.
      name: what it is of, for messages.
      tower: "text" or "vision" keeps one tower of a CLIPModel, with its projection; None keeps what is there.
      dtype: compute type.

    Raises:
      InputError: another class, a tower that it does not have, or an option that this architecture does not have.
    """
    kind = class_name(config, name)
    if tower is not None and tower not in CLASSES[kind]:
        raise InputError(f"{name}: {kind} has no tower {tower!r}; it has: {', '.join(CLASSES[kind])}")
    projection = config.get("projection_dim", 512) if kind == "CLIPModel" or kind.endswith("Projection") else None
    towers: dict[str, Any] = {
        side: _tower(side, _section(config, kind, side, name), projection, name, dtype)
        for side in CLASSES[kind]
        if tower in (None, side)
    }
    return ClipConfig(name=name, **towers)


def class_name(config: Mapping[str, Any], name: str) -> str:
    """The transformers class that a config.json is of: one of `CLASSES`."""
    kinds, model_type = config.get("architectures"), config.get("model_type")
    kind = kinds[0] if isinstance(kinds, list) and kinds else MODEL_TYPES.get(str(model_type), model_type)
    if not isinstance(kind, str) or kind not in CLASSES:
        raise InputError(f"{name}: config.json is of {str(kind)[:80]}; possible: {', '.join(CLASSES)}")
    return kind


def _section(config: Mapping, kind: str, side: str, name: str) -> Mapping:
    if kind != "CLIPModel":
        return config
    # Early files repeat a section as text_config_dict, which then decides, defaults included.
    section = config.get(f"{side}_config_dict") or config.get(f"{side}_config") or {}
    if not isinstance(section, Mapping):
        raise InputError(f"{name}: config.json has a {side}_config that is no object")
    return section


def _tower(side: str, section: Mapping, projection: int | None, name: str, dtype: str) -> TextConfig | VisionConfig:
    if section.get("num_channels", 3) != 3:
        raise InputError(f"{name}: config.json has num_channels={section['num_channels']}; possible: 3")
    values = {ours: section.get(theirs, default[side]) for ours, (theirs, default) in SHARED_FIELDS.items()}
    values |= {ours: section.get(theirs, default) for ours, (theirs, default) in OWN_FIELDS[side].items()}
    try:
        return {"text": TextConfig, "vision": VisionConfig}[side](**values, projection_dim=projection, dtype=dtype)
    except InputError as error:
        raise InputError(f"{name}: config.json, {side}: {error}") from None


def to_transformers(config: ClipConfig) -> dict[str, Any]:
    """The config.json of the transformers class with these towers: the inverse of `from_transformers`."""
    sections = {}
    for side in ("text", "vision"):
        if tower := getattr(config, side):
            names = {ours: theirs for ours, (theirs, _) in (SHARED_FIELDS | OWN_FIELDS[side]).items()}
            sections[side] = {"model_type": f"clip_{side}_model"}
            sections[side] |= {theirs: getattr(tower, ours) for ours, theirs in names.items()}
            if tower.projection_dim is not None:
                sections[side]["projection_dim"] = tower.projection_dim
    if config.text and config.vision:
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.text.projection_dim,
            "text_config": sections["text"],
            "vision_config": sections["vision"],
        }
    ((side, section),) = sections.items()
    suffix = "WithProjection" if "projection_dim" in section else ""
    return {"architectures": [f"CLIP{side.title()}Model{suffix}"], **section}
