"""What generated images are compared with: a set of real images, or statistics of one that somebody published."""

import concurrent.futures
import hashlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lpl_jax.data import ImageSource, Source, decoding, indexed
from lpl_jax.errors import InputError
from lpl_jax.evaluation.extract import Features, extract
from lpl_jax.evaluation.frechet import Gaussian, Statistics, read_statistics, statistics
from lpl_jax.evaluation.image_sets import RULES, ImageSet, open_images
from lpl_jax.evaluation.networks import Networks
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.npy import npz_names
from lpl_jax.io.paths import AnyPath, to_path

KINDS = ("pool", "spatial")


class Reference(NamedTuple):
    """What generated images are compared with.

    features: of the images, None where only statistics are known. statistics: by kind of feature. provenance: for
    the card.
    """

    features: Features | None
    statistics: dict[str, Statistics | Gaussian]
    provenance: dict[str, Any]


def load_reference(
    config: EvaluationConfig,
    source: Source | None,
    networks: Networks,
    provenance: dict[str, Any],
    *,
    resolution: int,
    mesh: Mesh,
    folder: AnyPath,
    limits: ImageLimits = DEFAULT,
) -> Reference:
    """The reference that `config.reference` names, its features computed or read from `folder`.

    Args:
      source: the images where the config names none: those of the run's data.
      provenance: of the networks.
      limits: the largest image that is read.

    Raises:
      InputError: no such file, images that are refused, statistics of other features.
    """
    path, published = _published(config)
    if path and published and "arr_0" not in npz_names(path):
        about = {
            "reference.source": f"statistics {path.name}",
            "reference.num_images": published["pool"].count or "not said in the file",
            "reference.statistics": statistics_hash(published["pool"]),
        }
        return Reference(None, published, about)
    images, count, about = _images(config, source, resolution, limits)
    features = extract(
        images,
        count,
        networks,
        mesh=mesh,
        batch_size=config.batch_size,
        folder=folder,
        provenance=about | provenance,
        label="reference",
    )
    own = {kind: statistics(features.arrays[kind]) for kind in KINDS if kind in features.arrays}
    if path and published:
        about["reference.source"] += f"; means and covariances as published in {path.name}"
    found = own | published
    about |= {"reference.num_images": count, "reference.statistics": statistics_hash(found["pool"])}
    return Reference(features, found, about)


def check_reference(config: EvaluationConfig, resolution: int, limits: ImageLimits = DEFAULT) -> None:
    """Raises InputError where the reference that is named cannot be one; of images the first alone is read."""
    path, published = _published(config)
    if config.reference is not None and not (path and published and "arr_0" not in npz_names(path)):
        open_images(config.reference, resolution=resolution, limits=limits)


def _published(config: EvaluationConfig) -> tuple[AnyPath | None, dict[str, Statistics | Gaussian]]:
    """The path of the reference that is named, and the statistics of features in it, by kind."""
    if config.reference is None:
        return None, {}
    path = to_path(config.reference, "evaluation.reference", remote=True)
    if path.suffix != ".npz" or "mu" not in (names := npz_names(path)):
        return path, {}
    if config.features != "inception":
        raise InputError(f"{path} holds statistics of Inception features; evaluation.features={config.features!r}")
    kinds = KINDS if "mu_s" in names else ("pool",)
    return path, {kind: read_statistics(path, kind) for kind in kinds}


def image_count(config: EvaluationConfig, resolution: int, limits: ImageLimits = DEFAULT) -> int:
    """How many images are evaluated: `evaluation.num_images`, of auto the number of the reference's images.

    Raises InputError where no reference is named, or its file does not say of how many images it is.
    """
    if config.num_images != "auto":
        return config.num_images
    config.check_reference()
    assert config.reference is not None
    path = to_path(config.reference, "evaluation.reference", remote=True)
    if path.suffix == ".npz" and "mu" in (names := npz_names(path)) and "arr_0" not in names:
        count = read_statistics(path, "pool").count
        if count is None:
            reason = "does not say of how many images its statistics are: give a number"
            raise InputError(f"evaluation.num_images=auto: {path} {reason}")
        return count
    count = len(open_images(config.reference, resolution=resolution, limits=limits))
    return min(count, config.reference_images or count)


def statistics_hash(stats: Statistics | Gaussian) -> str:
    """SHA-256 of mean and covariance, rounded to float32."""
    digest = hashlib.sha256()
    for array in (stats.mean, stats.covariance):
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()


def _images(config: EvaluationConfig, source, resolution: int, limits: ImageLimits):
    """(function rows -> images, how many, what the card says of them)."""
    if config.reference:
        images = open_images(config.reference, resolution=resolution, limits=limits)
        rules = {"reference.rules": RULES}
        name, crop, read = config.reference, "shorter side resized, centre crop", set_rows(images)
    else:
        images, rules = indexed(source), {}
        name, crop, read = source.description, str(source.crop), source_rows(source)
    order, about = None, {"reference.source": name, "reference.images": images.fingerprint, "reference.crop": crop}
    about |= rules
    about["reference.resolution"], about["reference.rules"] = resolution, decoding.RULES
    if config.reference_images and config.reference_images < len(images):
        order = np.random.default_rng(config.seed).permutation(len(images))[: config.reference_images]
        order.sort()
        about["reference.subset"] = f"{len(order)} of {len(images)}, drawn with seed {config.seed}"
    count = len(images) if order is None else len(order)
    return (read if order is None else lambda rows: read(order[rows])), count, about


def set_rows(images: ImageSet) -> Callable[[np.ndarray], np.ndarray]:
    """function(rows (B,)) -> uint8 images of an image set."""

    def read(rows):
        first, last = rows.min(), rows.max()
        if last - first < 2 * len(rows):  # a batch of neighbours, which is read ahead of itself
            return images[first : last + 1][rows - first]
        return np.concatenate([images[row : row + 1] for row in rows])

    return read


def source_rows(source: ImageSource) -> Callable[[np.ndarray], np.ndarray]:
    """function(rows) -> uint8 images of an image source, read by several threads."""
    pool = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    return lambda rows: np.stack(list(pool.map(lambda row: source[int(row)].image, rows)))
