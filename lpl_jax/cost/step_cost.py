"""What a training step of an experiment costs: analytic operations, the traced and the compiled program, and time.

Functions take a resolved experiment, its autoencoder and, of a run on text, its `TextConditioner`; where the leaves of
these are ShapeDtypeStructs, steps are measured with random weights. Functions that take a mesh want it set
(`jax.set_mesh(mesh)`), as in training. Results are plain values, for JSON.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.cost import flops
from lpl_jax.cost.plan import Plan, compile_or_plan
from lpl_jax.errors import InputError
from lpl_jax.experiment import Experiment
from lpl_jax.losses.latent_lpips import LatentLPIPS
from lpl_jax.losses.latent_lpips import init as init_latent_lpips
from lpl_jax.losses.latent_lpips import shapes as latent_lpips_shapes
from lpl_jax.text import TextConditioner
from lpl_jax.training import abstract_state, create_state, train_step
from lpl_jax.training.objective import decoded_images, make_objective
from lpl_jax.training.optimizer import make_optimizer
from lpl_jax.training.state import Frozen
from lpl_jax.training.step import make_step

# Dense bfloat16 peaks in TFLOP/s from the vendors' data sheets, by what `device_kind` contains; the first match counts.
PEAKS = (
    ("v6", 918.0),  # TPU v6e
    ("v5 lite", 197.0),
    ("v5e", 197.0),
    ("v5", 459.0),  # TPU v5p
    ("v4", 275.0),
    ("h200", 989.0),
    ("h100 pcie", 756.0),
    ("h100", 989.0),
    ("a100", 312.0),
)
WARM_UP = 2  # steps before the timed ones


def peak_tflops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device in TFLOP/s, None for one that is not in the table."""
    return next((peak for name, peak in PEAKS if name in device_kind.lower()), None)


def analyse(experiment: Experiment, autoencoder: Autoencoder, text: TextConditioner | None = None) -> dict[str, Any]:
    """Parameters, share of decoded images, and operations per image by part in both conventions.

    Of the comparison losses only Eq. 15 is counted, which decodes every image and has no gradient through the decoder;
    LatentLPIPS and Self-Perceptual are in the traced count alone.
    """
    batch, lpl = experiment.train.batch_size, experiment.lpl
    active, images, reweighting = 0.0, 0, _kind(experiment) == "reweighting"
    if lpl is not None:
        active = experiment.paradigm.active_fraction(lpl.tau_at(experiment.resolution))
        images = decoded_images(make_objective(experiment), batch)
    analytic, source = {}, experiment.text
    tower = None
    if source and source.embeddings == "step":
        assert text is not None
        tower = text.clip.config.text
    for convention in flops.CONVENTIONS:
        parts = flops.step_flops(
            convention,
            experiment.model,
            autoencoder.config,
            experiment.resolution,
            lpl,
            context_tokens=source.length if source else 1,
            decoded=images / batch,
            tower=tower,
        )
        if reweighting:
            parts = dataclasses.replace(parts, predicted_backward=0.0)
        analytic[convention.name] = dataclasses.asdict(parts) | {
            "base": parts.base,
            "perceptual": parts.perceptual,
            "total": parts.total,
            "ratio": parts.total / parts.base,
            "ratio_at_active_fraction": dataclasses.replace(parts, decoded=active).total / parts.base,
        }
    init = functools.partial(denoisers.init, experiment.model)
    return {
        "resolution": experiment.resolution,
        "batch_size": batch,
        "comparison": _kind(experiment),
        "parameters": {
            "denoiser": _count(jax.eval_shape(init, jax.random.key(0))),
            "encoder": _count(autoencoder.params["encoder"]),
            "decoder": _count(autoencoder.params["decoder"]),
            **({"text tower": _count(text.clip.params)} if text else {}),
        },
        "decoding": {"active_fraction": active, "images": images, "share": images / batch},
        "analytic": analytic,
    }


def trace(
    experiment: Experiment, autoencoder: Autoencoder, mesh: Mesh, text: TextConditioner | None = None
) -> dict[str, int]:
    """Operations of the products and convolutions of one step over all devices, as `flops.traced_flops` counts them."""
    arguments = abstract_arguments(experiment, autoencoder, mesh, text)
    step = _step(experiment)
    return {
        "step": flops.traced_flops(step, *arguments),
        "bodies_once": flops.traced_flops(step, *arguments, loops=False),
    }


def compile_step(
    experiment: Experiment,
    autoencoder: Autoencoder,
    mesh: Mesh,
    text: TextConditioner | None = None,
    *,
    plan_folder: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and XLA's count of operations and memory plan for one device, in bytes.

    plan_folder: where the process's XLA flags write plans (`cost.plan`); then a Plan comes back in place of the
    compiled step, as soon as there is one, and no count of XLA.

    `traced` are the operations over all devices in the program that was compiled, as `trace` counts them, and
    `traced_kernels` those in Pallas kernels, which XLA does not see. `peak` is arguments, output and temporaries less
    what the output takes over from the arguments.
    """
    state, *rest = abstract_arguments(experiment, autoencoder, mesh, text)
    optimizer, _ = make_optimizer(experiment.optimizer)
    step = make_step(make_objective(experiment), optimizer, state, mesh, ema_start=experiment.ema.start)
    start = time.perf_counter()
    traced = step.trace(state, *rest)
    lowered = traced.lower()
    compiled = lowered.compile() if plan_folder is None else compile_or_plan(lowered.compile, plan_folder)
    seconds = time.perf_counter() - start
    if isinstance(compiled, Plan):
        cost, sizes = {}, compiled.memory
    else:
        cost, sizes = compiled.cost_analysis() or {}, _planned(compiled)
    return compiled, {
        "backend": mesh.devices.flat[0].platform,
        "compile_seconds": seconds,
        "traced": flops.jaxpr_flops(traced.jaxpr),
        "traced_kernels": flops.jaxpr_flops(traced.jaxpr) - flops.jaxpr_flops(traced.jaxpr, kernels=False),
        "flops": float(cost.get("flops", float("nan"))),
        "memory": sizes,
    }


def _planned(compiled) -> dict[str, int]:
    plan = compiled.memory_analysis()
    if plan is None:
        return {}
    kinds = ("argument", "output", "temp", "alias")
    sizes = {kind: int(getattr(plan, f"{kind}_size_in_bytes")) for kind in kinds}
    return sizes | {"peak": sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]}


def runner(
    experiment: Experiment, autoencoder: Autoencoder, mesh: Mesh, compiled: Any, text: TextConditioner | None = None
) -> Callable[[], dict[str, jax.Array]]:
    """function() -> metrics: runs the next step of the compiled program on random latents and waits for it."""
    state = _state(create_state, experiment, mesh, lpl_weight=1.0)  # with any weight, steps take as long
    batch = parallel.put_batch(_batch(experiment, autoencoder), mesh)
    seed_key = parallel.put_replicated(jax.random.key(experiment.seed), mesh)
    network = _network(experiment, state, autoencoder, mesh)
    autoencoder = parallel.put_decoder(_decoder_with_weights(autoencoder, mesh), mesh, experiment.mesh.decoder)
    frozen = Frozen(autoencoder, network, _text_with_weights(text, mesh))

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, seed_key, frozen)
        jax.block_until_ready((state, metrics))
        return metrics

    return step


def measure(
    experiment: Experiment,
    autoencoder: Autoencoder,
    mesh: Mesh,
    compiled: Any,
    text: TextConditioner | None = None,
    *,
    repeats: int = 10,
) -> dict[str, Any]:
    """Steps of the compiled program on random latents, each one waited for: seconds, and memory where devices tell."""
    step, seconds = runner(experiment, autoencoder, mesh, compiled, text), []
    metrics = {}
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        metrics = step()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[WARM_UP:]
    median = statistics.median(seconds)
    memory = mesh.local_devices[0].memory_stats() or {}
    return {
        "step_seconds": median,
        "step_seconds_range": [min(seconds), max(seconds)],
        "repeats": repeats,
        "images_per_second": experiment.train.batch_size / median,
        "loss": float(metrics["loss"]),
        "memory": {name: memory[name] for name in ("peak_bytes_in_use", "bytes_limit") if name in memory},
    }


def utilisation(step_seconds: float, step_flops: float, mesh: Mesh, peak: float | None = None) -> dict[str, Any]:
    """Model FLOPs utilisation: operations of a step over what all devices could do in that time.

    step_flops: of the whole batch, in the usual convention. peak: of one device in TFLOP/s; None looks it up.
    """
    kind = mesh.local_devices[0].device_kind
    peak = peak_tflops(kind) if peak is None else peak
    achieved = step_flops / step_seconds / mesh.size / 1e12
    return {
        "devices": mesh.size,
        "device_kind": kind,
        "tflops_per_device": achieved,
        "peak_tflops": peak,
        "mfu": None if peak is None else achieved / peak,
    }


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _step(experiment: Experiment):
    optimizer, _ = make_optimizer(experiment.optimizer)
    return functools.partial(
        train_step, objective=make_objective(experiment), optimizer=optimizer, ema_start=experiment.ema.start
    )


def batch_shapes(experiment: Experiment, autoencoder: Autoencoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch as the store gives it: moments and labels, and sizes and crops where the model takes them."""
    size, side = experiment.train.batch_size, experiment.resolution // autoencoder.config.downsample
    moments = jax.ShapeDtypeStruct((size, side, side, autoencoder.config.latent_channels), jnp.float32)
    control = {"control": jax.ShapeDtypeStruct((size, 4), jnp.float32)} if experiment.model.control else {}
    label = jax.ShapeDtypeStruct((size,), jnp.int32)
    return {"mean": moments, "logvar": moments, "label": label, **_text_shapes(experiment), **control}


def _text_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a run on text: tokens, and the tower's outputs where these are in the store."""
    size, source, model = experiment.train.batch_size, experiment.text, experiment.model
    if source is None:
        return {}
    shapes = {"tokens": jax.ShapeDtypeStruct((size, source.length), jnp.int32)}
    if source.embeddings == "store":
        shapes["text_hidden"] = jax.ShapeDtypeStruct((size, source.length, model.context_dim), jnp.float16)
        if model.pooled_dim:
            shapes["text_pooled"] = jax.ShapeDtypeStruct((size, model.pooled_dim), jnp.float16)
    return shapes


def _batch(experiment: Experiment, autoencoder: Autoencoder) -> dict[str, np.ndarray]:
    """One with random latents."""
    rng, shapes = np.random.default_rng(experiment.seed), batch_shapes(experiment, autoencoder)
    batch = {name: np.zeros(each.shape, each.dtype) for name, each in shapes.items()}
    batch["mean"] = rng.standard_normal(shapes["mean"].shape, np.float32)
    batch["logvar"] -= 10.0
    classes = max(1, experiment.model.num_classes)
    batch["label"] = rng.integers(0, classes, shapes["label"].shape, dtype=np.int32)
    return batch


def abstract_arguments(
    experiment: Experiment, autoencoder: Autoencoder, mesh: Mesh, text: TextConditioner | None = None
) -> tuple:
    """State, batch, key and frozen networks as ShapeDtypeStructs, sharded as in training."""
    shards = parallel.batch_shards(mesh)
    if experiment.train.batch_size % shards:
        raise InputError(f"train.batch_size={experiment.train.batch_size} is not divisible by the {shards} shards")
    state = _state(abstract_state, experiment, mesh)

    def placed(tree, sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    batch = placed(batch_shapes(experiment, autoencoder), parallel.batch_sharding(mesh))
    autoencoder = autoencoder.without_encoder()
    if experiment.mesh.decoder == "fsdp":
        autoencoder = jax.tree.map(placed, autoencoder, parallel.param_sharding(autoencoder, mesh))
    else:
        autoencoder = placed(autoencoder, parallel.replicated(mesh))
    key, text = placed((jax.random.key(0), text), parallel.replicated(mesh))
    network = None
    if _kind(experiment) == "latent_lpips":
        channels = autoencoder.config.latent_channels
        network = placed(LatentLPIPS(latent_lpips_shapes(channels), channels), parallel.replicated(mesh))
    elif _kind(experiment) == "self_perceptual":
        network = state.params
    return state, batch, key, Frozen(autoencoder, network, text)


def _kind(experiment: Experiment) -> str | None:
    return None if experiment.comparison is None else experiment.comparison.kind


def _state(make, experiment: Experiment, mesh: Mesh, **options):
    """`make` is create_state or abstract_state."""
    optimizer, _ = make_optimizer(experiment.optimizer)
    init = functools.partial(denoisers.init, experiment.model)
    options |= dict(with_variances=_kind(experiment) == "reweighting")
    return make(init, optimizer, experiment.ema.decays, mesh, jax.random.key(0), **options)


def _network(experiment: Experiment, state, autoencoder: Autoencoder, mesh: Mesh) -> Any:
    """The frozen network of a comparison loss, with random weights; None where there is none."""
    if _kind(experiment) == "latent_lpips":
        network = init_latent_lpips(jax.random.key(0), autoencoder.config.latent_channels)
        return parallel.put_replicated(network, mesh)
    return jax.tree.map(jnp.copy, state.params) if _kind(experiment) == "self_perceptual" else None


def _text_with_weights(text: TextConditioner | None, mesh: Mesh) -> TextConditioner | None:
    """On the devices of the mesh; with zeros where it has shapes alone (a step takes as long with any weights)."""

    def filled(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return parallel.put_replicated(jax.tree.map(filled, text), mesh)


def _decoder_with_weights(autoencoder: Autoencoder, mesh: Mesh) -> Autoencoder:
    """What training keeps of it, on the devices of the mesh; with random weights where it has shapes alone."""
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(autoencoder)):
        return parallel.put_replicated(autoencoder.without_encoder(), mesh)

    def init(key):
        return autoencoders.init(autoencoder.config, key).without_encoder()

    return jax.jit(init, out_shardings=parallel.replicated(mesh))(jax.random.key(0))
