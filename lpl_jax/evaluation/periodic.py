"""Small evaluations while a run trains: a grid of samples and cheap metrics, through the evaluator of `lpl eval`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import ImageSource
from lpl_jax.denoisers import MMDiTConfig
from lpl_jax.diffusion import Paradigm
from lpl_jax.evaluation.evaluate import grid, make_evaluator
from lpl_jax.evaluation.extract import extract
from lpl_jax.evaluation.generate import image_maker
from lpl_jax.evaluation.metrics import score
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.text import TextConditioner


def periodic_evaluation(
    config: EvaluationConfig,
    source: ImageSource | None,
    autoencoder: Autoencoder,
    *,
    model: MMDiTConfig,
    paradigm: Paradigm,
    resolution: int,
    given: np.ndarray,
    text: TextConditioner | None = None,
    mesh: Mesh,
    folder: str | Path,
    **sampling: Any,
) -> Callable[[int, Any], tuple[dict[str, float], np.ndarray]]:
    """function(step, params) -> (metrics by name, grid of samples (H, W, 3) uint8); the grid is also saved in `folder`.

    The metrics are those of the classifier's features on `every_images` images and as many real ones, without
    intervals: good for the course of one run, and not FID.

    Args:
      source: the run's data, the reference unless `config.reference` names another. None, of data that is not read in
        any order (tar files): without a reference there are pictures alone.
      given: what the images show, in turn: labels (N,), or with `text` tokens (N, T).
      sampling: sampler, steps, guidance, spacing.
    """
    config = dataclasses.replace(
        config,
        features="classifier",
        clip=None,
        prompts=None,
        num_images=config.every_images,
        reference_images=config.every_images,
        resamples=0,
    )
    folder = Path(folder)
    evaluator = None
    if source is not None or config.reference is not None:
        evaluator = make_evaluator(config, source=source, resolution=resolution, mesh=mesh, folder=folder / "features")
    options = dict(model=model, paradigm=paradigm, resolution=resolution, text=text, mesh=mesh, seed=config.seed)
    options |= sampling
    count = config.num_images

    def run(step: int, params) -> tuple[dict[str, float], np.ndarray]:
        make = image_maker(params, autoencoder, **options)

        def images(rows):
            return make(rows, given[rows % len(given)])

        metrics, label = {}, f"evaluate step {step}"
        if evaluator is not None:
            size = config.batch_size
            features = extract(images, count, evaluator.networks, mesh=mesh, batch_size=size, label=label)
            metrics, _ = score(features, evaluator.reference, config)
        picture = grid(images, count, mesh)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"step{step:07d}.png")
        return {f"evaluation/{name}": found.value for name, found in metrics.items()}, np.asarray(picture)

    return run
