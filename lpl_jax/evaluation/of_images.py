"""The evaluation of a set of images: a folder, or an .npz."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpl_jax import parallel
from lpl_jax.data import check_outside
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, image_sets
from lpl_jax.evaluation.cards import Card
from lpl_jax.evaluation.evaluate import describe, evaluate, make_evaluator
from lpl_jax.evaluation.extract import extract
from lpl_jax.evaluation.frechet import statistics, write_statistics
from lpl_jax.evaluation.networks import load_networks
from lpl_jax.evaluation.prompts import read_prompts
from lpl_jax.evaluation.reference import image_count, set_rows
from lpl_jax.experiment import Experiment
from lpl_jax.io.locks import only_writers
from lpl_jax.io.paths import AnyPath, PathLike, to_path


def evaluate_images(
    path: PathLike, experiment: Experiment, out: PathLike | None, command: Sequence[str], side: int | None = None
) -> list[tuple[str, Card]]:
    """Scores a folder of images or an .npz; side: resized and cropped to it first."""
    config = experiment.evaluation
    config.check_clip_score()
    if config.reference is None:
        raise InputError("nothing to compare with: give --reference, a folder of images or an .npz file")
    if out is None:
        raise InputError("no place for the result: give --out FOLDER")
    out = to_path(out, "--out", remote=True)
    check_outside(str(path), out)
    images = image_sets.open_images(path, resolution=side, minimum=2, limits=experiment.data.limits)
    height, width = images.shape[:2]
    count = min(image_count(config, min(height, width), experiment.data.limits), len(images))
    print(f"scoring {count} of the {len(images)} images of {path}", flush=True)
    mesh = parallel.make_mesh(experiment.mesh)
    prompts = read_prompts(config.prompts, count) if config.prompts else None
    if prompts and len(prompts.lines) != count:
        raise InputError(f"evaluation.prompts={config.prompts} has {len(prompts.lines)} lines for {count} images")
    with only_writers(out):
        evaluator = make_evaluator(
            config,
            source=None,
            resolution=min(height, width),
            mesh=mesh,
            folder=out / cards.FEATURES,
            prompts=prompts,
            limits=experiment.data.limits,
        )
        provenance = {
            "images.source": str(path),
            "images.fingerprint": images.fingerprint,
            "images.rules": image_sets.RULES,
        }
        if side is not None:
            provenance["images.resized"] = f"shorter side to {side}, centre crop"
        _check_free(out, describe(evaluator, provenance, min(height, width), count))
        card = evaluate(
            evaluator,
            set_rows(images),
            count,
            provenance=provenance,
            resolution=min(height, width),
            out=out,
            context=cards.context(command),
            prompt_of=np.asarray if prompts else None,
            label=Path(path).name,
        )
    return [(str(out), card)]


def _check_free(out: AnyPath, provenance: dict[str, Any]) -> None:
    """A card is replaced by one that was made in the same way only."""
    if (out / "card.json").is_file() and cards.read_card(out).provenance != provenance:
        raise InputError(f"{out} holds the card of another evaluation: give another --out")


def save_statistics(path: PathLike, experiment: Experiment, out: AnyPath) -> int:
    """Writes what pytorch-fid and ADM's evaluator read: statistics of the Inception features of a set of images."""
    config = experiment.evaluation
    if config.features != "inception":
        raise InputError(f"--statistics are of Inception features; evaluation.features={config.features!r}")
    if out.suffix != ".npz" or out.exists():
        raise InputError(f"--statistics {out}: give the name of a new .npz file")
    images = image_sets.open_images(path, resolution=None, minimum=2, limits=experiment.data.limits)
    networks, _ = load_networks(config)
    mesh = parallel.make_mesh(experiment.mesh)
    found = extract(set_rows(images), len(images), networks, mesh=mesh, batch_size=config.batch_size)
    pool, spatial = (statistics(found.arrays[kind]) for kind in ("pool", "spatial"))
    write_statistics(out, pool, spatial)
    print(f"{out}: statistics of {len(images)} images of {path}")
    return 0
