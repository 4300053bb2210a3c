"""The FID network's weights from and to the files that PyTorch's ports use."""

from pathlib import Path

import jax
import jax.numpy as jnp

from lpl_jax.errors import InputError
from lpl_jax.evaluation.inception import CLASSES, Inception, shapes
from lpl_jax.io.paths import to_path
from lpl_jax.io.porting import Rule, export_params, import_params
from lpl_jax.io.tensors import write_file
from lpl_jax.io.weight_files import has_weights, read_weights

__all__ = ["PUBLISHED", "find_weights", "load", "save"]

# The two files are the same, byte for byte.
PUBLISHED = {
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
    "weights-inception-2015-12-05-6726825d.pth": ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"),
}
FOLDERS = ("~/.cache/lpl_jax", "~/.cache/torch/hub/checkpoints")  # the second is where PyTorch's ports download to
ANCHOR = "Conv2d_1a_3x3.conv.weight"

RULES = (
    Rule("fc", "fc"),
    Rule("{layer}.bn.running_{statistic}", "{layer}/bn/{statistic}"),
    Rule("{layer}.{part}", "{layer}/{part}"),  # conv, bn
    Rule("{block}.{layer}.bn.running_{statistic}", "{block}/{layer}/bn/{statistic}"),
    Rule("{block}.{layer}.{part}", "{block}/{layer}/{part}"),
)


def find_weights(path: str | Path | None = None) -> Path:
    """The file with the FID network's weights, or a folder that holds them.

    Args:
      path: the file, or a folder that holds it, under one of the published names or as weights are named
        (`io.weight_files`); None looks into ~/.cache/lpl_jax and
        into the folder where PyTorch's ports download to.

    Raises:
      InputError: it is not there; says where it is published and where to put it.
    """
    given = None if path is None else to_path(path, "evaluation.inception")
    if given is not None and not given.is_dir():
        places = [given]
    elif given is not None and not any((given / name).is_file() for name in PUBLISHED) and has_weights(given):
        return given
    else:
        folders = map(to_path, FOLDERS) if given is None else [given]
        places = [folder / name for folder in folders for name in PUBLISHED]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        name, source = next(iter(PUBLISHED.items()))
        others = [folder + other for other, folder in PUBLISHED.items() if other != name]
        default = to_path(FOLDERS[0]) / name
        raise InputError(
            f"the FID network's weights are not at {' nor '.join(map(str, places))}: download {source}{name} (the same "
            f"file is {', '.join(others)}) to {default} or give its path; --features classifier needs no download"
        )
    return found


def load(path: str | Path | None = None) -> Inception:
    """The FID network with the weights of a file of pytorch-fid or torch-fidelity, or of a safetensors file.

    Args:
      path: see `find_weights`. A .pth file needs PyTorch to be read; nothing in it is executed.

    Raises:
      InputError: nothing there, a damaged file, another network's (torchvision's Inception v3 is one), or tensors that
        do not fit (they are named).
    """
    path = find_weights(path)
    tensors = read_weights(path, (ANCHOR,))
    classes = len(tensors["fc.weight"]) if "fc.weight" in tensors else CLASSES
    if classes != CLASSES or any(name.startswith("AuxLogits.") for name in tensors):
        raise InputError(
            f"{path} holds another Inception v3 ({classes} classes; torchvision's has 1000 and AuxLogits), with which "
            f"no FID is computed: {CLASSES} classes are needed, as in {' or '.join(PUBLISHED)}"
        )
    return Inception(jax.tree.map(jnp.asarray, import_params(tensors, RULES, shapes(), where=str(path))))


def save(inception: Inception, path: str | Path) -> None:
    """Write a safetensors file with PyTorch's names, which `load` reads where PyTorch is not installed.

    Raises:
      InputError: another ending than .safetensors, or a file that exists, which is not overwritten.
    """
    write_file(path, export_params(inception.params, RULES))
