"""A training run: from an experiment to a folder with config, metrics and checkpoints.

    WORKDIR/config.json        the resolved experiment; given.json and inputs.json beside it, see `runs.workdir`
    WORKDIR/latents/           the latent store, where the config names no other
    WORKDIR/checkpoints/       see `runs.checkpoints`
    WORKDIR/metrics.jsonl      and TensorBoard's event files
    WORKDIR/startup.jsonl      where the time to the first step went, a line for each start

The same call begins a run, resumes it where its folder holds a checkpoint, and starts from another run's parameters or
from weights in files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lpl_jax import autoencoders, parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.denoisers.attention import current_platform, describe_attention
from lpl_jax.errors import InputError
from lpl_jax.experiment import Experiment, narrow_gate, resolve, to_dict
from lpl_jax.io.fingerprints import fingerprint
from lpl_jax.io.locks import only_writers
from lpl_jax.io.paths import PathLike
from lpl_jax.parallel import leaf_path
from lpl_jax.runs import checkpoints
from lpl_jax.runs.checkpoints import Checkpointer
from lpl_jax.runs.workdir import (
    CHECKPOINTS,
    CONFIG,
    Inputs,
    check_same_inputs,
    check_same_run,
    run_folder,
    write_classes,
    write_config,
)
from lpl_jax.stopping import Stopped, StopSignal
from lpl_jax.text import TextConditioner, load_conditioner, tower_fingerprint
from lpl_jax.training.compute_type import check_compute_type
from lpl_jax.training.course import Course, past
from lpl_jax.training.data import open_store, open_stream
from lpl_jax.training.initial import check_start, comparison_network, first_state, term_weight
from lpl_jax.training.logging import MetricLogger
from lpl_jax.training.metrics import Recorder
from lpl_jax.training.nonfinite import NonfiniteWatch, check_finite
from lpl_jax.training.objective import (
    ComparisonTerm,
    LPLTerm,
    Objective,
    ReweightingTerm,
    decoded_images,
    make_objective,
)
from lpl_jax.training.optimizer import learning_rate_schedule, make_optimizer
from lpl_jax.training.periodic import check_evaluation, periodic_evaluation
from lpl_jax.training.progress import Progress, Startup
from lpl_jax.training.session import Session
from lpl_jax.training.state import Frozen, TrainState
from lpl_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its last state, the step reached, mean images/s, and whether a signal stopped it."""

    state: TrainState
    step: int
    images_per_second: float | None
    stopped: bool


def train(
    experiment: Experiment,
    workdir: PathLike,
    *,
    label: str = "train",
    began: float | None = None,
    given: Mapping[str, Any] | None = None,
) -> Result:
    """Train, from the beginning or from the newest checkpoint in `workdir`, up to `train.steps`.

    began: `time.perf_counter()` when the program began, for the report of its start; None: now.
    given: the config that the experiment was built from, for what a later start says of changes.

    Raises:
      InputError: nothing is overwritten; the message says what does not fit.
    """
    workdir, startup = run_folder(workdir), Startup(began)
    with only_writers(workdir):
        resumed = (workdir / CONFIG).exists()  # not before: it may have been another one's last write
        with startup.part("autoencoder"):
            autoencoder = autoencoders.load(**dataclasses.asdict(experiment.autoencoder))
            text, tokenizer = load_conditioner(experiment.text) if experiment.text else (None, None)
        # Before anything is written, so that a mistake leaves nothing behind.
        experiment, mesh, objective = check_experiment(experiment, autoencoder, text)
        if resumed:
            check_same_run(experiment, workdir, given)
        weight = check_start(experiment) if checkpoints.latest_step(workdir / CHECKPOINTS) is None else None
        check_evaluation(experiment)
        optimizer, _ = make_optimizer(experiment.optimizer)
        with startup.part("state"), jax.set_mesh(mesh):
            state = jax.block_until_ready(first_state(experiment, optimizer, mesh, workdir))
            network = comparison_network(experiment, state, mesh)
            check_finite({"parameter": state.params, "average": state.emas, "network of the comparison": network})
        with startup.part("store"):
            store = open_store(experiment, autoencoder, workdir, text, tokenizer)
        decodes = objective.term is not None or experiment.evaluation.every is not None
        if decodes and autoencoder.config.dtype != "float32":
            with startup.part("compute type"):
                _warn(label, check_compute_type(autoencoder, store))
        decoder = parallel.put_decoder(autoencoder.without_encoder(), mesh, experiment.mesh.decoder)
        frozen = Frozen(decoder, text=parallel.put_replicated(text, mesh), network=network)
        tower = None if text is None else tower_fingerprint(text.clip)
        del autoencoder, text  # training keeps the decoder alone
        check_finite({"frozen network": frozen})
        with jax.set_mesh(mesh):
            inputs = Inputs(store.identity, store.manifest.weights_hash, tower, _fingerprint(frozen.network), True)
            if resumed:
                check_same_inputs(inputs, workdir)
            session = Session(experiment, objective, optimizer, mesh, store, workdir, label, resumed, None, weight)
            # What can fail comes before the config: a folder that holds one is a run, and takes no other.
            state = _with_weight(session, state, frozen, startup)
            evaluate = periodic_evaluation(experiment, frozen, store, tokenizer, mesh=mesh, workdir=workdir)
            session = dataclasses.replace(session, evaluate=evaluate)
            write_config(experiment, workdir, given, inputs)
            if experiment.text is None:
                write_classes(store.class_names, workdir)
            _announce(session, state)
            return _loop(session, state, frozen, startup)


def _fingerprint(network: Any) -> str | None:
    """Of the parameters of a network on devices; None where there is none, or this process sees but a part of it."""
    leaves = jax.tree_util.tree_leaves_with_path(network)
    whole = all(leaf.is_fully_addressable or leaf.is_fully_replicated for _, leaf in leaves)
    return fingerprint({leaf_path(path): leaf for path, leaf in leaves}) if leaves and whole else None


def check_experiment(
    experiment: Experiment, autoencoder: Autoencoder, text: TextConditioner | None = None
) -> tuple[Experiment, Mesh, Objective]:
    """The experiment resolved with its networks, on the devices that are here, and its objective.

    Raises InputError for what does not fit them; nothing is made.
    """
    experiment = resolve(experiment, autoencoder.config, text.clip.config.text if text else None)
    if experiment.lpl is not None:
        autoencoder.check_side(experiment.resolution)
    mesh = parallel.make_mesh(experiment.mesh)
    _check_batch(experiment, parallel.batch_shards(mesh))
    return experiment, mesh, make_objective(experiment, parallel.batch_shards(mesh))


def _check_batch(experiment: Experiment, shards: int) -> None:
    settings = experiment.train
    if settings.batch_size % (shards * settings.accumulate):
        turns = f" in each of train.accumulate={settings.accumulate} turns" if settings.accumulate > 1 else ""
        raise InputError(
            f"train.batch_size={settings.batch_size} is not divisible by the {shards} "
            f"parts (data x fsdp) that the mesh splits a batch into{turns}"
        )


def _announce(session: Session, state: TrainState) -> None:
    """A line that says what is about to run; the first step takes a while to compile."""
    if jax.process_index() != 0:
        return
    experiment = session.experiment
    settings, step = experiment.train, int(state.step)
    if step >= settings.steps:
        print(f"{session.label}: {session.workdir} is at step {step}, train.steps={settings.steps}: nothing to do")
        return
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    text = f"{session.label}: {parameters:.1f}M parameters, batch {settings.batch_size}, "
    text += f"steps {step} to {settings.steps} in {session.workdir}"
    model = experiment.model
    text += f"; {describe_attention(model.attention, current_platform(), model.head_dim, model.dtype)}"
    if session.objective.term is not None and step < experiment.loss.lpl_start:
        text += f"; {_name(session)} from step {experiment.loss.lpl_start} on"
    print(text, flush=True)
    _warn(session.label, narrow_gate(experiment))


def _warn(label: str, text: str | None) -> None:
    if text is not None and jax.process_index() == 0:
        print(f"{label}: warning: {text}", flush=True)


def _name(session: Session) -> str:
    """Of the term, for people."""
    term = session.objective.term
    if isinstance(term, ComparisonTerm):
        return term.config.kind
    return "LPL" if isinstance(term, LPLTerm) else "reweighting"


def _describe_term(session: Session, state: TrainState) -> str:
    """The term that begins now, with its weight, and how many images it decodes."""
    experiment, term = session.experiment, session.objective.term
    text = f"{_name(session)}: weight {float(state.lpl_weight):.3g}"
    if source := experiment.train.weight_from:
        text += f" as in {source}"
    if isinstance(term, LPLTerm | ReweightingTerm):
        text += f", {100 * (experiment.gate_share or 0):.0f} % of timesteps, "
        text += f"{decoded_images(session.objective, experiment.train.batch_size)} images decoded a step"
    return text


def _loop(session: Session, state: TrainState, frozen: Frozen, startup: Startup) -> Result:
    experiment, mesh = session.experiment, session.mesh
    settings, begun = experiment.train, int(state.step)
    # Where the step puts it from now on, so that there is one program for all steps.
    state = jax.device_put(state, parallel.param_sharding(state, mesh))
    seed_key = parallel.put_replicated(jax.random.key(experiment.seed), mesh)
    stream = open_stream(experiment, session.store, mesh, start_step=begun)
    learning_rate, before = learning_rate_schedule(experiment.optimizer), past(session, begun)
    with (
        StopSignal() as stop,  # around the others: their end, which waits for the last checkpoint, belongs to the run
        MetricLogger(session.workdir, start_step=before.logged) as logger,
        _checkpointer(session, begun if session.resumed else None) as checkpointer,
        Progress(settings.steps, begun, batch_size=settings.batch_size, label=session.label) as progress,
    ):
        recorder = Recorder(logger, progress, settings.batch_size, learning_rate, before.losses, before.kept)
        watch = NonfiniteWatch(session, frozen, seed_key, progress.note, before.nonfinite)
        course = Course(session, recorder, watch, logger, checkpointer, stop)
        step, step_fn = begun, None
        try:
            course.begin(step, state, before)
            while step < settings.steps and not stop.before(step + 1):
                batch = parallel.put_batch(next(stream), mesh)
                if step_fn is None or step == experiment.loss.lpl_start:  # a program begins: its first step by itself
                    course.settle(step, state)
                    startup = startup if step_fn is None else Startup()
                    with stop.leaving(unsaved=step > begun):
                        state = _with_weight(session, state, frozen, startup)
                        if session.objective.at(step).term is not None:
                            progress.note(f"{session.label}: {_describe_term(session, state)}")
                        step_fn = _compiled(session, (state, batch, seed_key, frozen), startup)
                    with startup.part("first step"):
                        state, metrics = jax.block_until_ready(step_fn(state, batch, seed_key, frozen))
                    _report_start(session, startup, progress, step)
                    recorder.start(step + 1)
                else:
                    state, metrics = step_fn(state, batch, seed_key, frozen)
                step += 1
                recorder.push(step, metrics)
                course.after(step, state)
        except Stopped:  # in an evaluation, or while a program was made: the state is that of the last step
            pass
        if step > begun:
            course.settle(step, state)
            course.save(state)
    return Result(state, step, recorder.images_per_second, stop.requested is not None)


def _with_weight(session: Session, state: TrainState, frozen: Frozen, startup: Startup) -> TrainState:
    """The state with the weight of its term, where that is in the next step."""
    experiment, mesh, objective = session.experiment, session.mesh, session.objective.at(int(state.step))
    if objective.term is None or state.is_calibrated:
        return state
    if session.weight is not None:
        return state.with_weight(session.weight)
    with startup.part("calibration"):
        # From the front of the data: a run that is stopped before its next checkpoint calibrates the same.
        stream = open_stream(experiment, session.store, mesh)
        weight = term_weight(objective, state, frozen, stream, experiment=experiment, mesh=mesh)
    return state.with_weight(weight)


def _compiled(session: Session, arguments: tuple, startup: Startup):
    """The compiled step."""
    state: TrainState = arguments[0]
    objective, ema_start = session.objective.at(int(state.step)), session.experiment.ema.start
    step_fn = make_step(objective, session.optimizer, state, session.mesh, ema_start=ema_start)
    with startup.part("compile"):
        return step_fn.lower(*arguments).compile()


def _report_start(session: Session, startup: Startup, progress: Progress, begun: int) -> None:
    line = startup.finish()
    if jax.process_index() == 0:
        startup.write(session.workdir, begun)
        progress.note(f"{session.label}: {line}")


def _checkpointer(session: Session, start_step: int | None) -> Checkpointer:
    settings = session.experiment.train
    return Checkpointer(
        session.workdir / CHECKPOINTS,
        start_step=start_step,
        keep=settings.keep,
        keep_every=settings.keep_every,
        metadata=to_dict(session.experiment),
    )
