"""What `benchmarks.gpu` measures: functions of a scale that record numbers as soon as they are known."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common, lpl, traces

MFU_GOAL, MFU_LPL_GOAL = 0.50, 0.40
Record = Callable[..., None]  # record(name=value, ...): adds to the section's result at once

# Largest relative error (L2) against the CPU in float32: of values, and of gradients, where a pixel that crosses the
# threshold of a mask counts. TF32 has 10 bits of mantissa, bfloat16 has 7.
TOLERANCES = {
    "float32, highest precision": (1e-4, 1e-3),
    "float32, default precision": (2e-2, 5e-2),
    "bfloat16": (5e-2, 2e-1),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of everything. steps: (resolution, batch) by section; sampler: (images, steps).

    modes and samplers are those of the numerics; samplers: (paradigm, sampler, steps).
    """

    size: str
    steps: dict[str, tuple[int, int]]
    numerics_resolution: int
    loss: tuple[tuple[int, int], ...]  # (resolution, images)
    torch: tuple[str, ...]
    sampler: tuple[int, int]
    inception: int
    repeats: int
    modes: tuple[str, ...] = tuple(TOLERANCES)
    samplers: tuple[tuple[str, str, int], ...] = (("eps", "ddim", 4), ("flow", "euler", 4), ("flow", "rk4", 2))


FULL = Scale(
    size="paper796",
    steps={"steps_512": (512, 16), "steps_256": (256, 64)},
    numerics_resolution=64,
    loss=((256, 4), (512, 4)),
    torch=("--resolution=256", "--images=4", "--dtype=bfloat16", "--repeats=10"),
    sampler=(64, 50),
    inception=256,
    repeats=10,
)
MINIATURE = Scale(
    size="tiny",
    steps={"steps_512": (32, 4), "steps_256": (32, 4)},  # the same: compiled once
    numerics_resolution=16,
    loss=((16, 1),),
    torch=("--size=tiny", "--resolution=16", "--images=1", "--repeats=1", "--modes", "eager"),
    sampler=(1, 2),
    inception=1,
    repeats=1,
    modes=("float32, default precision", "bfloat16"),
    samplers=(("eps", "ddim", 4),),
)


# --- sections: function(scale, record) ---


def numerics(scale: Scale, record: Record) -> None:
    import jax

    from lpl_jax.losses import LPLConfig, latent_perceptual_loss

    config = dataclasses.replace(lpl.autoencoder_config(lpl.SIZES[scale.size]), dtype="float32")
    autoencoder = common.random_autoencoder(config)
    predicted, clean = common.latents(config, scale.numerics_resolution, 1)

    def loss(autoencoder, predicted, clean):
        value, _ = latent_perceptual_loss(autoencoder, LPLConfig.paper(), z0_hat=predicted, z0=clean)
        return value.sum()

    functions = {"loss and gradient": jax.value_and_grad(loss, argnums=1), "decoder": lambda a, p, _: a.decode(p)}
    for name, function in functions.items():
        expected = _on("cpu", function, autoencoder, predicted, clean)
        for mode in scale.modes:
            lowered = dataclasses.replace(config, dtype="bfloat16" if mode == "bfloat16" else "float32")
            found = _on(None, function, autoencoder.replace(config=lowered), predicted, clean, mode=mode)
            errors = [_error(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)]
            record(**{f"{name}, {mode}": _judged(errors, mode)})
    _samplers(scale, record)


def _samplers(scale: Scale, record: Record) -> None:
    """Whole trajectories of a small denoiser with random weights."""
    import jax
    import numpy as np

    from lpl_jax import denoisers
    from lpl_jax.diffusion import paradigm
    from lpl_jax.runs.sampling import sample_latents

    model = denoisers.preset("tiny", num_classes=2, dtype="float32")
    shapes = jax.eval_shape(lambda key: denoisers.init(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)  # an output layer of zeros, as training starts with, would show nothing
    params = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes)
    rows = np.arange(2)
    for name, sampler, steps in scale.samplers:

        def run(params, dtype, name=name, sampler=sampler, steps=steps):
            options = dict(side=4, resolution=32, sampler=sampler, steps=steps, guidance=1.5)
            config = dataclasses.replace(model, dtype=dtype)
            return sample_latents(
                params, jax.random.key(1), rows, rows, model=config, paradigm=paradigm(name), **options
            )

        expected = _on("cpu", lambda params, run=run: run(params, "float32"), params)
        for mode in scale.modes:
            dtype = "bfloat16" if mode == "bfloat16" else "float32"
            found = _on(None, lambda params, run=run, dtype=dtype: run(params, dtype), params, mode=mode)
            record(**{f"{sampler}, {mode}": _judged([_error(found, expected)], mode)})


def _on(platform: str | None, function, *args, mode: str = "float32, highest precision"):
    """The function's result on the first device of a platform (None: of the default one), on the host."""
    import jax

    device = jax.devices(platform)[0]
    precision = "highest" if mode == "float32, highest precision" else None
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        return jax.device_get(jax.jit(function)(*jax.device_put(args, device)))


def _error(found, expected) -> float:
    import numpy as np

    found, expected = (np.asarray(each, np.float64) for each in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _judged(errors: list[float], mode: str) -> dict[str, Any]:
    """Errors of a value and, where there is one, of a gradient."""
    limits = TOLERANCES[mode][: len(errors)]
    fits = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    return {"errors": errors, "tolerances": limits, "within": fits}


def steps(scale: Scale, record: Record, section: str) -> None:
    import jax

    from lpl_jax.cost import step_cost

    size, (resolution, batch) = lpl.SIZES[scale.size], scale.steps[section]
    given = lpl.experiments(size, resolution, batch, (lpl.PAPER_SHARE,))
    record(resolution=resolution, batch=batch)
    rows, kept = lpl.steps(given, size, scale.repeats, keep=f"q = {max(1, round(lpl.PAPER_SHARE * batch))}/{batch}")
    judged = lpl.goals(rows, None, scale.size, resolution)
    for name, row in rows.items():
        limit = MFU_GOAL if name == lpl.BASE else MFU_LPL_GOAL
        judged.append(common.goal(f"{name}: MFU", row["use"]["mfu"], limit, at_least=True))
    memory = jax.devices()[0].memory_stats() or {}
    record(steps=rows, goals=judged, peak_bytes_of_all=memory.get("peak_bytes_in_use"), table=lpl.table(rows))
    step, compiled = kept
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(lpl.one_device()):
        traces.capture(step, Path(folder))
        record(kernels=traces.summary(Path(folder), compiled.as_text()))
    record(peaks_tflops=dict(step_cost.PEAKS))


def loss(scale: Scale, record: Record) -> None:
    for resolution, images in scale.loss:
        found = lpl.loss_alone(lpl.SIZES[scale.size], resolution, images, scale.repeats)
        record(**{f"{resolution}px": found})
        record(goals=[common.goal(f"mask's share of the loss, {resolution} px", found["mask_share"], lpl.MASK_GOAL)])


def torch(scale: Scale, record: Record) -> None:
    import jax

    with contextlib.suppress(ImportError):
        from benchmarks import torch_lpl

        if jax.default_backend() == "cpu" or _torch_has_gpu():
            device = "cpu" if jax.default_backend() == "cpu" else "cuda"
            record(**torch_lpl.compare(torch_lpl.arguments([*scale.torch, f"--device={device}"])))
            return
    record(skipped="PyTorch with CUDA and diffusers are not both installed")


def _torch_has_gpu() -> bool:
    import diffusers  # noqa: F401
    import torch

    return torch.cuda.is_available()


def sampler(scale: Scale, record: Record) -> None:
    import jax
    import numpy as np

    from lpl_jax import denoisers
    from lpl_jax.runs.sampling import decode_to_uint8, sample_latents

    size, (images, count) = lpl.SIZES[scale.size], scale.sampler
    resolution, _ = scale.steps["steps_256"]
    experiment = lpl.experiment(size, resolution, images, None)
    autoencoder, model = common.random_autoencoder(lpl.autoencoder_config(size)), experiment.model
    params = jax.jit(lambda key: denoisers.init(model, key))(jax.random.key(0))
    rows = np.arange(images)
    options = dict(model=model, paradigm=experiment.paradigm, side=resolution // 8, resolution=resolution)
    options |= dict(sampler="ddim", steps=count, guidance=1.5)
    runs = {
        "ddim": common.blocking(lambda: sample_latents(params, jax.random.key(1), rows, 0 * rows, **options)),
        "decoder": common.blocking(decode_to_uint8, autoencoder, jax.device_put(_noise(images, resolution // 8))),
    }
    for name, seconds in common.interleaved(runs, max(1, scale.repeats // 3)).items():
        timed = common.spread(seconds)
        record(**{name: timed | {"images": images, "images_per_second": images / timed["median_seconds"]}})
    record(steps=count, guidance=1.5, resolution=resolution)


def _noise(images: int, side: int):
    import numpy as np

    return np.random.default_rng(0).standard_normal((images, side, side, 4), np.float32)


def inception(scale: Scale, record: Record) -> None:
    import jax
    import numpy as np

    from lpl_jax.evaluation import inception as network

    images = np.random.default_rng(0).integers(0, 256, (scale.inception, 256, 256, 3), np.uint8)
    given = jax.device_put((network.init(jax.random.key(0)), images))
    seconds = common.interleaved({"inception": common.blocking(jax.jit(network.Inception.features), *given)}, 3)
    timed = common.spread(seconds["inception"])
    record(**timed, images=scale.inception, images_per_second=scale.inception / timed["median_seconds"])


# name -> (function, seconds that it may take)
SECTIONS: dict[str, tuple[Callable[[Scale, Record], None], int]] = {
    "numerics": (numerics, 120),
    "steps_512": (lambda scale, record: steps(scale, record, "steps_512"), 180),
    "steps_256": (lambda scale, record: steps(scale, record, "steps_256"), 150),
    "loss": (loss, 100),
    "torch": (torch, 120),
    "sampler": (sampler, 90),
    "inception": (inception, 60),
}
