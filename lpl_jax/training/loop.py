"""A training run: from an experiment to a folder with config, metrics and checkpoints.

    WORKDIR/config.json        the resolved experiment
    WORKDIR/latents/           the latent store, where the config names no other
    WORKDIR/checkpoints/       see `training.checkpoints`
    WORKDIR/metrics.jsonl      and TensorBoard's event files
    WORKDIR/startup.jsonl      where the time to the first step went, a line for each start

The same call begins a run, resumes it where its folder holds a checkpoint, and starts from another run's parameters or
from weights in files.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lpl_jax import autoencoders, parallel
from lpl_jax.data import LatentStore
from lpl_jax.data.examples import is_stream
from lpl_jax.denoisers import MMDiT
from lpl_jax.denoisers.attention import current_platform, describe_attention
from lpl_jax.errors import InputError
from lpl_jax.experiment.build import Experiment, resolve, to_dict
from lpl_jax.experiment.ema import ema_name
from lpl_jax.losses.gate import check_groups
from lpl_jax.runs.checkpoints import Checkpointer, StopSignal
from lpl_jax.runs.workdir import CHECKPOINTS, CONFIG, check_same_run, only_run_in, run_folder, write_config
from lpl_jax.text import WordTokenizer, load_conditioner
from lpl_jax.training.data import data_source, open_store, open_stream
from lpl_jax.training.initial import comparison_network, first_state, perceptual_weight
from lpl_jax.training.logging import MetricBuffer, MetricLogger, Progress, RateMeter, Startup
from lpl_jax.training.optimizer import learning_rate_schedule, make_optimizer
from lpl_jax.training.state import TrainState
from lpl_jax.training.step import Objective, train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its last state, the step reached, mean images/s, and whether a signal stopped it."""

    state: TrainState
    step: int
    images_per_second: float | None
    stopped: bool


def train(experiment: Experiment, workdir: str | Path, *, label: str = "train", began: float | None = None) -> Result:
    """Train, from the beginning or from the newest checkpoint in `workdir`, up to `train.steps`.

    began: `time.perf_counter()` when the program began, for the report of its start; None: now.
    Raises:
      InputError: nothing has been written over; the message says what does not fit.
    """
    workdir, startup = run_folder(workdir), Startup(began)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir} is a file: give a folder as --workdir")
    with startup.part("autoencoder"):
        autoencoder = autoencoders.load(**dataclasses.asdict(experiment.autoencoder))
        text, tokenizer = load_conditioner(experiment.text) if experiment.text else (None, None)
    # Before anything is made, so that a mistake leaves nothing behind.
    experiment = resolve(experiment, autoencoder.config, text.clip.config.text if text else None)
    mesh = parallel.make_mesh(experiment.mesh)
    settings, shards = experiment.train, parallel.batch_shards(mesh)
    if settings.batch_size % (shards * settings.accumulate):
        turns = f" in each of train.accumulate={settings.accumulate} turns" if settings.accumulate > 1 else ""
        raise InputError(
            f"train.batch_size={settings.batch_size} is not divisible by the {shards} "
            f"parts (data x fsdp) that the mesh splits a batch into{turns}"
        )
    objective = make_objective(experiment, parallel.batch_shards(mesh))
    begun_before = (workdir / CONFIG).exists()
    if begun_before:
        check_same_run(experiment, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run_in(workdir))
        with startup.part("store"):
            store = open_store(experiment, autoencoder, workdir, text, tokenizer)
        optimizer, _ = make_optimizer(experiment.optimizer)
        autoencoder = parallel.put_decoder(autoencoder.without_encoder(), mesh, experiment.mesh.decoder)
        text = parallel.put_replicated(text, mesh)
        stack.enter_context(jax.set_mesh(mesh))
        with startup.part("state"):
            state = jax.block_until_ready(first_state(experiment, optimizer, mesh, workdir))
            network = comparison_network(experiment, state, mesh)
        # At step 0 there is a checkpoint of weights that were imported, which nothing was calibrated for, or one of a
        # run that was stopped behind the calibration.
        if not int(state.step) and not float(state.lpl_weight):
            stream = open_stream(experiment, store, mesh)
            with startup.part("calibration"):
                weight = perceptual_weight(experiment, objective, state, autoencoder, network, text, stream, mesh)
            state = state.replace(lpl_weight=weight)
        write_config(experiment, workdir)
        _announce(experiment, objective, state, workdir, label)
        frozen = autoencoder, network, text
        start_step = int(state.step) if begun_before else None
        given = _evaluated(experiment, store, tokenizer)
        return _loop(
            experiment, objective, optimizer, state, frozen, store, given, mesh, workdir, label, start_step, startup
        )  # fmt: skip


def make_objective(experiment: Experiment, shards: int | None = None) -> Objective:
    """What the steps of a resolved experiment minimise.

    shards: parts that devices split a batch into; None: as the mesh that is set does.
    Raises InputError where the images to decode cannot be drawn evenly from these parts.
    """
    loss, lpl, paradigm, settings = experiment.loss, experiment.lpl, experiment.paradigm, experiment.train
    shards = parallel.context_shards() if shards is None else shards
    capacity, groups = None, loss.groups(shards)
    if lpl is not None:
        active = paradigm.active_fraction(lpl.tau_at(experiment.resolution))
        capacity = loss.capacity(settings.batch_size, active, groups, settings.accumulate)
        check_groups(settings.batch_size // settings.accumulate, capacity, groups, shards)
    return Objective(
        model=MMDiT(experiment.model),
        paradigm=paradigm,
        resolution=experiment.resolution,
        null_label=experiment.model.num_classes,
        label_dropout=loss.label_dropout,
        weighting=loss.weighting,
        gamma=loss.gamma,
        lpl=lpl,
        capacity=capacity,
        groups=groups,
        chunk=loss.chunk,
        stratified_t=loss.stratified_t,
        lpl_start=loss.lpl_start,
        comparison=experiment.comparison,
        accumulate=settings.accumulate,
    )


def _announce(experiment: Experiment, objective: Objective, state: TrainState, workdir: Path, label: str) -> None:
    """A line that says what is about to run; the first step takes a while to compile."""
    if jax.process_index() != 0:
        return
    settings, lpl = experiment.train, objective.lpl
    if int(state.step) >= settings.steps:
        print(
            f"{label}: {workdir} is at step {int(state.step)}, train.steps={settings.steps}: nothing to do", flush=True
        )
        return
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    text = f"{label}: {parameters:.1f}M parameters, batch {settings.batch_size}, "
    text += f"steps {int(state.step)} to {settings.steps} in {workdir}"
    model = experiment.model
    text += f"; {describe_attention(model.attention, current_platform(), model.head_dim, model.dtype)}"
    if lpl is not None:
        share = 100 * experiment.paradigm.active_fraction(lpl.tau_at(experiment.resolution))
        decoded = objective.capacity * objective.accumulate if objective.capacity else settings.batch_size
        text += (
            f"; LPL weight {float(state.lpl_weight):.3g}, {share:.0f} % of timesteps, {decoded} images decoded a step"
        )
    elif objective.comparison is not None:
        text += f"; {objective.comparison.kind}, weight {float(state.lpl_weight):.3g}"
    print(text, flush=True)


def _loop(
    experiment, objective, optimizer, state, frozen, store, given, mesh, workdir, label, start_step, startup
) -> Result:  # fmt: skip
    """frozen: autoencoder, comparison's network, text tower. given: what evaluations draw. start_step: where a run goes
    on; None: it begins."""
    settings = experiment.train
    begun = int(state.step)
    step_fn = make_step(experiment, objective, optimizer, state, mesh)
    # Where the step puts it from now on, so that there is one program for all steps.
    state = jax.device_put(state, parallel.param_sharding(state, mesh))
    seed_key = parallel.put_replicated(jax.random.key(experiment.seed), mesh)
    learning_rate = learning_rate_schedule(experiment.optimizer)
    stream = open_stream(experiment, store, mesh, start_step=begun)
    evaluate = _periodic_evaluation(experiment, frozen[0], frozen[2], given, mesh, workdir)
    buffer, meter = MetricBuffer(), RateMeter(settings.batch_size)
    with (
        MetricLogger(workdir, start_step=start_step) as logger,
        Checkpointer(
            workdir / CHECKPOINTS,
            start_step=start_step,
            keep=settings.keep,
            keep_every=settings.keep_every,
            metadata=to_dict(experiment),
        ) as checkpointer,
        StopSignal() as stop,
        Progress(settings.steps, begun, batch_size=settings.batch_size, label=label) as progress,
    ):

        def log(rows, rate):
            for row_step, metrics in rows:
                metrics = metrics | {"learning_rate": float(learning_rate(row_step - 1))}
                logger.write(row_step, metrics | ({"images_per_second": rate} if rate else {}))
                shown = {
                    name: metrics[name]
                    for name in ("loss", "diffusion_loss", "lpl", "lpl_share", "comparison", "comparison_share")
                    if name in metrics
                }
                progress.update(step, shown, rate)

        def report_start():
            line = startup.finish()
            if jax.process_index() == 0:
                startup.write(workdir, begun)
                progress.note(f"{label}: {line}")

        step = begun
        while step < settings.steps and not stop.before(step + 1):
            batch = parallel.put_batch(next(stream), mesh)
            if step == begun:  # by itself, so that its time is known
                with startup.part("compile"):
                    step_fn = step_fn.lower(state, batch, seed_key, *frozen).compile()
                with startup.part("first step"):
                    state, metrics = jax.block_until_ready(step_fn(state, batch, seed_key, *frozen))
                report_start()
                meter.start(step + 1)
            else:
                state, metrics = step_fn(state, batch, seed_key, *frozen)
            step += 1
            buffer.push(metrics)
            progress.update(step)
            if step % settings.log_every == 0:
                rows = buffer.take(step)
                log(rows, meter.rate(rows[-1][0]) if rows else None)
            if evaluate is not None and step % experiment.evaluation.every == 0:
                log(buffer.flush(step), meter.close(step))
                results, picture = evaluate(step, _averaged(experiment, state))
                logger.write(step, results)
                logger.image(step, "samples", picture)
                meter.start(step)
            if step % settings.checkpoint_every == 0 and step < settings.steps:
                log(buffer.flush(step), meter.close(step))
                logger.flush()
                checkpointer.save(state)
                meter.start(step)
        log(buffer.flush(step), meter.close(step))
        logger.flush()
        checkpointer.save(state)
    return Result(state, step, meter.mean, stop.requested is not None)


def make_step(experiment: Experiment, objective: Objective, optimizer, state: TrainState, mesh: Mesh):
    """The jitted train step of a run: (state, batch, seed_key, autoencoder, network) -> (state, metrics).

    The state is donated. state: may be ShapeDtypeStructs.
    """
    return jax.jit(
        functools.partial(train_step, objective=objective, optimizer=optimizer, ema_start=experiment.ema.start),
        donate_argnums=0,
        # Stated, so that the new state lies where the old one does and can take its memory.
        out_shardings=(parallel.param_sharding(state, mesh), parallel.replicated(mesh)),
    )


def _averaged(experiment: Experiment, state: TrainState):
    """The first configured average, or the parameters where there is none."""
    return state.emas[ema_name(experiment.ema.decays[0])] if experiment.ema.decays else state.params


def _evaluated(experiment: Experiment, store: LatentStore, tokenizer: WordTokenizer | None) -> np.ndarray | None:
    """What evaluations during training draw, in turn: every class, or the first captions of the store."""
    if experiment.evaluation.every is None:
        return None
    if experiment.text is None:
        return np.arange(experiment.model.num_classes)
    from lpl_jax.evaluation.prompts import store_captions

    return tokenizer(store_captions(store, experiment.evaluation.every_images), experiment.text.length)


def _periodic_evaluation(experiment: Experiment, autoencoder, text, given, mesh: Mesh, workdir: Path):
    """What is called every `evaluation.every` steps, or None."""
    config, sampling = experiment.evaluation, experiment.sampling
    if config.every is None:
        return None
    from lpl_jax.evaluation.periodic import periodic_evaluation  # most runs do without

    source = data_source(experiment)
    return periodic_evaluation(
        config,
        None if is_stream(source) else source,
        autoencoder,
        model=experiment.model,
        paradigm=experiment.paradigm,
        resolution=experiment.resolution,
        given=given,
        text=text,
        mesh=mesh,
        folder=workdir / "evaluation" / "training",
        sampler=sampling.sampler,
        steps=sampling.steps,
        guidance=sampling.guidance_at(experiment.resolution),
        spacing=sampling.spacing,
    )
