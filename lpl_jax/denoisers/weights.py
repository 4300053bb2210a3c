"""Denoisers in files: a folder in one of two layouts, or a single file. docs/weights.md is the full description.

"diffusers": what the `SD3Transformer2DModel` of diffusers reads and writes, for text-conditioned networks of the
two-stream form with a pooled text vector (Stable Diffusion 3 and 3.5, and those trained here).

"lpl_jax": every configuration, as it is.

- config.json: `"_class_name": "lpl_jax.MMDiT"` and the fields of `MMDiTConfig` by name; a field that is left out has
  its default.
- model.safetensors: the parameters in float32, each under its path in the tree, such as "time_mlp/fc1/kernel" or
  "blocks/attn/q/kernel". Kernels are (inputs, outputs); the first axis of `blocks/...` and `dual_blocks/...` counts the
  blocks of the stack; the chunks of a modulation are in the order shift, scale, gate of the attention, the same of the
  MLP, the same of the second attention; the rows of a patch are in the order row, column, channel.

A single file is the model.safetensors of the second layout with the text of its config.json in the metadata, under the
name "lpl_jax.MMDiT"; or it has the config.json of either layout beside it. Weights of others are read in any form of
`io.weight_files`.

Fields of config.json that begin with an underscore say where the weights come from; nothing depends on them.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from lpl_jax.denoisers import diffusers_layout
from lpl_jax.denoisers.config import MMDiTConfig
from lpl_jax.denoisers.mmdit import MMDiT, init
from lpl_jax.errors import InputError, some, some_of_each
from lpl_jax.io.atomic import atomic_path, check_free, write_text
from lpl_jax.io.hub import find
from lpl_jax.io.jsons import parse, read_json
from lpl_jax.io.outputs import check_folder
from lpl_jax.io.paths import PathLike, to_path
from lpl_jax.io.tensors import write_tensors
from lpl_jax.io.weight_files import PATTERNS, PICKLES, open_weights, read_weights

CLASS_NAME = "lpl_jax.MMDiT"
# Layout -> file of the weights.
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "lpl_jax": "model.safetensors"}
OUR_ANCHOR = "head/out/kernel"  # a parameter that every network has
# Fields that say how to compute, not what: weights fit whatever they are.
HOW = ("attention", "remat", "dtype")
# Fields that parameters grow with.
SIZES = ("hidden", "depth", "latent_channels", "patch_size", "mlp_ratio", "num_classes", "context_dim", "pooled_dim")
SIZES += ("position_table",)


def load(source: str | Path, *, subfolder: str | None = None, variant: str | None = None) -> tuple[MMDiT, dict]:
    """Load a denoiser and its parameters, in float32 whatever the file has.

    Args:
      source: a folder with config.json beside the weights, in one of the two layouts; a file of weights with its config
        inside or beside it; or a hub id such as "stabilityai/stable-diffusion-3.5-medium".
      subfolder: the denoiser's folder inside a pipeline's: "transformer" in one of Stable Diffusion 3.
      variant: which weights, where there are several and none in full precision (see `io.weight_files`).

    Raises:
      InputError: nothing there, a damaged file, another architecture, or tensors that do not fit (they are named).
    """
    path = find(source, ("config.json", *PATTERNS), subfolder, field="a denoiser's weights", unless_there=PICKLES)
    if (path.suffix == ".safetensors" and not path.is_dir()) or path.is_file():
        weights, inside = open_weights(path, variant=variant), _config_inside(path)
        if inside is not None:
            config = _config_from_fields(inside, where=f"{path}: metadata {CLASS_NAME}")
            return MMDiT(config), jax.tree.map(jnp.asarray, _tree(config, weights.read((OUR_ANCHOR,)), where=str(path)))
    folder = path.parent if path.is_file() else path
    raw = _read_config(folder, of=path)
    kind, where = raw.get("_class_name"), str(folder / "config.json")
    if kind == diffusers_layout.CLASS_NAME:
        config = diffusers_layout.from_diffusers(raw, where=where)
        tensors = read_weights(path, (diffusers_layout.ANCHOR,), variant=variant)
        if absurd := _out_of_proportion(config, tensors):
            raise InputError(f"{where}: {absurd}")
        params = diffusers_layout.from_tensors(config, tensors, where=str(path))
    elif kind == CLASS_NAME:
        config = _config_from_fields(raw, where=where)
        params = _tree(config, read_weights(path, (OUR_ANCHOR,), variant=variant), where=str(path))
    else:
        raise InputError(f"{where}: class {kind!r} given, possible is {diffusers_layout.CLASS_NAME} or {CLASS_NAME}")
    return MMDiT(config), jax.tree.map(jnp.asarray, params)


def load_params(config: MMDiTConfig, source: str | Path, *, variant: str | None = None) -> dict:
    """The parameters in `source` (see `load`, as for `variant`) for the network that `config` describes.

    Raises:
      InputError: as `load`, or a config that is another network's: the fields that differ, and the parameters that
        are missing, surplus or of another shape, are named. How to compute (attention, remat, dtype) may differ.
    """
    model, params = load(source, variant=variant)
    there, here = (dataclasses.asdict(each) for each in (model.config, config))
    problems = [
        f"{name} = {there[name]!r} there, {here[name]!r} in the config"
        for name in here
        if name not in HOW and there[name] != here[name]
    ]
    if problems:
        misfits = some_of_each(*_misfits(config, flatten_dict(params, sep="/")))
        text = "; ".join([*problems, misfits] if misfits else problems)
        raise InputError(f"{source} is not of the network that is configured: {text}")
    return params


def save(
    config: MMDiTConfig,
    params: Mapping,
    path: PathLike,
    *,
    layout: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write a denoiser, to be read by `load`. It appears under its name only when all of it is written.

    Args:
      config, params: of the MMDiT.
      path: a folder, new or empty; or, where it ends in .safetensors, a new file that has the config inside.
      layout: "diffusers", for `SD3Transformer2DModel.from_pretrained` of diffusers, or "lpl_jax", which takes every
        configuration. None is the former for a folder, and the latter, which is the only one, for a file.
      about: plain values that say where the weights come from, kept in the config under "_lpl_jax".

    Returns:
      the layout.

    Raises:
      InputError: an unknown layout, something in the way, a configuration that the layout cannot hold, or parameters
        that do not fit the configuration or are not finite (all are named). Nothing has been written then.
    """
    path = to_path(path, remote=True)
    one_file, layout = path.suffix == ".safetensors", check_target(config, path, layout)
    flat: Any = flatten_dict(params, sep="/")
    _check(config, flat, where="parameters to save")
    if broken := sorted(name for name, array in flat.items() if not np.isfinite(array).all()):
        raise InputError(f"parameters to save: infinite or undefined values in {some(broken)}")
    if layout == "diffusers":
        fields, tensors = _for_diffusers(config, params)
    else:
        fields = {"_class_name": CLASS_NAME, **dataclasses.asdict(config)}
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in flat.items()}
    text = json.dumps(fields | ({"_lpl_jax": dict(about)} if about else {}), indent=2) + "\n"
    with atomic_path(path) as partial:
        if one_file:
            write_tensors(partial, tensors, {"format": "pt", CLASS_NAME: text})
        else:
            write_tensors(partial / WEIGHTS[layout], tensors)
            write_text(partial / "config.json", text)
    return layout


def check_target(config: MMDiTConfig, path: PathLike, layout: str | None = None) -> str:
    """The layout in which `save` would write there; raises its InputErrors, but for those of the parameters."""
    path = to_path(path, remote=True)
    one_file = path.suffix == ".safetensors"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InputError(f"{path}: pickles are not written; give a folder, or a name that ends in .safetensors")
    layout = layout or ("lpl_jax" if one_file else "diffusers")
    if layout not in WEIGHTS:
        raise InputError(f"layout {layout!r} given, possible is one of {', '.join(WEIGHTS)}")
    if one_file and layout != "lpl_jax":
        raise InputError(f"{path}: layout {layout!r} is a folder's, a file has layout 'lpl_jax'; give a folder")
    check_free(path)
    check_folder(path.parent, "the folder of")
    if layout == "diffusers":
        _fields_of_diffusers(config)
    return layout


def _for_diffusers(config: MMDiTConfig, params: Mapping) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return _fields_of_diffusers(config), diffusers_layout.to_tensors(config, params)


def _fields_of_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    try:
        return diffusers_layout.to_diffusers(config)
    except InputError as error:
        raise InputError(
            f"{error}; layout 'lpl_jax' (--layout lpl_jax), or a file that ends in .safetensors, takes every "
            "configuration"
        ) from None


def _config_inside(path: Path) -> dict | None:
    """The config in the metadata of a safetensors file that can be opened; None where there is none."""
    where = f"{path}: metadata {CLASS_NAME}"
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(CLASS_NAME)
    except SafetensorError:  # a file of PyTorch's, or an index
        return None
    if text is None:
        return None
    raw = parse(text, where)
    if not isinstance(raw, dict):
        raise InputError(f"{where} holds a JSON {type(raw).__name__}; an object is needed")
    return raw


def _config_from_fields(raw: Mapping, *, where: str) -> MMDiTConfig:
    given = {name: value for name, value in raw.items() if not name.startswith("_")}
    fields = dataclasses.fields(MMDiTConfig)
    known = [field.name for field in fields]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    unknown = [f"unknown field {name}" for name in sorted(set(given) - set(known))]
    missing = [f"missing field {name}" for name in required if name not in given]
    if unknown or missing:
        raise InputError(f"{where}: {some_of_each(unknown, missing)}; the fields are {', '.join(known)}")
    try:
        return MMDiTConfig(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _tree(config: MMDiTConfig, tensors: Mapping[str, np.ndarray], *, where: str) -> dict:
    _check(config, tensors, where=where)
    return unflatten_dict(tensors, sep="/")


def _check(config: MMDiTConfig, flat: Mapping, *, where: str) -> None:
    """Raises InputError that names parameters that are missing, surplus or of another shape than the config's."""
    groups = _misfits(config, flat)
    if count := sum(map(len, groups)):
        raise InputError(f"{where}: {count} parameters do not fit: {some_of_each(*groups)}")


def _misfits(config: MMDiTConfig, flat: Mapping) -> list[list[str]]:
    """What does not fit, by kind."""
    if absurd := _out_of_proportion(config, flat):
        return [[absurd]]
    expected: Any = flatten_dict(jax.eval_shape(lambda: init(config, jax.random.key(0))), sep="/")
    surplus = [f"surplus {path}" for path in flat if path not in expected]
    missing = [f"missing {path}" for path in expected if path not in flat]
    odd = [
        f"{path} has shape {np.shape(array)}, the config needs {expected[path].shape}"
        for path, array in flat.items()
        if path in expected and np.shape(array) != expected[path].shape
    ]
    return [surplus, missing, odd]


def _out_of_proportion(config: MMDiTConfig, tensors: Mapping) -> str | None:
    """What tells that the config cannot be that of the tensors, before anything is worked out from it.

    Even the names and shapes of a network that is 10^9 wide take gigabytes, and minutes, to find.
    """
    d, p = config.hidden, config.patch_size
    each = config.num_classes + config.context_dim + config.pooled_dim + config.position_table**2
    least = d * (config.depth * (1 + config.mlp_ratio) * d + p * p * config.latent_channels + each)
    there = sum(np.size(array) for array in tensors.values())
    if least <= 10 * max(there, 10**8):
        return None
    sizes = ", ".join(f"{name} = {value}" for name, value in dataclasses.asdict(config).items() if name in SIZES)
    return f"the config ({sizes}) is out of all proportion to {there} parameters"


def _read_config(folder: Path, of: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        if of.is_file():
            raise InputError(
                f"{of} has no config ({CLASS_NAME}) in its metadata, nor a config.json beside it: give the folder"
            )
        inside = (folder / "transformer" / "config.json").is_file()
        hint = f"; the denoiser of this pipeline is {folder / 'transformer'}" if inside else ""
        raise InputError(f"{path} does not exist: not a folder with a denoiser{hint}")
    return read_json(path)
