"""Small evaluations while a run trains: a grid of samples and cheap metrics, through the evaluator of `lpl eval`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lpl_jax.data import ImageSource, LatentStore
from lpl_jax.data.configured import data_source
from lpl_jax.data.examples import is_stream
from lpl_jax.experiment import EvaluationConfig, Experiment
from lpl_jax.io.paths import AnyPath
from lpl_jax.io.pictures import write_picture
from lpl_jax.text import WordTokenizer
from lpl_jax.training.state import Frozen

# (step, params) -> metrics, and a picture (H, W, 3) uint8.
Evaluate = Callable[[int, Any], tuple[dict[str, float], np.ndarray]]


def periodic_evaluation(
    experiment: Experiment,
    frozen: Frozen,
    store: LatentStore,
    tokenizer: WordTokenizer | None,
    *,
    mesh: Mesh,
    workdir: AnyPath,
) -> Evaluate | None:
    """What is called every `evaluation.every` steps of a run, or None.

    It draws every class in turn, or the first captions of the store.
    """
    if experiment.evaluation.every is None:
        return None
    from lpl_jax.evaluation.prompts import store_captions  # most runs do without

    condition = np.arange(experiment.model.num_classes)
    if experiment.text is not None:
        assert tokenizer is not None
        captions = store_captions(store, experiment.evaluation.every_images)
        condition = tokenizer(captions, experiment.text.length)
    source = data_source(experiment)
    source = None if is_stream(source) else source
    return make_evaluation(experiment, frozen, source, condition, mesh=mesh, folder=workdir / "evaluation" / "training")


def check_evaluation(experiment: Experiment) -> None:
    """Raises InputError for what the evaluations during a run would not find, before anything is made for it."""
    if experiment.evaluation.every is None:
        return
    from lpl_jax.evaluation.inputs import check_inputs

    check_inputs(_small(experiment.evaluation), experiment.resolution)
    if experiment.evaluation.reference is None:
        data_source(experiment)


def _small(config: EvaluationConfig) -> EvaluationConfig:
    """What an evaluation during a run measures."""
    count = config.every_images
    changes: dict[str, Any] = dict(features="classifier", clip=None, prompts=None, resamples=0)
    return dataclasses.replace(config, num_images=count, reference_images=count, **changes)


def make_evaluation(
    experiment: Experiment,
    frozen: Frozen,
    source: ImageSource | None,
    condition: np.ndarray,
    *,
    mesh: Mesh,
    folder: AnyPath,
) -> Evaluate:
    """function(step, params) -> the metrics, and a grid of samples, which is also saved in `folder`.

    The metrics are those of the classifier's features on `every_images` images and as many real ones, without
    intervals: good for the course of one run, and not FID.

    Args:
      source: the run's data, the reference unless `evaluation.reference` names another. None, of data that is not read
        in any order (tar files): without a reference there are pictures alone.
      condition: what the images show, in turn: labels (N,), or of a run on text tokens (N, T).
    """
    from lpl_jax.evaluation.evaluate import first_images, grid, make_evaluator
    from lpl_jax.evaluation.extract import extract
    from lpl_jax.evaluation.metrics import score
    from lpl_jax.runs.sampling import image_sampler

    count = experiment.evaluation.every_images
    config = _small(experiment.evaluation)
    evaluator = None
    if source is not None or config.reference is not None:
        evaluator = make_evaluator(
            config,
            source=source,
            resolution=experiment.resolution,
            mesh=mesh,
            folder=folder / "features",
            limits=experiment.data.limits,
        )

    def evaluate(step: int, params) -> tuple[dict[str, float], np.ndarray]:
        draw = image_sampler(experiment, params, frozen.autoencoder, frozen.text, seed=config.seed, mesh=mesh)

        def images(rows):
            return draw(rows, condition[rows % len(condition)])

        metrics = {}
        if evaluator is not None:
            size, label = config.batch_size, f"evaluate step {step}"
            features = extract(images, count, evaluator.networks, mesh=mesh, batch_size=size, label=label)
            scores, _ = score(features, evaluator.reference, config)
            metrics = {f"evaluation/{name}": found.value for name, found in scores.items()}
        picture = grid(first_images(images, count, mesh), count)
        if jax.process_index() == 0:
            write_picture(folder / f"step{step:07d}.png", picture)
        return metrics, np.asarray(picture)

    return evaluate
