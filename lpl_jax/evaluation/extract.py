"""Features of a set of images: computed over all devices, part by part, and kept on disk so that nothing is redone.

    FOLDER/<key>/made.json         what the features are of, and by which networks; <key> is its hash
    FOLDER/<key>/part-000000.npz   features of images 0 to 1023, and so on

A part is a fixed range of images whatever the batch size and the devices. It appears under its name only when it is
complete, so an evaluation that was killed goes on where it was.
"""

import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lpl_jax import parallel
from lpl_jax.evaluation.generate import in_batches
from lpl_jax.evaluation.networks import Networks
from lpl_jax.evaluation.spectrum import SpectrumSum, power, radial_profile

PART = 1024


class Features(NamedTuple):
    """What is known of a set of N images.

    arrays: by name, each (N, ...) float32: "pool", and what else the networks give ("spatial", "logits", "clip").
    spectrum: power spectra; None where the images are not square.
    """

    arrays: dict[str, np.ndarray]
    spectrum: SpectrumSum | None

    def __len__(self) -> int:
        return len(self.arrays["pool"])


def key_of(made: Mapping[str, Any]) -> str:
    """Hash of what features were made of: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def extract(
    images: Callable[[np.ndarray], np.ndarray],
    count: int,
    networks: Networks,
    *,
    mesh: Mesh,
    batch_size: int,
    folder: str | Path | None = None,
    made: Mapping[str, Any] | None = None,
    label: str = "features",
) -> Features:
    """Features of images 0 to count-1, with a progress bar; parts that are on disk already are read.

    Args:
      images: function(rows (B,) int32) -> uint8 (B, H, W, 3); the same image for the same row, always.
      batch_size: images at a time over all devices; rounded up to a multiple of the parts that the mesh splits it into.
      folder: where the parts are kept; None: nowhere.
      made: plain values that say what images and networks these are: other values, other features. The number of
        images is no part of it: more of the same set go on from those that are there.
    """
    shards = parallel.batch_shards(mesh)
    batch_size = -(-min(batch_size, PART, count) // shards) * shards
    place = None if folder is None else _place(Path(folder), made)
    measure = _measurer(networks, mesh)
    parts = []
    with tqdm(total=count, desc=label, unit="img", leave=False, disable=jax.process_index() != 0) as bar:
        for start in range(0, count, PART):
            stop = min(start + PART, count)
            path = place / f"part-{start:06d}.npz" if place else None
            part = read_part(path, stop - start) if path else None
            if part is None:
                part = _compute(images, measure, start, stop, batch_size, bar)
                if path and jax.process_index() == 0:
                    write_part(path, part)
            else:
                bar.update(stop - start)
            parts.append(part)
    names = parts[0].keys() - {"power", "profiles"}
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}
    spectra = [SpectrumSum(part["power"], part["profiles"]) for part in parts if "power" in part]
    return Features(arrays, SpectrumSum.merge(spectra) if spectra else None)


def _place(folder: Path, made: Mapping[str, Any]) -> Path:
    """The folder of these features, with a file that says what they are of."""
    place = folder / key_of(made)
    if jax.process_index() == 0:
        place.mkdir(parents=True, exist_ok=True)
        (place / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    return place


def _compute(images, measure, start: int, stop: int, batch_size: int, bar) -> dict[str, np.ndarray]:
    """One part: arrays by name; of square images also their radial "profiles" and the sum of their "power"."""
    found: dict[str, list[np.ndarray]] = {}
    total = None

    def batch(rows):
        nonlocal total
        shown = images(rows)
        kept = min(len(rows), stop - rows[0])
        arrays, spectrum = measure(shown, np.arange(len(rows)) < kept)
        if spectrum is not None:
            total = np.float64(spectrum) if total is None else total + spectrum
        for name, array in arrays.items():
            found.setdefault(name, []).append(array[:kept])
        bar.update(int(kept))
        return rows

    in_batches(batch, start, stop, batch_size)
    part = {name: np.concatenate(arrays) for name, arrays in found.items()}
    return part if total is None else part | {"power": total}


def _measurer(networks: Networks, mesh: Mesh):
    """function(uint8 images, mask (B,)) -> (arrays by name, sum of the power spectra where the mask holds, or None)."""
    on_devices = parallel.put_replicated(networks, mesh)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def run(networks, images, prepared, mask):
        arrays = networks.features(images, prepared)
        if images.shape[1] != images.shape[2]:
            return arrays, None
        spectra = power(images)
        arrays["profiles"] = radial_profile(spectra)
        return arrays, (spectra * mask[:, None, None]).sum(0)

    def measure(images, mask):
        with jax.set_mesh(mesh):
            batch = parallel.put_global((images, networks.prepare(images), mask), mesh)
            return jax.device_get(run(on_devices, *batch))

    return measure


def write_part(path: Path, part: Mapping[str, np.ndarray]) -> None:
    """Written under another name first: what bears the name is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **part)
    partial.replace(path)


def read_part(path: Path, count: int) -> dict[str, np.ndarray] | None:
    """A part as it was written; None where there is none of `count` images, or it cannot be read (it is made again)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            part = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return part if len(part.get("pool", ())) == count else None
