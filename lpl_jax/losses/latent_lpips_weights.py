"""LatentLPIPS's weights from and to the files that its authors publish (licensed CC BY-NC 4.0, not for commercial use).

One file for each autoencoder holds the state dict of the whole distance: `net.slice{1..5}.{layer}` with torchvision's
numbers of the layers, `lin{0..4}.model.1`, and the latter again as `lins.{0..4}.model.1`. The files of the same place
that are named `*_latent_vgg16.pth.tar` are classifiers without the calibrated weights, and are not needed.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lpl_jax.errors import InputError, some
from lpl_jax.io.paths import to_path
from lpl_jax.io.porting import Rule, export_params, import_params
from lpl_jax.io.tensors import write_file
from lpl_jax.io.weight_files import has_weights, read_weights
from lpl_jax.losses.latent_lpips import LatentLPIPS, shapes

PUBLISHED_AT = "https://huggingface.co/Mingguksky/elatentlpips/resolve/main/elatentlpips_ckpt/"
# Autoencoder -> file. Those of Stable Diffusion 1.5, 2.1 and XL have 4 channels, those of 3 and of FLUX 16.
PUBLISHED = {name: f"{name}_latest_vgg16_tuned.pth" for name in ("sd15", "sd21", "sdxl", "sd3", "flux")}
FIRST = "net.slice1.0.weight"

RULES = (
    Rule("net.slice{i}.{j}.running_{statistic}", "slice_{i}/layer_{j}/{statistic}"),
    Rule("net.slice{i}.{j}", "slice_{i}/layer_{j}"),
    Rule("lin{i}.model.1", "lin_{i}"),
)


def load(path: str | Path) -> LatentLPIPS:
    """LatentLPIPS with the weights of a published file, or of a safetensors file that `save` wrote.

    Args:
      path: the file, or a folder with it alone. A .pth file needs PyTorch to be read; nothing in it is executed. The
        number of channels of the latents is that of its first convolution.

    Raises:
      InputError: nothing there (says where it is published), a damaged file, or tensors that do not fit, named.
    """
    path = to_path(path, "comparison.network")
    if not path.is_file() and not (path.is_dir() and has_weights(path)):
        raise InputError(
            f"{path} is not a file: E-LatentLPIPS is published at {PUBLISHED_AT} in {', '.join(PUBLISHED.values())}; "
            "download the one for your autoencoder"
        )
    tensors = _without_copies(read_weights(path, (FIRST,)), path)
    channels = tensors[FIRST].shape[1] if FIRST in tensors and tensors[FIRST].ndim == 4 else 4
    params = import_params(tensors, RULES, shapes(channels), where=str(path))
    return LatentLPIPS(jax.tree.map(jnp.asarray, params), channels)


def save(network: LatentLPIPS, path: str | Path) -> None:
    """Write a safetensors file with PyTorch's names, which `load` reads where PyTorch is not installed.

    Raises:
      InputError: another ending than .safetensors, or a file that exists, which is not overwritten.
    """
    tensors = export_params(network.params, RULES)
    copies = {name.replace("lin", "lins.", 1): tensor for name, tensor in tensors.items() if name.startswith("lin")}
    write_file(path, tensors | copies)


def _without_copies(tensors: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Leaves out lins.0 .. lins.4, the same modules under a second name, where the first is there too."""
    originals = {name: name.replace("lins.", "lin", 1) for name in tensors if name.startswith("lins.")}
    copies = {name: original for name, original in originals.items() if original in tensors}
    if odd := [name for name, original in copies.items() if not np.array_equal(tensors[name], tensors[original])]:
        raise InputError(f"{path}: {some(odd)} should repeat {some(copies[name] for name in odd)} and differ")
    return {name: tensor for name, tensor in tensors.items() if name not in copies}
