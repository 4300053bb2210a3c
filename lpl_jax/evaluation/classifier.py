"""A small classifier of our own whose features compare sets of images where no published feature network is at hand.

It was fitted on ten classes of photographs (docs/classifier.md) and ships with the package. The Fréchet distance on its
features is the "classifier Fréchet distance" (key "cfd"): good for comparing models that were evaluated in the same
way, and on another scale than FID, which is defined by the features of one Inception network.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.fields import between
from lpl_jax.io.atomic import write_json
from lpl_jax.io.jsons import read_json, record
from lpl_jax.io.paths import to_path
from lpl_jax.io.porting import Rule, export_params, import_params
from lpl_jax.io.tensors import read_file, write_tensors

__all__ = ["Classifier", "ClassifierConfig", "init", "load", "save"]

BUNDLED = Path(__file__).parent / "bundled"
WEIGHTS = "classifier.safetensors"
Size: TypeAlias = Annotated[int, between(1, 2**14)]
RULES = (
    Rule("stages.{i}.{j}.{part}", "stage_{i}/block_{j}/{part}"),
    Rule("{part}", "{part}"),  # stem, norm, head
)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What network the weights belong to.

    Attributes:
      name: for messages and result cards.
      classes: names of the classes, in the order of the logits.
      side: images are brought to side x side pixels first.
      stem: channels of the first convolution, which halves the resolution.
      widths: channels of the stages, each of which halves it again.
      blocks: residual blocks of a stage.
    """

    name: str
    classes: tuple[str, ...]
    side: Size = 128
    stem: Size = 32
    widths: tuple[Size, ...] = (48, 80, 128)
    blocks: Annotated[int, between(1, 100)] = 2

    def __post_init__(self):
        for field in ("classes", "widths"):
            value = getattr(self, field)
            if not isinstance(value, (tuple, list)) or not value:
                raise InputError(f"{field}={value!r}: a list that is not empty is needed")
            object.__setattr__(self, field, tuple(value))
        if not all(isinstance(name, str) for name in (self.name, *self.classes)):
            raise InputError(f"name={self.name!r}, classes={self.classes!r}: strings are needed")
        sizes = dict(side=self.side, stem=self.stem, blocks=self.blocks)
        for field, value in (*sizes.items(), *(("widths", width) for width in self.widths)):
            if type(value) is not int or value < 1:
                raise InputError(f"{field}: {value!r} given; whole numbers from 1 are possible")

    @property
    def feature_dim(self) -> int:
        """D, the length of the pooled features."""
        return sum(self.widths)


def _conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), stride, size // 2, precision=jax.lax.Precision.HIGHEST, name=name)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions; one that changes the resolution has a 1x1 convolution as its shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        h = nn.relu(_conv(self.features, 3, self.stride, "conv1")(x))
        h = _conv(self.features, 3, 1, "conv2")(h)
        if self.stride > 1:
            x = _conv(self.features, 1, self.stride, "shortcut")(x)
        return nn.relu(h + x)


class Stage(nn.Module):
    features: int
    blocks: int

    @nn.compact
    def __call__(self, x):
        for index in range(self.blocks):
            x = Block(self.features, 2 if index == 0 else 1, name=f"block_{index}")(x)
        return x


class Affine(nn.Module):
    """Brings features to about mean 0 and variance 1 over the training images: a batch normalisation, folded."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class Network(nn.Module):
    """Images (B, side, side, 3) in [-1, 1] -> (features (B, D), logits (B, classes)): a small residual network.

    The features are the averages over all positions after every stage, not the last alone: those of the first
    stages see fine detail, which a classifier's last stage learns to ignore.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(self, x):
        config, pooled = self.config, []
        x = nn.relu(_conv(config.stem, 3, 2, "stem")(x))
        for index, width in enumerate(config.widths):
            x = Stage(width, config.blocks, name=f"stage_{index}")(x)
            pooled.append(x.mean((1, 2)))
        features = Affine(name="norm")(jnp.concatenate(pooled, axis=-1))
        logits = nn.Dense(len(config.classes), precision=jax.lax.Precision.HIGHEST, name="head")(features)
        return features, logits


class Classifier(flax.struct.PyTreeNode):
    """A frozen classifier: `params` are leaves, `config` is static. Pass it to jitted functions as an argument."""

    params: Any
    config: ClassifierConfig = flax.struct.field(pytree_node=False)

    def features(self, images: jax.Array) -> dict[str, jax.Array]:
        """Images (B, H, W, 3) uint8 -> {"pool": (B, D), "logits": (B, classes)}, float32.

        Images of another size are brought to side x side pixels (128 x 128 for the bundled network) in float32, without
        rounding and without keeping the aspect ratio: bilinear, pixel centres aligned, and where they shrink the
        triangle is as much wider (antialiased). Then x / 127.5 - 1.

        Raises:
          InputError: another type or shape.
        """
        if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"images of type {images.dtype} and shape {images.shape}: uint8 (B, H, W, 3) are needed")
        side = self.config.side
        x = jnp.asarray(images, jnp.float32)
        shape = (len(images), side, side, 3)  # an axis that has its length already is left exactly as it is
        x = jax.image.resize(x, shape, "linear", antialias=True, precision=jax.lax.Precision.HIGHEST)
        found: Any = Network(self.config).apply({"params": self.params}, x / 127.5 - 1)
        return dict(zip(("pool", "logits"), found, strict=True))


def init(config: ClassifierConfig, key: jax.Array) -> Classifier:
    """A classifier with random weights."""
    image = jnp.zeros((1, config.side, config.side, 3))
    return Classifier(Network(config).init(key, image)["params"], config)


def load(source: str | Path = "bundled") -> Classifier:
    """The classifier that comes with this package ("bundled"), or one that scripts/fit_classifier.py wrote to a folder.

    Raises:
      InputError: nothing there, a damaged file, or tensors that do not fit (all are named).
    """
    folder = BUNDLED if str(source) == "bundled" else to_path(source, "a classifier")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; possible: 'bundled' or a folder with config.json and {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}")
    config = _read_config(folder / "config.json")
    tensors = read_file(folder / WEIGHTS)
    if (blocks := config.blocks * len(config.widths)) > len(tensors):
        raise InputError(f"{folder}: {blocks} blocks in its config.json, but the weights are {len(tensors)} tensors")
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0))).params
    params = import_params(tensors, RULES, shapes, where=str(folder / WEIGHTS))
    return Classifier(jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params), config)


def save(classifier: Classifier, folder: str | Path, dtype=np.float32) -> None:
    """Writes a folder that `load` reads, with the tensors under PyTorch's names and in its layout."""
    folder, tensors = to_path(folder), export_params(classifier.params, RULES)
    write_json(folder / "config.json", dataclasses.asdict(classifier.config), indent=2)
    write_tensors(folder / WEIGHTS, {name: np.asarray(tensor, dtype) for name, tensor in tensors.items()})


def _read_config(path: Path) -> ClassifierConfig:
    return record(ClassifierConfig, read_json(path), str(path))
