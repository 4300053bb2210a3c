"""The main job in miniature, on real photographs, in a few minutes on a CPU.

    lpl quickstart --workdir runs/quickstart

It encodes crops of photographs into a latent store, trains a class-conditional MMDiT, post-trains it twice from one
checkpoint, without and with the Latent Perceptual Loss, samples from both, and leaves in the folder

    latents/, heldout/                    the latent stores: training crops, and other crops of the same photographs
    base/, without_lpl/, with_lpl/        the three runs: resolved config, metrics, checkpoints
    grid.png                              real | reconstruction | samples without LPL | samples with LPL
    samples.png                           the last two of them
    losses.png                            the losses of the three runs
    summary.md                            the table that is printed at the end

Call it again to continue where it was stopped.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lpl_jax import autoencoders, stopping
from lpl_jax.data import LatentStore, batches, open_source, prepare
from lpl_jax.data.sources import indexed
from lpl_jax.errors import InputError
from lpl_jax.evaluation.figures import panels, plot_losses
from lpl_jax.experiment import Experiment, build
from lpl_jax.io.atomic import write_text
from lpl_jax.io.locks import only_writers
from lpl_jax.io.pictures import write_picture
from lpl_jax.runs import open_run
from lpl_jax.runs.sampling import decode_to_uint8
from lpl_jax.tools import cli, config_file, flags
from lpl_jax.training import Frozen, Objective, Result, losses, make_objective, train
from lpl_jax.training.data import check_source
from lpl_jax.training.logging import read_metrics
from lpl_jax.training.loop import check_experiment
from lpl_jax.training.objective import LPLTerm

PHOTOS_SOURCE = "photos"
HELDOUT_SEED = 1_000_003  # crops that no training run of a small seed draws


def quickstart(config: str, workdir: Path, overrides: Sequence[str] = ()) -> int:
    """All of it; returns the exit status. Every part that is complete already is not done again.

    config: FILE[:ARGUMENTS] that takes the arguments post and lpl, too. overrides: of all three runs.
    """
    started = time.perf_counter()
    configs = {
        "base": config_file.load(config, overrides),
        "without_lpl": config_file.load(_with(config, "post"), overrides),
        "with_lpl": config_file.load(_with(config, "post,lpl"), overrides),
    }
    experiments = {}
    for name, values in configs.items():
        values.update_from_flattened_dict({"data.store": str(workdir / "latents")})
        if name != "base":
            values.update_from_flattened_dict({"train.init_from": str(workdir / "base")})
        experiments[name] = build(values)
    autoencoder = autoencoders.load(**dataclasses.asdict(experiments["base"].autoencoder))
    for experiment in experiments.values():
        _check(experiment, autoencoder)
    heldout = _prepare(experiments["base"], autoencoder, workdir)

    results: dict[str, Result] = {}
    for name, experiment in experiments.items():
        results[name] = train(experiment, workdir / name, label=name, given=configs[name].to_dict())
        if results[name].stopped:
            stopping.say(f"{name} stopped at step {results[name].step}")
            return stopping.STATUS
    print("sampling, measuring on held-out crops ...", flush=True)
    pictures = _pictures(workdir, experiments["base"], autoencoder)
    samples = {title: images for title, images in pictures.items() if title.startswith("samples")}
    for name, shown in (("grid.png", pictures), ("samples.png", samples)):
        write_picture(workdir / name, panels(shown, per_row=experiments["base"].sampling.per_class))
    _plot(workdir, results["base"].step)
    psnr = _psnr(pictures["real"], pictures["reconstruction"])
    summary = (
        f"{_summary(workdir, results, autoencoder, heldout)}\n\n"
        f"Reconstruction by the autoencoder: {psnr:.1f} dB PSNR. {time.perf_counter() - started:.0f} s in this call."
    )
    write_text(workdir / "summary.md", summary + "\n")
    print(f"\n{summary}\nPictures: {workdir / 'grid.png'}, {workdir / 'losses.png'}")
    return 0


def _with(config: str, more: str) -> str:
    """FILE[:ARGUMENTS] with more arguments."""
    file, _, arguments = config.partition(":")
    return f"{file}:{','.join(filter(None, (arguments, more)))}"


def _check(experiment: Experiment, autoencoder) -> None:
    """Raises InputError for what one of the runs, or the pictures at the end, could not do: before anything is made."""
    if experiment.text is not None or experiment.data.source != PHOTOS_SOURCE:
        raise InputError(
            f"lpl quickstart learns classes of photographs: text.source={experiment.text and experiment.text.source}, "
            f"data.source={experiment.data.source}; use lpl prepare and lpl train for others"
        )
    check_experiment(experiment, autoencoder)
    check_source(experiment, _training_source(experiment))


def _training_source(experiment: Experiment):
    data = experiment.data
    return open_source(data.source, experiment.resolution, crops=data.crops, seed=experiment.seed)


def _prepare(experiment: Experiment, autoencoder, workdir: Path) -> LatentStore:
    """The store of training crops (prepared, if it is not there), and that of the held-out ones."""
    prepare(_training_source(experiment), autoencoder, workdir / "latents")
    return prepare(_heldout_source(experiment), autoencoder, workdir / "heldout", progress=False)


def _heldout_source(experiment: Experiment):
    seed = experiment.seed + HELDOUT_SEED
    return indexed(open_source(experiment.data.source, experiment.resolution, crops=8, seed=seed))


def _pictures(workdir: Path, experiment: Experiment, autoencoder) -> dict[str, np.ndarray]:
    """Title -> uint8 images: `per_class` of each class in turn. Both models start from the same noise."""
    source = _heldout_source(experiment)
    classes, per_class = len(source.class_names), experiment.sampling.per_class
    # Example i is a crop of photograph i % classes.
    examples = [source[crop * classes + label] for label in range(classes) for crop in range(per_class)]
    real = np.stack([example.image for example in examples])
    encoded = jax.jit(lambda a, x: a.scale(a.encode(x).mean))(autoencoder, real.astype(np.float32) / 127.5 - 1)
    pictures = {"real": real, "reconstruction": np.asarray(decode_to_uint8(autoencoder, encoded))}
    for title, name in (("samples without LPL", "without_lpl"), ("samples with LPL", "with_lpl")):
        sample = open_run(workdir / name).sampler(seed=experiment.seed)
        pictures[title] = sample([example.label for example in examples])
    return pictures


def _plot(workdir: Path, base_steps: int) -> None:
    first = {"base": 0, "without_lpl": base_steps, "with_lpl": base_steps}
    plot_losses([(name, read_metrics(workdir / name), start) for name, start in first.items()], workdir / "losses.png")


def _summary(workdir: Path, results: dict[str, Result], autoencoder, heldout: LatentStore) -> str:
    """Markdown table of the runs, their losses measured on the held-out crops with the averaged parameters."""
    lines = [
        "| run | steps | img/s | held-out diffusion loss | held-out perceptual loss | LPL's share of the loss |",
        "|---|---|---|---|---|---|",
    ]
    objective = make_objective(open_run(workdir / "with_lpl").experiment)
    # All of the images are decoded, and none is drawn without its class.
    assert isinstance(objective.term, LPLTerm)
    term = dataclasses.replace(objective.term, capacity=None, groups=None)
    loss = dataclasses.replace(objective.loss, label_dropout=0.0)
    objective = dataclasses.replace(objective, term=term, loss=loss)
    for name, result in results.items():
        params = open_run(workdir / name).params()
        diffusion, perceptual = _heldout_losses(params, objective, Frozen(autoencoder), heldout)
        shares = [line["lpl_share"] for line in read_metrics(workdir / name) if "lpl_share" in line]
        rate = "-" if result.images_per_second is None else f"{result.images_per_second:.0f}"
        share = f"{100 * np.mean(shares):.0f} %" if shares else "-"
        lines.append(f"| {name} | {result.step} | {rate} | {diffusion:.4f} | {perceptual:.4f} | {share} |")
    return "\n".join(lines)


_measure = jax.jit(losses, static_argnames="objective")


def _heldout_losses(params, objective: Objective, frozen: Frozen, heldout: LatentStore, rounds: int = 3):
    """Mean diffusion and perceptual loss over the held-out crops, `rounds` times with other timesteps and noise."""
    stream = batches(heldout, batch_size=len(heldout), seed=0)
    outputs = [
        _measure(params, next(stream), jax.random.key(index), frozen, objective=objective)[1] for index in range(rounds)
    ]
    return tuple(float(np.mean([output.means[name] for output in outputs])) for name in ("diffusion_loss", "lpl"))


def _psnr(images: np.ndarray, reconstructions: np.ndarray) -> float:
    """Mean over uint8 images of the peak signal-to-noise ratio, dB."""
    error = np.square(images.astype(np.float64) - reconstructions).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / error)))


def parser() -> cli.Parser:
    """The flags of `lpl quickstart`."""
    result = cli.Parser(__doc__, prog="lpl quickstart")
    flags.add(result, "workdir", default=Path("runs/quickstart"))
    flags.add_config(result, default="quickstart")
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    flags.check_local(args, "workdir")
    flags.check_out(args, "workdir")
    with only_writers(args.workdir):
        return quickstart(args.config, args.workdir, args.overrides)
