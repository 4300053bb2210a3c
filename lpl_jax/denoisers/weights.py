"""Denoisers in folders of config.json and safetensors, in one of two layouts.

"diffusers": what the `SD3Transformer2DModel` of diffusers reads and writes, for text-conditioned networks of the
two-stream form with a pooled text vector (Stable Diffusion 3 and 3.5, and those trained here).

"lpl_jax": every configuration, as it is.

- config.json: `"_class_name": "lpl_jax.MMDiT"` and the fields of `MMDiTConfig` by name; a field that is left out has
  its default.
- model.safetensors: the parameters in float32, each under its path in the tree, such as "time_mlp/fc1/kernel" or
  "blocks/attn/q/kernel". Kernels are (inputs, outputs); the first axis of `blocks/...` and `dual_blocks/...` counts the
  blocks of the stack; the chunks of a modulation are in the order shift, scale, gate of the attention, the same of the
  MLP, the same of the second attention; the rows of a patch are in the order row, column, channel.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from lpl_jax.denoisers import diffusers_layout
from lpl_jax.denoisers.config import MMDiTConfig
from lpl_jax.denoisers.mmdit import MMDiT, init
from lpl_jax.errors import InputError
from lpl_jax.hub import find
from lpl_jax.tensor_files import read_folder, read_json

CLASS_NAME = "lpl_jax.MMDiT"
# Layout -> file of the weights.
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "lpl_jax": "model.safetensors"}


def load(source: str | Path, *, subfolder: str | None = None) -> tuple[MMDiT, dict]:
    """Load a denoiser and its parameters, in float32 whatever the file has.

    Args:
      source: a folder with config.json beside the weights in safetensors, whole or in shards with an index, in one of
        the two layouts; or a hub id such as "stabilityai/stable-diffusion-3.5-medium".
      subfolder: the denoiser's folder inside a pipeline's: "transformer" in one of Stable Diffusion 3.
    Raises:
      InputError: nothing there, a damaged file, another architecture, or tensors that do not fit (all are named).
    """
    folder = find(source, ("config.json", "diffusion_pytorch_model*.safetensors*", "model*.safetensors*"), subfolder)
    raw = _read_config(folder)
    kind = raw.get("_class_name")
    if kind == diffusers_layout.CLASS_NAME:
        config = diffusers_layout.from_diffusers(raw, where=str(folder / "config.json"))
        tensors = read_folder(folder, _files("diffusers"))
        params = diffusers_layout.from_tensors(config, tensors, where=str(folder))
    elif kind == CLASS_NAME:
        config = _config_from_fields(raw, where=str(folder / "config.json"))
        params = unflatten_dict(read_folder(folder, _files("lpl_jax")), sep="/")
        _check_params(config, params, where=str(folder))
    else:
        raise InputError(
            f"{folder / 'config.json'}: class {kind!r} given, possible is {diffusers_layout.CLASS_NAME} or {CLASS_NAME}"
        )
    return MMDiT(config), jax.tree.map(jnp.asarray, params)


def save(config: MMDiTConfig, params: Mapping, folder: str | Path, *, layout: str = "diffusers") -> None:
    """Write a denoiser to `folder`, to be read by `load`.

    Args:
      config, params: of the MMDiT.
      folder: made if it does not exist; nothing in it is written over.
      layout: "diffusers", for `SD3Transformer2DModel.from_pretrained` of diffusers, or "lpl_jax", which takes every
        configuration.
    Raises:
      InputError: an unknown layout, files in the way, a configuration that the layout cannot hold, or parameters that
        do not fit the configuration (all are named). Nothing has been written then.
    """
    if layout not in WEIGHTS:
        raise InputError(f"layout {layout!r} given, possible is one of {', '.join(WEIGHTS)}")
    folder = Path(folder).expanduser()
    for name in ("config.json", *_files(layout)):
        if (folder / name).exists():
            raise InputError(f"{folder / name} exists: choose another folder")
    _check_params(config, params, where="parameters to save")
    if layout == "diffusers":
        try:
            fields = diffusers_layout.to_diffusers(config)
        except InputError as error:
            raise InputError(f"{error}; layout 'lpl_jax' takes every configuration") from None
        tensors = diffusers_layout.to_tensors(config, params)
    else:
        fields = {"_class_name": CLASS_NAME, **dataclasses.asdict(config)}
        tensors = {path: np.asarray(array, np.float32) for path, array in flatten_dict(params, sep="/").items()}
    folder.mkdir(parents=True, exist_ok=True)
    # The config comes last: a folder without one is not a denoiser, so that a write cut short is not taken for whole.
    save_file(tensors, folder / WEIGHTS[layout], metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _files(layout: str) -> tuple[str, str]:
    """The file of the weights, and the index of the shards that can be there in its place."""
    return WEIGHTS[layout], f"{WEIGHTS[layout]}.index.json"


def _config_from_fields(raw: Mapping, *, where: str) -> MMDiTConfig:
    given = {name: value for name, value in raw.items() if name != "_class_name"}
    fields = dataclasses.fields(MMDiTConfig)
    known = [field.name for field in fields]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    problems = [f"unknown field {name}" for name in sorted(set(given) - set(known))]
    problems += [f"missing field {name}" for name in required if name not in given]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; the fields are {', '.join(known)}")
    return MMDiTConfig(**given)


def _check_params(config: MMDiTConfig, params: Mapping, *, where: str) -> None:
    """Raises InputError that names every parameter that is missing, surplus or of another shape than the config's."""
    expected = flatten_dict(jax.eval_shape(lambda: init(config, jax.random.key(0))), sep="/")
    given = flatten_dict(params, sep="/")
    problems = [f"surplus {path}" for path in given if path not in expected]
    problems += [f"missing {path}" for path in expected if path not in given]
    problems += [
        f"{path} has shape {np.shape(array)}, the config needs {expected[path].shape}"
        for path, array in given.items()
        if path in expected and np.shape(array) != expected[path].shape
    ]
    if problems:
        raise InputError(f"{where}: {len(problems)} parameters do not fit: {'; '.join(problems)}")


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        inside = (folder / "transformer" / "config.json").is_file()
        hint = f"; the denoiser of this pipeline is {folder / 'transformer'}" if inside else ""
        raise InputError(f"{path} does not exist: not a folder with a denoiser{hint}")
    return read_json(path)
