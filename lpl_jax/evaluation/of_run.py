"""Evaluations of a run's checkpoints: which ones, in which settings, and what their cards say of the images."""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lpl_jax import parallel
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, fluctuation
from lpl_jax.evaluation.cards import Card
from lpl_jax.evaluation.evaluate import describe, evaluate, make_evaluator
from lpl_jax.evaluation.prompts import Prompts, read_prompts
from lpl_jax.evaluation.reference import image_count
from lpl_jax.evaluation.sweep import write_sweep
from lpl_jax.experiment import EvaluationConfig, Experiment, SamplingConfig, to_dict
from lpl_jax.io.fingerprints import fingerprint
from lpl_jax.io.locks import only_writers
from lpl_jax.io.paths import PathLike, to_path
from lpl_jax.runs import Run, checkpoints
from lpl_jax.runs.sampling import ROUNDING

# What a given config has to share with the run; of the model, what does not touch the numbers may differ.
SHARED = ("resolution", "paradigm", "model", "autoencoder", "text")
RESOLVED = ("model.latent_channels", "model.context_dim", "model.pooled_dim")
FREE = (*RESOLVED, "model.dtype", "model.remat", "model.attention", "autoencoder.dtype", "text.dtype")


class Lists(NamedTuple):
    """What a run is evaluated with, in all combinations; an empty one stands for the run's own.

    checkpoint: steps, or ("all",). weights: names, or ("all",), every average, of a run without any its parameters.
    """

    checkpoint: Sequence[int | str] = ()
    weights: Sequence[str] = ()
    guidance: Sequence[float] = ()
    steps: Sequence[int] = ()


class Setting(NamedTuple):
    """One evaluation of a run."""

    checkpoint: int
    weights: str
    guidance: float
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        weights = self.weights if self.weights == "params" else f"ema{self.weights}"
        return f"step{self.checkpoint}_{weights}_steps{self.steps}_guidance{self.guidance:g}"


def evaluate_run(
    run: Run, experiment: Experiment, lists: Lists, *, command: Sequence[str], out: PathLike | None = None
) -> list[tuple[str, Card]]:
    """Evaluates checkpoints of a run, all combinations of the lists; writes a table and curves where there are several.

    Args:
      experiment: its sections evaluation, sampling and mesh count; the rest has to be the run's.
      out: folder of the cards; None: the run's own.
      command: for the cards' context.
    """
    check_shared(run, experiment)
    settings = _settings(run, experiment.sampling, lists)
    out = to_path(out, "--out", remote=True) if out else run.workdir / cards.FOLDER
    config, mesh = experiment.evaluation, parallel.make_mesh(experiment.mesh)
    count = image_count(config, run.experiment.resolution, experiment.data.limits)
    prompts = _prompts(run, config, count)
    condition = run.condition(prompts.lines if run.text and prompts else range(run.experiment.model.num_classes))
    evaluator = make_evaluator(
        config,
        source=None if config.reference else run.source,
        resolution=run.experiment.resolution,
        mesh=mesh,
        folder=out / cards.FEATURES,
        prompts=prompts,
        limits=experiment.data.limits,
    )
    about = _about(run)
    results, params, loaded = [], None, None
    # A table is of the folder, so that of two such calls the second is refused before it has worked for hours.
    with only_writers(out) if len(settings) > 1 else contextlib.nullcontext():
        for setting in settings:
            if loaded != setting[:2]:
                loaded = setting[:2]
                params = run.params(step=setting.checkpoint, weights=setting.weights, mesh=mesh)
            chosen = dict(guidance=setting.guidance, guidance_resolution=None, steps=setting.steps)
            sampling = dataclasses.replace(experiment.sampling, **chosen)
            draw = run.images(params=params, sampling=sampling, mesh=mesh, seed=config.seed)
            provenance = about | _about_setting(run, sampling, setting, config.seed)
            # With a hash of all settings: other numbers of images, references or features are other folders.
            key = cards.key_of(describe(evaluator, provenance, run.experiment.resolution, count))
            with only_writers(out / f"{setting.name}_{key}"):
                card = evaluate(
                    evaluator,
                    lambda rows, draw=draw: draw(rows, condition[rows % len(condition)]),
                    count,
                    provenance=provenance,
                    resolution=run.experiment.resolution,
                    out=out / f"{setting.name}_{key}",
                    context=cards.context(command),
                    prompt_of=lambda rows: rows % len(condition),
                    label=setting.name,
                )
            results.append((str(out / f"{setting.name}_{key}"), card))
        if len(results) > 1:
            table = [(setting._asdict(), card) for setting, (_, card) in zip(settings, results, strict=True)]
            print(f"written to {write_sweep(table, out)}")
            alike = [
                ({name: value for name, value in each.items() if name != "checkpoint"}, card) for each, card in table
            ]
            print(fluctuation.markdown(fluctuation.table(alike)), end="")
    return results


def _prompts(run: Run, config: EvaluationConfig, count: int) -> Prompts | None:
    """What a run on text draws: the given prompts or those that it learns from. Of classes: a text for each."""
    experiment = run.experiment
    if experiment.text is not None:
        return read_prompts(config.prompts or experiment.data.store or run.workdir / "latents", count)
    config.check_clip_score()
    prompts, classes = read_prompts(config.prompts) if config.prompts else None, experiment.model.num_classes
    if prompts and len(prompts.lines) != classes:
        raise InputError(f"evaluation.prompts={config.prompts} has {len(prompts.lines)} lines for {classes} classes")
    return prompts


def _settings(run: Run, sampling: SamplingConfig, lists: Lists) -> list[Setting]:
    """All combinations of what is given, in the order of the lists."""
    if list(lists.checkpoint) == ["all"]:
        steps = run.steps
    else:
        steps = [run.step(int(step)) for step in lists.checkpoint] or [run.step()]
    names = lists.weights or (sampling.weights,)
    if list(names) == ["all"]:
        names = run.weight_names[1:] or run.weight_names
    combinations = itertools.product(
        steps or [run.step()],
        [run.weights(name) for name in names],
        lists.guidance or [sampling.guidance_at(run.experiment.resolution)],
        lists.steps or [sampling.steps],
    )
    settings = [Setting(*values) for values in combinations]
    for setting in settings:
        chosen = dict(guidance=setting.guidance, guidance_resolution=None, steps=setting.steps)
        dataclasses.replace(sampling, **chosen).check_for(run.experiment.paradigm)
    return settings


def _about(run: Run) -> dict[str, Any]:
    """What all images of a run have in common, for the card."""
    experiment = run.experiment
    drawn = {"labels": f"number of the image modulo {experiment.model.num_classes}"}
    if run.text is not None and experiment.text is not None:
        drawn = {
            "text": experiment.text.source,
            "text.weights": fingerprint(run.text.clip.params),
            "text.prompt": "in their order",
        }
    control = {"control": f"original size {experiment.resolution}, crop at 0"} if experiment.model.control else {}
    return {
        "run": str(run.workdir),
        "paradigm": experiment.paradigm.name,
        "paradigm.schedule_rescale": experiment.paradigm.schedule_rescale,
        "autoencoder": run.autoencoder.config.name,
        "autoencoder.weights": fingerprint(run.autoencoder.params),
        "rounding": ROUNDING,
        **drawn,
        "model.dtype": experiment.model.dtype,
        **control,
    }


def _about_setting(run: Run, sampling: SamplingConfig, setting: Setting, seed: int) -> dict[str, Any]:
    return {
        "checkpoint.step": setting.checkpoint,
        "checkpoint.weights": setting.weights,
        "checkpoint.fingerprint": checkpoints.fingerprint(run.checkpoints, setting.checkpoint),
        "sampling.sampler": sampling.sampler or run.experiment.paradigm.samplers[0],
        "sampling.steps": sampling.steps,
        "sampling.spacing": sampling.spacing,
        "sampling.guidance": sampling.guidance,
        "sampling.seed": seed,
    }


def check_shared(run: Run, given: Experiment) -> None:
    """A given config must describe the run, in what its images depend on. Raises InputError where it does not."""

    def flat(experiment: Experiment) -> dict[str, Any]:
        tree, found = to_dict(experiment), {}
        for section in SHARED:
            value = tree[section]
            found |= {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {section: value}
        return {name: value for name, value in found.items() if name not in FREE}

    theirs, ours = flat(run.experiment), flat(given)
    if differing := [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]:
        text = "; ".join(f"{name} is {theirs.get(name)!r}, given {ours.get(name)!r}" for name in differing)
        raise InputError(
            f"the config is not that of the run in {run.workdir}: {text}; leave --config out to take its own"
        )
