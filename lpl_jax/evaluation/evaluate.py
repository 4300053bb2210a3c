"""One evaluator for generated images and for those of other people: features, metrics, card and pictures."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from lpl_jax import parallel
from lpl_jax.data import Source
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards
from lpl_jax.evaluation.cards import Card
from lpl_jax.evaluation.clip_score import clip_scores, text_features
from lpl_jax.evaluation.extract import Features, extract
from lpl_jax.evaluation.figures import panels
from lpl_jax.evaluation.metrics import prdc_rows, score
from lpl_jax.evaluation.networks import Networks, load_networks
from lpl_jax.evaluation.prompts import Prompts
from lpl_jax.evaluation.reference import Reference, load_reference
from lpl_jax.evaluation.spectrum import SpectrumSum, log_ratio_map
from lpl_jax.evaluation.spectrum_plots import plot_errors, plot_maps
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.io.atomic import atomic_open
from lpl_jax.io.image_limits import DEFAULT, ImageLimits
from lpl_jax.io.npy import read_npz, write_npz
from lpl_jax.io.paths import AnyPath, PathLike, to_path
from lpl_jax.io.pictures import write_picture
from lpl_jax.runs.sampling import in_batches
from lpl_jax.text import load_tokenizer

SPECTRA = "spectrum.npz"
MAX_SPECTRA = 2**30  # bytes
MEANS = ("power", "profile")  # what is kept of a set's spectra
SHOWN, PER_ROW = 32, 8  # images in the picture of an evaluation


class Evaluator(NamedTuple):
    """All that evaluations of several sets share: loaded and computed once.

    networks_provenance, prompts_provenance: for the card. prompts: embeddings (P, D), or None. folder: features are
    kept in it.
    """

    config: EvaluationConfig
    networks: Networks
    networks_provenance: dict[str, Any]
    reference: Reference
    prompts: np.ndarray | None
    prompts_provenance: dict[str, Any]
    mesh: Mesh
    folder: AnyPath


def make_evaluator(
    config: EvaluationConfig,
    *,
    source: Source | None,
    resolution: int,
    mesh: Mesh,
    folder: PathLike,
    prompts: Prompts | None = None,
    limits: ImageLimits = DEFAULT,
) -> Evaluator:
    """Loads the networks and computes the features of the reference, or reads them where they were computed before.

    Args:
      source: the run's data, which is the reference where `config.reference` is None.
      resolution: side of the images that will be evaluated; reference images of another size are brought to it.
      folder: where features are kept unless `config.cache` says otherwise.
      prompts: for CLIPScore, where the config names CLIP weights, and for the card.
      limits: the largest reference image that is read.
    """
    if config.reference is None and source is None:
        raise InputError("nothing to compare with: give evaluation.reference, a folder of images or an .npz file")
    folder = to_path(config.cache or folder, "evaluation.cache", remote=True)
    networks, provenance = load_networks(config)
    embedded = None
    if prompts is not None and config.clip is not None and networks.clip is not None:
        embedded = text_features(networks.clip.clip, load_tokenizer(config.clip), prompts.lines)
    # Last, as it takes long: what else is missing has been said.
    reference = load_reference(
        config, source, networks, provenance, resolution=resolution, mesh=mesh, folder=folder, limits=limits
    )
    prompts_provenance = prompts.provenance if prompts is not None else {}
    return Evaluator(config, networks, provenance, reference, embedded, prompts_provenance, mesh, folder)


def evaluate(
    evaluator: Evaluator,
    images: Callable[[np.ndarray], np.ndarray],
    count: int,
    *,
    provenance: Mapping[str, Any],
    resolution: int,
    out: PathLike,
    context: Mapping[str, Any],
    prompt_of: Callable[[np.ndarray], np.ndarray] | None = None,
    label: str = "images",
) -> Card:
    """Scores images 0 to count-1 and writes card.json, card.md, grid.png, samples.npy and the spectra into `out`.

    Args:
      images: function(rows (B,) int32) -> uint8 (B, H, W, 3).
      provenance: what the images depend on, plain values by dotted name.
      resolution: of the images.
      context: of `cards.context`.
      prompt_of: function(rows) -> their rows in `evaluator.prompts`; None where there are no prompts for them.
    """
    config, out = evaluator.config, to_path(out, "--out", remote=True)
    if count < 2:
        raise InputError(f"{label}: {count} image given; an evaluation needs at least 2")
    features = extract(
        images,
        count,
        evaluator.networks,
        mesh=evaluator.mesh,
        batch_size=config.batch_size,
        folder=evaluator.folder,
        provenance={**provenance, "resolution": resolution, **evaluator.networks_provenance},
        label=label,
    )
    clip = None
    if evaluator.prompts is not None and prompt_of is not None:
        prompts = evaluator.prompts[prompt_of(np.arange(count))]
        clip = clip_scores(images=features.arrays["clip"], texts=prompts)
    metrics, absent = score(features, evaluator.reference, config, clip)
    card = Card(metrics, absent, describe(evaluator, provenance, resolution, count), dict(context))
    shown = first_images(images, count, evaluator.mesh)
    if jax.process_index() == 0:
        cards.write_card(card, out)
        write_picture(out / "grid.png", grid(shown, count))
        with atomic_open(out / cards.SAMPLES) as file:
            np.save(file, shown[:PER_ROW])
        _spectra(features, evaluator.reference, out)
    return card


def describe(evaluator: Evaluator, provenance: Mapping[str, Any], resolution: int, count: int) -> dict[str, Any]:
    """Everything that the numbers of an evaluation depend on: `provenance` of its card."""
    config = evaluator.config
    settings = {
        "metrics.k": config.k,
        "metrics.k_density": config.k_density or config.k,
        "metrics.splits": config.splits,
        "metrics.covariance": "divided by N - 1, float64",
        "metrics.intervals": f"{config.resamples} resamples, seed {config.seed}" if config.resamples else "none",
    }
    real = evaluator.reference.features
    if real is not None and (rows := prdc_rows(len(real), config)) is not None:
        settings["metrics.prdc_references"] = f"{len(rows)} of {len(real)}, drawn with seed {config.seed}"
    prompts = evaluator.prompts_provenance
    first = {"num_images": count, "resolution": resolution}
    return {
        **first,
        **provenance,
        **evaluator.networks_provenance,
        **evaluator.reference.provenance,
        **prompts,
        **settings,
    }


def first_images(images: Callable[[np.ndarray], np.ndarray], count: int, mesh: Mesh) -> np.ndarray:
    """The first images of a set of `count`, (N, H, W, 3) uint8, as many as a picture of it has."""
    shown = min(count, SHOWN)
    batch = -(-shown // parallel.batch_shards(mesh)) * parallel.batch_shards(mesh)
    return in_batches(images, 0, shown, batch)


def grid(shown: np.ndarray, count: int) -> Image.Image:
    """The picture of a set of `count` images: its first ones."""
    return panels({f"{len(shown)} of {count}": shown}, per_row=PER_ROW)


def _spectra(features: Features, reference: Reference, out: AnyPath) -> None:
    ours, theirs = features.spectrum, reference.features.spectrum if reference.features else None
    if ours is None or theirs is None or ours.resolution != theirs.resolution:
        return
    write_spectra(out, {"images": ours}, theirs)
    means = {"images": ours, "reference": theirs}
    write_npz(out / SPECTRA, {f"{name}_{kind}": getattr(m, kind) for name, m in means.items() for kind in MEANS})


def write_spectra(out: AnyPath, sets: Mapping[str, SpectrumSum], reference: SpectrumSum) -> None:
    """spectrum.png and .csv (Fig. 5); spectrum_map.png and .npz (Fig. 4), of all pairs and against the reference."""
    plot_errors(out / "spectrum.png", sets, reference)
    pairs = [*itertools.combinations(sets.items(), 2), *((pair, ("reference", reference)) for pair in sets.items())]
    plot_maps(out / "spectrum_map.png", {f"{a} / {b}": log_ratio_map(x, y) for (a, x), (b, y) in pairs})


def read_spectra(folder: PathLike) -> tuple[SpectrumSum, SpectrumSum] | None:
    """Mean spectra of an evaluation's images and of its reference, each as of one image; None where it has none."""
    path = to_path(folder, "an evaluation", remote=True) / SPECTRA
    if not path.is_file():
        return None
    arrays = read_npz(path, most=MAX_SPECTRA)
    sets = []
    for name in ("images", "reference"):
        given = [arrays.get(f"{name}_{kind}") for kind in MEANS]
        sets.append(_as_of_one_image(path, name, *given))
    return sets[0], sets[1]


def _as_of_one_image(path: AnyPath, name: str, power: np.ndarray | None, profile: np.ndarray | None) -> SpectrumSum:
    """Raises InputError unless they are the mean power (H, H) and its profile (H // 2 + 1,)."""
    if power is None or profile is None:
        raise InputError(f"{path}: {name}_power or {name}_profile is missing")
    side = len(power) if power.ndim else 0
    if not side or power.shape != (side, side) or profile.shape != (side // 2 + 1,):
        raise InputError(f"{path}: {name}_power {power.shape} and {name}_profile {profile.shape} do not fit")
    if not all(np.isfinite(array).all() and (array >= 0).all() for array in (power, profile)):
        raise InputError(f"{path}: the power in {name} is negative or not finite")
    return SpectrumSum(power, profile[None])


def summary(results: Sequence[tuple[str, Card]]) -> str:
    """One line for each card: its name and metrics."""
    lines = []
    for name, card in results:
        values = ", ".join(f"{metric} {found.value:.4g}" for metric, found in card.metrics.items())
        lines.append(f"{name}: {values}")
    return "\n".join(lines)
