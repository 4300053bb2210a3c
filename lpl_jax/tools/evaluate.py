"""Evaluate the checkpoints of a run, or a set of images, against real images.

    lpl eval --workdir runs/lpl --reference /data/imagenet/val
    lpl eval --workdir runs/lpl --checkpoint 10000,20000 --weights params,0.9999
    lpl eval --images samples/ --reference /data/imagenet/val --out results/theirs

The sections sampling, mesh and evaluation of the config count; what the images depend on besides is the run's own.
Features that were computed are not computed again. `lpl compare` sets the cards that it leaves side by side.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.autoencoders import weights_hash
from lpl_jax.configs import base
from lpl_jax.diffusion import ddim_grid, flow_grid
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, image_sets
from lpl_jax.evaluation.cards import Card
from lpl_jax.evaluation.evaluate import describe, evaluate, make_evaluator, summary
from lpl_jax.evaluation.extract import extract
from lpl_jax.evaluation.frechet import statistics, write_statistics
from lpl_jax.evaluation.generate import ROUNDING, image_maker
from lpl_jax.evaluation.metrics import DISTANCES
from lpl_jax.evaluation.networks import load_networks
from lpl_jax.evaluation.prompts import Prompts, read_prompts
from lpl_jax.evaluation.reference import set_rows
from lpl_jax.evaluation.sweep import write_sweep
from lpl_jax.experiment import Experiment, build, resolve, to_dict
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.runs import checkpoints
from lpl_jax.runs.workdir import CHECKPOINTS, default_weights, read_experiment
from lpl_jax.text import TextConditioner, load_conditioner
from lpl_jax.tools import cli, config_file, flags
from lpl_jax.training.data import data_source

FEATURES = "features"
# What a given config has to share with the run; of the model, what does not touch the numbers may differ.
SHARED = ("resolution", "paradigm", "model", "autoencoder", "text")
RESOLVED = ("model.latent_channels", "model.context_dim", "model.pooled_dim")
FREE = (*RESOLVED, "model.dtype", "model.remat", "model.attention", "autoencoder.dtype", "text.dtype")
LISTS = ("checkpoint", "weights", "guidance", "steps")  # flags that take several values


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


def parser() -> cli.Parser:
    """The flags of `lpl eval`."""
    result = cli.Parser(__doc__, prog="lpl eval")
    add = result.add_argument
    flags.add(result, "workdir")
    flags.add(result, "images")
    flags.add(result, "out", note="WORKDIR/evaluation")
    add("--reference", type=cli.text, metavar="SET",
        help="real images, or .npz statistics (runs: the images that the run learns from)")  # fmt: skip
    add("--features", **cli.one_of(DISTANCES), help="inception: FID; classifier: ours, for comparisons only")
    flags.add(result, "resolution", note="as --images are")
    add("--statistics", type=flags.path, metavar="FILE.npz",
        help="only write means and covariances of --images, as pytorch-fid and ADM have them")  # fmt: skip
    flags.add_config(result, note="that of the run, or base")
    # Every combination of these is evaluated, with a table and curves.
    lists = result.add_argument_group("of a run; with several values, each combination is evaluated")
    flags.add(lists, "checkpoint", several=True, words=("all",), note="the newest")
    flags.add(lists, "weights", several=True, note="the first average")
    flags.add(lists, "guidance", several=True, note="sampling.guidance")
    flags.add(lists, "steps", several=True, note="sampling.steps")
    flags.add_processes(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments behind the verb -> exit status."""
    args = parser().parse_args(argv)
    if bool(args.workdir) == bool(args.images):
        raise InputError("give one of --workdir RUN (evaluate its checkpoints) and --images SET (evaluate these)")
    default = base.get_config()
    config = config_file.given(args, _config_of(args.workdir, default) if args.workdir else default)
    flags.join_processes(args)
    for name in ("features", "reference"):
        if getattr(args, name) is not None:
            config.evaluation[name] = getattr(args, name)
    experiment = build(config)
    command = ["lpl", "eval", *argv]
    lists = {name: getattr(args, name) for name in LISTS}
    if args.images:
        if used := [name for name, values in lists.items() if values]:
            raise InputError(f"--{used[0]} is for runs; --images takes images as they are")
        if args.statistics:
            return save_statistics(args.images, experiment, args.statistics)
        results = evaluate_images(args.images, experiment, args.out, command, args.resolution)
    elif args.resolution or args.statistics:
        raise InputError("--resolution and --statistics are for --images")
    else:
        results = evaluate_run(args.workdir, experiment, args.out, command, lists)
    if jax.process_index() == 0:
        print(summary(results))
    return 0


def evaluate_images(
    path: str, experiment: Experiment, out: Path | None, command: Sequence[str], side: int | None = None
) -> list[tuple[str, Card]]:
    """Scores a folder of images or an .npz; side: resized and cropped to it first."""
    config = experiment.evaluation
    config.check_clip_score()
    if config.reference is None:
        raise InputError("nothing to compare with: give --reference, a folder of images or an .npz file")
    if out is None:
        raise InputError("no place for the result: give --out FOLDER")
    images = image_sets.open_images(path, resolution=side, minimum=2)
    count = min(config.num_images, len(images))
    print(f"scoring {count} of the {len(images)} images of {path}", flush=True)
    height, width = images.shape[:2]
    mesh = parallel.make_mesh(experiment.mesh)
    prompts = read_prompts(config.prompts, count) if config.prompts else None
    if prompts and len(prompts.lines) != count:
        raise InputError(f"evaluation.prompts={config.prompts} has {len(prompts.lines)} lines for {count} images")
    evaluator = make_evaluator(
        config, source=None, resolution=min(height, width), mesh=mesh, folder=Path(out) / FEATURES, prompts=prompts
    )
    made = {"images.source": str(path), "images.fingerprint": images.fingerprint, "images.rules": image_sets.RULES}
    if side is not None:
        made["images.resized"] = f"shorter side to {side}, centre crop"
    _check_free(Path(out), describe(evaluator, made, min(height, width), count))
    card = evaluate(
        evaluator,
        set_rows(images),
        count,
        made=made,
        resolution=min(height, width),
        out=out,
        context=cards.context(command),
        prompt_of=np.asarray if prompts else None,
        label=Path(path).name,
    )
    return [(str(out), card)]


def _check_free(out: Path, made: dict[str, Any]) -> None:
    """A card is replaced by one that was made in the same way only."""
    if (out / "card.json").is_file() and cards.read_card(out).made != made:
        raise InputError(f"{out} holds the card of another evaluation: give another --out")


def save_statistics(path: str, experiment: Experiment, out: Path) -> int:
    """Writes what pytorch-fid and ADM's evaluator read: statistics of the Inception features of a set of images."""
    config = experiment.evaluation
    if config.features != "inception":
        raise InputError(f"--statistics are of Inception features; evaluation.features={config.features!r}")
    if out.suffix != ".npz" or out.exists():
        raise InputError(f"--statistics {out}: give the name of a new .npz file")
    images = image_sets.open_images(path, resolution=None, minimum=2)
    networks, _ = load_networks(config)
    mesh = parallel.make_mesh(experiment.mesh)
    found = extract(set_rows(images), len(images), networks, mesh=mesh, batch_size=config.batch_size)
    pool, spatial = (statistics(found.arrays[kind]) for kind in ("pool", "spatial"))
    write_statistics(out, pool, spatial)
    print(f"{out}: statistics of {len(images)} images of {path}")
    return 0


def evaluate_run(
    workdir: Path,
    experiment: Experiment,
    out: Path | None,
    command: Sequence[str],
    lists: Mapping[str, list | None] | None = None,
) -> list[tuple[str, Card]]:
    """Evaluates checkpoints of a run, all combinations of the lists; writes a table and curves where there are several.

    Args:
      experiment: its sections evaluation, sampling and mesh count; the rest has to be the run's.
    """
    run = read_experiment(workdir)
    _check_shared(run, experiment, workdir)
    settings = _settings(workdir, run, experiment, lists or {})
    out = Path(out) if out else workdir / cards.FOLDER
    autoencoder = autoencoders.load(**dataclasses.asdict(run.autoencoder))
    run = resolve(run, autoencoder.config)
    config, mesh = experiment.evaluation, parallel.make_mesh(experiment.mesh)
    source = None if config.reference else data_source(run)
    text, tokenizer = load_conditioner(run.text) if run.text else (None, None)
    prompts = _prompts(run, config, workdir)
    given = tokenizer(prompts.lines, run.text.length) if text else np.arange(run.model.num_classes)
    evaluator = make_evaluator(
        config, source=source, resolution=run.resolution, mesh=mesh, folder=out / FEATURES, prompts=prompts
    )
    about = _about(run, workdir, autoencoder, text)
    results, params, loaded = [], None, None
    for setting in settings:
        if loaded != setting[:2]:
            loaded = setting[:2]
            params = load_params(workdir, run, mesh, setting.weights, setting.checkpoint)
        chosen = dict(guidance=setting.guidance, guidance_resolution=None, steps=setting.steps)
        sampling = dataclasses.replace(experiment.sampling, **chosen)
        make = image_maker(
            params,
            autoencoder,
            seed=config.seed,
            model=run.model,
            paradigm=run.paradigm,
            resolution=run.resolution,
            text=text,
            sampler=sampling.sampler,
            mesh=mesh,
            steps=sampling.steps,
            guidance=sampling.guidance,
            spacing=sampling.spacing,
        )
        made = about | _about_setting(workdir, run, sampling, setting, config.seed)
        # With a hash of all settings: other numbers of images, references or features are other folders.
        name = f"{setting.name}_{cards.key_of(describe(evaluator, made, run.resolution, config.num_images))}"
        card = evaluate(
            evaluator,
            lambda rows, make=make: make(rows, given[rows % len(given)]),
            config.num_images,
            made=made,
            resolution=run.resolution,
            out=out / name,
            context=cards.context(command),
            prompt_of=lambda rows: rows % len(given),
            label=setting.name,
        )
        results.append((str(out / name), card))
    if len(results) > 1:
        table = [(setting._asdict(), card) for setting, (_, card) in zip(settings, results, strict=True)]
        print(f"written to {write_sweep(table, out)}")
    return results


def _prompts(run: Experiment, config: EvaluationConfig, workdir: Path) -> Prompts | None:
    """What a run on text draws: the given prompts or those that it learns from. Of classes: a text for each."""
    if run.text is not None:
        return read_prompts(config.prompts or run.data.store or workdir / "latents", config.num_images)
    config.check_clip_score()
    prompts, classes = read_prompts(config.prompts) if config.prompts else None, run.model.num_classes
    if prompts and len(prompts.lines) != classes:
        raise InputError(f"evaluation.prompts={config.prompts} has {len(prompts.lines)} lines for {classes} classes")
    return prompts


def load_params(workdir: Path, run: Experiment, mesh: Mesh, weights: str, step: int | None = None):
    """Parameters of a run, each device holding its part."""
    shapes = jax.eval_shape(functools.partial(denoisers.init, run.model), jax.random.key(0))
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parallel.param_sharding(shapes, mesh),
    )
    return checkpoints.load_params(workdir / CHECKPOINTS, weights, step=step, target=target)


def _config_of(workdir: Path, base: ConfigDict) -> ConfigDict:
    """A run's config over the base one, which knows the types of the fields that the run leaves out."""
    config = ConfigDict(base)
    with config.unlocked(), config.ignore_type():
        for section, value in to_dict(read_experiment(workdir)).items():
            if not isinstance(value, dict):
                config[section] = value
                continue
            for name, field in value.items():
                if field is not None:
                    config[section][name] = field
    return config


def _settings(workdir: Path, run: Experiment, experiment: Experiment, lists: dict) -> list[Setting]:
    """All combinations of what is given, in the order of the flags."""
    sampling = experiment.sampling
    there = checkpoints.steps(workdir / CHECKPOINTS)
    if not there:
        raise InputError(f"{workdir} has no checkpoint yet")
    chosen = (
        there if lists.get("checkpoint") == ["all"] else lists.get("checkpoint") or there[-1:],
        lists.get("weights") or [sampling.weights or default_weights(run)],
        lists.get("guidance") or [sampling.guidance_at(run.resolution)],
        lists.get("steps") or [sampling.steps],
    )
    settings = [Setting(*values) for values in itertools.product(*chosen)]
    if absent := sorted({setting.checkpoint for setting in settings} - set(there)):
        raise InputError(f"{workdir} has no checkpoint of step {absent[0]}; there are {', '.join(map(str, there))}")
    for guidance in chosen[2]:
        if not (math.isfinite(guidance) and guidance >= 0):
            raise InputError(f"guidance {guidance:g} is not possible: it must be finite and at least 0")
    for steps in chosen[3]:
        check_sampling(run.paradigm, sampling.sampler, steps, sampling.spacing)
    known = ["params", *map(repr, run.ema.decays)]
    if unknown := [setting.weights for setting in settings if setting.weights not in known]:
        raise InputError(f"weights {unknown[0]!r} are not in {workdir}; possible: {', '.join(known)}")
    return settings


def check_sampling(paradigm, sampler: str | None, steps: int, spacing: str) -> None:
    """Raises InputError for a number of steps, or a spacing, that the paradigm does not have."""
    if (sampler or paradigm.samplers[0]) == "ddim":
        ddim_grid(paradigm, steps, spacing)
    else:
        flow_grid(paradigm, steps)


def _about(run: Experiment, workdir: Path, autoencoder, text: TextConditioner | None) -> dict[str, Any]:
    """What all images of a run have in common, for the card."""
    drawn = {"labels": f"number of the image modulo {run.model.num_classes}"}
    if text is not None:
        drawn = {"text": run.text.source, "text.weights": weights_hash(text.clip), "text.prompt": "in their order"}
    return {
        "run": str(workdir),
        "paradigm": run.paradigm.name,
        "paradigm.schedule_rescale": run.paradigm.schedule_rescale,
        "autoencoder": run.autoencoder.source,
        "autoencoder.weights": weights_hash(autoencoder),
        "rounding": ROUNDING,
        **drawn,
        "model.dtype": run.model.dtype,
        **({"control": f"original size {run.resolution}, crop at 0"} if run.model.control else {}),
    }


def _about_setting(workdir: Path, run: Experiment, sampling, setting: Setting, seed: int) -> dict[str, Any]:
    return {
        "checkpoint.step": setting.checkpoint,
        "checkpoint.weights": setting.weights,
        "checkpoint.fingerprint": checkpoints.fingerprint(workdir / CHECKPOINTS, setting.checkpoint),
        "sampling.sampler": sampling.sampler or run.paradigm.samplers[0],
        "sampling.steps": sampling.steps,
        "sampling.spacing": sampling.spacing,
        "sampling.guidance": sampling.guidance,
        "sampling.seed": seed,
    }


def _check_shared(run: Experiment, given: Experiment, workdir: Path) -> None:
    """A given config must describe the run, in what its images depend on."""

    def flat(experiment):
        tree = to_dict(experiment)
        found = {}
        for section in SHARED:
            value = tree[section]
            found |= {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
        return {name: value for name, value in found.items() if name not in FREE}

    theirs, ours = flat(run), flat(given)
    if differing := [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]:
        text = "; ".join(f"{name} is {theirs.get(name)!r}, given {ours.get(name)!r}" for name in differing)
        raise InputError(f"the config is not that of the run in {workdir}: {text}; leave --config out to take its own")
