"""Features of a set of images: computed over all devices, part by part, and kept on disk so that nothing is redone.

    FOLDER/<key>/made.json         what the features are of, and by which networks; <key> is its hash
    FOLDER/<key>/part-000000-001024.npz   features of images 0 to 1023, and so on

A part is a fixed range of images whatever the batch size and the devices. It is written when all of its images are
seen, or those before an interruption, and is written atomically: an evaluation that was stopped resumes there.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lpl_jax import parallel
from lpl_jax.errors import InputError
from lpl_jax.evaluation.cards import PLACES
from lpl_jax.evaluation.networks import Networks
from lpl_jax.evaluation.spectrum import SpectrumSum, power, radial_profile
from lpl_jax.io.atomic import write_json
from lpl_jax.io.fingerprints import fingerprint_texts, fingerprint_values
from lpl_jax.io.npy import read_npz, write_npz
from lpl_jax.io.paths import AnyPath, PathLike, to_path
from lpl_jax.io.progress import progress_bar

PART = 1024
PLACE = "place"  # in the file of a part: a fingerprint of its folder and name


class Features(NamedTuple):
    """What is known of a set of N images.

    arrays: by name, each (N, ...) float32: "pool", and what else the networks give ("spatial", "logits", "clip").
    spectrum: power spectra; None where the images are not square.
    """

    arrays: dict[str, np.ndarray]
    spectrum: SpectrumSum | None

    def __len__(self) -> int:
        return len(self.arrays["pool"])


def extract(
    images: Callable[[np.ndarray], np.ndarray],
    count: int,
    networks: Networks,
    *,
    mesh: Mesh,
    batch_size: int,
    folder: PathLike | None = None,
    provenance: Mapping[str, Any] | None = None,
    label: str = "features",
) -> Features:
    """Features of images 0 to count-1, with a progress bar; parts that are on disk already are read.

    Args:
      images: function(rows (B,) int32) -> uint8 (B, H, W, 3); the same image for the same row, always.
      batch_size: images at a time over all devices; rounded up to a multiple of the parts that the mesh splits it into.
      folder: where the parts are kept; None: nowhere.
      provenance: plain values that say what images and networks these are: other values, other features. The number of
        images is no part of it: more images of the same set continue those that are there.
    """
    shards = parallel.batch_shards(mesh)
    batch_size = -(-min(batch_size, PART, count) // shards) * shards
    kept = None if folder is None else _kept(folder, provenance or {})
    measure = _measurer(networks, mesh)
    parts = []
    with progress_bar(total=count, desc=label, unit="img", leave=False, disable=jax.process_index() != 0) as bar:
        for start in range(0, count, PART):
            stop = min(start + PART, count)
            path = kept / f"part-{start:06d}-{stop:06d}.npz" if kept else None
            part = _Part(read_part(path, stop - start) if path else None)
            bar.update(len(part))
            try:
                for first in range(start + len(part), stop, batch_size):
                    rows = np.arange(first, first + batch_size, dtype=np.int32).clip(max=stop - 1)
                    arrays, power = measure(images(rows), np.arange(batch_size) < stop - first)
                    part.add(arrays, power, stop - first)
                    bar.update(min(batch_size, stop - first))
            finally:  # what was computed before an interruption is not computed again
                if path and part.grown and jax.process_index() == 0:
                    write_part(path, part.arrays())
            parts.append(part.arrays())
    names = parts[0].keys() - {"power", "profiles"}
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}
    spectra = [SpectrumSum(part["power"], part["profiles"]) for part in parts if "power" in part]
    return Features(arrays, SpectrumSum.merge(spectra) if spectra else None)


def _kept(folder: PathLike, provenance: Mapping[str, Any]) -> AnyPath:
    """The folder of these features, with a file that says what they are of.

    It is named by what identifies images and networks, wherever they lie.
    """
    what = {name: value for name, value in provenance.items() if name not in PLACES}
    kept = to_path(folder, "evaluation.cache", remote=True) / fingerprint_values(what)[:16]
    if jax.process_index() == 0:
        write_json(kept / "made.json", provenance)
    return kept


class _Part:
    """A part in the making: arrays by name; of square images also "profiles" and the sum of their "power"."""

    def __init__(self, known: dict[str, np.ndarray] | None):
        known = dict(known or {})
        self._power = known.pop("power", None)
        self._found = {name: [array] for name, array in known.items()}
        self.grown = False

    def __len__(self) -> int:
        return sum(map(len, self._found.get("pool", ())))

    def add(self, arrays: Mapping[str, np.ndarray], power: np.ndarray | None, kept: int) -> None:
        """The first `kept` rows of a batch."""
        for name, array in arrays.items():
            self._found.setdefault(name, []).append(array[:kept])
        if power is not None:
            self._power = np.float64(power) if self._power is None else self._power + power
        self.grown = True

    def arrays(self) -> dict[str, np.ndarray]:
        found = {name: np.concatenate(arrays) for name, arrays in self._found.items()}
        if self._power is not None:
            found["power"] = np.asarray(self._power)
        return found


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


def write_part(path: AnyPath, arrays: Mapping[str, np.ndarray]) -> None:
    """A part, which says what it is of: a file of another range or folder in its place is not taken for it."""
    write_npz(path, {**arrays, PLACE: _place(path)})


def read_part(path: AnyPath, count: int) -> dict[str, np.ndarray] | None:
    """A part as it was written, of its images up to `count`; None where it cannot be used (then it is computed)."""
    if not path.is_file():
        return None
    try:
        part = read_npz(path)
    except InputError:
        return None
    place = part.pop(PLACE, None)  # parts of earlier versions have none
    if place is not None and not np.array_equal(place, _place(path)):
        return None
    each = {name: array for name, array in part.items() if name != "power"}
    kept = {len(array) if array.ndim > 1 and array.dtype.kind == "f" else 0 for array in each.values()}
    spectra = [part[name].shape[-1] for name in ("power", "profiles") if name in part]
    fits = "pool" in part and len(kept) == 1 and 0 < max(kept) <= count and _fit(spectra, part)
    return part if fits and all(np.isfinite(array).all() for array in part.values()) else None


def _fit(spectra: list[int], part: Mapping[str, np.ndarray]) -> bool:
    """Whether power and profiles are of images of one size, or neither is there."""
    if not spectra:
        return True
    return len(spectra) == 2 and part["power"].shape == (spectra[0],) * 2 and spectra[1] == spectra[0] // 2 + 1


def _place(path: AnyPath) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(fingerprint_texts(path.parent.name, path.name)), np.uint8)
