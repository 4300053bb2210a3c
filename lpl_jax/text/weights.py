"""CLIP weights in transformers' layout: config.json beside the weights, in any form of `io.weight_files`."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_json
from lpl_jax.io.hub import find
from lpl_jax.io.jsons import read_json
from lpl_jax.io.paths import to_path
from lpl_jax.io.porting import Rule, export_params, import_params
from lpl_jax.io.tensors import write_tensors
from lpl_jax.io.weight_files import PATTERNS, PICKLES, read_weights
from lpl_jax.text import bundled
from lpl_jax.text.config import CLASSES, ClipConfig, from_transformers, to_transformers
from lpl_jax.text.model import Clip, init
from lpl_jax.text.tokenizer import Tokenizer, WordTokenizer

WEIGHTS = "model.safetensors"
# A tensor that every tower has; transformers 5 leaves out the first part of the name in single towers.
ANCHORS = {
    "text": ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    "vision": ("vision_model.embeddings.class_embedding", "embeddings.class_embedding"),
}

RULES = (
    Rule("logit_scale", "logit_scale"),
    Rule("text_projection", "text/projection"),
    Rule("visual_projection", "vision/projection"),
    Rule("{side}_model.embeddings.{part}", "{side}/embeddings/{part}"),
    Rule("{side}_model.encoder.layers.{i}.self_attn.{part}", "{side}/layer_{i}/attention/{part}"),
    Rule("{side}_model.encoder.layers.{i}.mlp.{part}", "{side}/layer_{i}/mlp/{part}"),
    Rule("{side}_model.encoder.layers.{i}.{part}", "{side}/layer_{i}/{part}"),  # layer_norm1, layer_norm2
    Rule("{side}_model.{part}", "{side}/{part}"),  # norms before and after the layers
)
OTHER_TOWER = {"text": ("vision_model.", "visual_projection.", "logit_scale"), "vision": ("text_", "logit_scale")}


def load(
    source: str | Path,
    *,
    subfolder: str | None = None,
    tower: str | None = None,
    variant: str | None = None,
    config: ClipConfig | None = None,
    dtype=jnp.float32,
) -> Clip:
    """Load a frozen CLIP model.

    Args:
      source: a folder in transformers layout (CLIPModel, CLIPTextModel or CLIPVisionModel, with or without projection),
        one file with such tensors, a hub id such as "openai/clip-vit-large-patch14", or "bundled": a small
        text tower that needs no files and knows no language (`lpl_jax.text.bundled`).
      subfolder: the model's folder inside a pipeline's, such as "text_encoder".
      variant: which weights, where there are several and none in full precision (see `io.weight_files`).
      tower: "text" or "vision" reads one tower of a CLIPModel, with its projection; None reads all that is there.
      config: what the tensors are of, instead of the config.json in the folder or beside the file (`tower` and `dtype`
        are then not looked at).
      dtype: compute type, float32 or bfloat16; in bfloat16 the matrices are stored so, too.

    Raises:
      InputError: nothing there, a damaged file, another architecture, or tensors that do not fit (they are named).
    """
    if source == bundled.NAME:
        return bundled.load(tower=tower, dtype=dtype)
    path = find(source, ("config.json", *PATTERNS), subfolder, field="text.source", unless_there=PICKLES)
    if config is None:
        config = _read_config(path, tower, jnp.dtype(dtype).name)
    tensors = _named_as_now(read_weights(path, ANCHORS["text" if config.text else "vision"], variant=variant), config)
    layers = sum(tower.layers for tower in (config.text, config.vision) if tower)
    if layers > len(tensors):  # the names and shapes of a thousand layers alone take minutes
        raise InputError(f"{path}: {layers} layers in its config.json, but the weights are {len(tensors)} tensors")
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0))).params
    params = import_params(tensors, RULES, shapes, where=str(path))

    def cast(side, array):
        compute = getattr(config, side).dtype if array.ndim > 1 else "float32"
        return jnp.asarray(array, compute)

    return Clip({side: jax.tree.map(lambda a, s=side: cast(s, a), tree) for side, tree in params.items()}, config)


def load_tokenizer(source: str | Path, *, subfolder: str | None = None, cleaning: str | None = None) -> WordTokenizer:
    """The tokeniser that belongs to what `load` takes under the same name; arguments as of `Tokenizer.load`."""
    if source == bundled.NAME:
        return bundled.HashTokenizer()
    return Tokenizer.load(source, subfolder=subfolder, cleaning=cleaning)


def save(clip: Clip, folder: str | Path) -> None:
    """Write a folder that transformers' class of the same towers reads. Refuses to overwrite an existing file."""
    folder = to_path(folder)
    if (folder / WEIGHTS).exists():
        raise InputError(f"{folder / WEIGHTS} exists: choose another folder")
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), clip.params)
    write_json(folder / "config.json", to_transformers(clip.config), indent=2)
    write_tensors(folder / WEIGHTS, export_params(params, RULES))


def _named_as_now(tensors: Mapping[str, np.ndarray], config: ClipConfig) -> dict[str, np.ndarray]:
    """Tensors with the prefix that transformers 5 leaves out of single towers, without the other tower's."""
    single = None if config.text and config.vision else "text" if config.text else "vision"
    prefix = f"{single}_model."
    add_prefix = single and not any(name.startswith(prefix) for name in tensors)
    named = {}
    for name, tensor in tensors.items():
        if single and name.startswith(OTHER_TOWER[single]):
            continue
        if add_prefix and name.startswith(("embeddings.", "encoder.", "final_", "pre_", "post_")):
            name = prefix + name
        named[name] = tensor
    return named


def _read_config(path: Path, tower: str | None, dtype: str) -> ClipConfig:
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / "config.json").is_file():
        found = "no config.json" if path.exists() else "nothing"
        raise InputError(
            f"{found} at {folder if path.exists() else path}: give a folder in transformers layout, or a file of "
            f"weights with config.json beside it or config=; possible classes: {', '.join(CLASSES)}"
        )
    return from_transformers(read_json(folder / "config.json"), name=str(path), tower=tower, dtype=dtype)
