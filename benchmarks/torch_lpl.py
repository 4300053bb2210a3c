"""Forward and backward pass of the perceptual loss, ours against PyTorch, with one autoencoder and one gate.

    python -m benchmarks.torch_lpl                              SD's decoder, 128 px, on the CPU
    python -m benchmarks.torch_lpl --device cuda --resolution 512 --images 4 --dtype bfloat16
    python -m benchmarks.torch_lpl --size tiny --resolution 32 --repeats 1

PyTorch's side is a twin of the public example (diffusers, `examples/research_projects/lpl`; its loss is the twin that
the tests compare ours with): diffusers' AutoencoderKL with the same random weights, its decoder without
post_quant_conv, the samples under the gate (timestep < 200) picked by a boolean index, the loss in float32. It is timed
eager and under torch.compile, each also with channels-last weights where --channels-last is given. Ours is the preset
"reference", with as many rows decoded as are under the gate. Values and gradients are compared before anything is
timed. Runs take turns; ratios are medians over turns. The result is printed and written to benchmarks/results.
"""

import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from lpl_jax import xla_flags
from lpl_jax.errors import InputError
from lpl_jax.tools.cli import Parser, run_main

TIMESTEPS, ACTIVE_STEPS = 1000, 200
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}  # largest difference over largest value
CPU_GOAL, GPU_GOAL = 1.5, 1.5
MODES = ("eager", "compile")


def autoencoder_config(size: str):
    from lpl_jax.autoencoders import AutoencoderConfig

    return AutoencoderConfig.tiny() if size == "tiny" else AutoencoderConfig(name="SD architecture, random weights")


def our_loss(autoencoder, predicted, clean, steps, resolution: int):
    """function() -> (loss, gradient of all rows); rows over the gate have gradient 0."""
    import jax
    import jax.numpy as jnp

    from lpl_jax.diffusion import paradigm
    from lpl_jax.losses import LPLConfig, gated_perceptual_loss

    config = LPLConfig.reference(taps=autoencoder.config.num_taps)
    schedule = paradigm("eps", schedule_rescale=resolution / config.tau_ref_resolution)
    alpha, sigma = schedule.alpha_sigma(jnp.asarray(steps))
    count = int((steps < ACTIVE_STEPS).sum())

    @jax.jit
    def value_and_gradient(autoencoder, predicted, clean, alpha, sigma):
        def loss(predicted):
            return gated_perceptual_loss(
                autoencoder,
                config,
                z0_hat=predicted,
                z0=clean,
                alpha=alpha,
                sigma=sigma,
                key=jax.random.key(0),
                resolution=resolution,
                capacity=count,
            )[0]

        return jax.value_and_grad(loss)(predicted)

    given = jax.device_put((autoencoder, predicted, clean, alpha, sigma))
    return common.blocking(value_and_gradient, *given)


def torch_losses(folder: Path, config, predicted, clean, steps, args) -> dict[str, Callable[[], tuple]]:
    """The same of PyTorch, by mode."""
    import torch

    from lpl_jax.tools.parity.autoencoders import load_torch
    from lpl_jax.tools.parity.torch_side import nchw
    from lpl_jax.tools.parity.twins import reference_loss

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    decoder = load_torch(folder, config).decoder.to(device=device, dtype=dtype)

    def features(raw):
        x = decoder.mid_block(decoder.conv_in(raw.to(dtype)))
        taps = [x]
        for block in decoder.up_blocks:
            x = block(x)
            taps.append(x)
        return [tap.float() for tap in taps]

    def loss(predicted, clean, active):
        raw = [latents[active] / config.scaling_factor + config.shift_factor for latents in (predicted, clean)]
        with torch.no_grad():
            target = features(raw[1])
        return reference_loss(features(raw[0]), target).mean()

    given = nchw(clean).to(device), torch.from_numpy(steps < ACTIVE_STEPS).to(device)
    leaf = nchw(predicted).to(device).requires_grad_()

    def run(loss):
        value = loss(leaf, *given)
        (gradient,) = torch.autograd.grad(value, leaf)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value.detach(), gradient

    if args.channels_last:
        decoder.to(memory_format=torch.channels_last)
    # The choice of rows, whose shape depends on data, stays outside: the compiler would break the graph there.
    compiled = torch.compile(features)

    def loss_compiled(predicted, clean, active):
        raw = [latents[active] / config.scaling_factor + config.shift_factor for latents in (predicted, clean)]
        with torch.no_grad():
            target = compiled(raw[1])
        return compiled_distance(compiled(raw[0]), target).mean()

    compiled_distance = torch.compile(reference_loss)
    found = {"eager": ("torch eager", loss), "compile": ("torch.compile", loss_compiled)}
    return {name: functools.partial(run, each) for name, each in (found[mode] for mode in args.modes)}


def compare(args) -> dict[str, Any]:
    """The whole comparison, as plain values."""
    import jax
    import numpy as np
    import torch

    from lpl_jax import autoencoders

    config = autoencoder_config(args.size)
    if args.resolution % config.downsample:
        raise InputError(f"--resolution={args.resolution} is not a multiple of {config.downsample}")
    if args.threads:
        torch.set_num_threads(args.threads)
    predicted, clean = common.latents(config, args.resolution, args.batch or args.images)
    # The first rows are under the gate, the others not.
    steps = np.full(len(clean), TIMESTEPS - 1)
    steps[: args.images] = np.linspace(0, ACTIVE_STEPS - 1, args.images, dtype=int)
    autoencoder = common.random_autoencoder(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "autoencoder"
        autoencoders.save(autoencoder, folder)
        runs = torch_losses(folder, config, predicted, clean, steps, args)
    ours = our_loss(
        autoencoder.replace(config=dataclasses.replace(config, dtype=args.dtype)),
        predicted,
        clean,
        steps,
        args.resolution,
    )
    value, gradient = (np.asarray(each) for each in ours())
    agreement, failed = {}, {}
    for name, run in list(runs.items()):
        try:
            theirs_value, theirs = run()
        except Exception as error:  # torch.compile needs a C++ compiler on CPUs, Triton on GPUs
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
            del runs[name]
            continue
        theirs = theirs.float().cpu().numpy().transpose(0, 2, 3, 1)
        agreement[name] = {
            "value": float(abs(value - float(theirs_value)) / abs(float(theirs_value))),
            "gradient": float(np.abs(gradient - theirs).max() / np.abs(theirs).max()),
        }
    seconds = common.interleaved({"lpl_jax": ours, **runs}, args.repeats)
    ratios = {name: common.paired_ratio(seconds["lpl_jax"], seconds[name]) for name in runs}
    return {
        "benchmark": "torch_lpl",
        "date": common.today(),
        "command": " ".join(["python -m benchmarks.torch_lpl", *args.argv]),
        "size": {
            "autoencoder": config.name,
            "resolution": args.resolution,
            "batch": len(clean),
            "decoded": args.images,
            "dtype": args.dtype,
            "channels_last": args.channels_last,
            "torch_threads": torch.get_num_threads(),
        },
        "runs": {name: common.spread(each) for name, each in seconds.items()},
        "ours_over_torch": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "agreement": agreement,
        "failed": failed,
        "goals": _goals(ratios, args.device),
        "load_average": round(os.getloadavg()[0], 2),
        "torch_device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "machine": common.machine() | {"jax_device": jax.devices()[0].platform},
    }


def _goals(ratios: dict[str, float], device: str) -> list[dict[str, Any]]:
    if device == "cpu":
        return [common.goal(f"time over that of {name}", ratio, CPU_GOAL) for name, ratio in ratios.items()]
    return [
        common.goal(f"throughput over that of {name}", 1 / ratio, GPU_GOAL, at_least=True)
        for name, ratio in ratios.items()
    ]


def arguments(argv: Sequence[str]):
    """Flags and their values."""
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--size", choices=("tiny", "sd"), default="sd", help="autoencoder: SD's widths, or for tests")
    flags.add_argument("--resolution", type=int, default=128, help="image side, pixels")
    flags.add_argument("--images", type=int, default=1, help="images under the gate, which are decoded")
    flags.add_argument("--batch", type=int, help="images of the batch; default: all are under the gate")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both frameworks")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the decoder")
    flags.add_argument("--channels-last", action="store_true", help="PyTorch's convolutions in its NHWC layout")
    flags.add_argument("--modes", choices=MODES, nargs="+", default=MODES, help="of PyTorch")
    flags.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    flags.add_argument("--repeats", type=int, default=5, help="timed turns")
    flags.add_argument("--results", type=Path, default=common.RESULTS, help="folder for the result")
    args = flags.parse_args(argv)
    args.argv = list(argv)
    if args.images < 1 or args.repeats < 1 or (args.batch is not None and args.batch < args.images):
        raise InputError("--images and --repeats are 1 or more, --batch at least --images")
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    os.environ["JAX_PLATFORMS"] = args.device
    xla_flags.set_for_gpu()
    result = compare(args)
    path = common.write(result, f"torch-{args.device}-{args.resolution}px", args.results)
    for name, each in result["runs"].items():
        print(f"{name:>16}  {each['median_seconds']:.4g} s  {each['range']}")
    print(common.goals_text(result["goals"]))
    print(f"written to {path}")
    limit = GRADIENT_TOLERANCE[args.dtype]
    wrong = [name for name, each in result["agreement"].items() if not each["gradient"] <= limit]
    if wrong:
        print(f"gradients that differ by more than {limit} from ours: {', '.join(wrong)}", file=sys.stderr)
    # With torch 2.13 on a CPU the compiled decoder's gradient is not that of the eager one: a time, and no reference.
    return 1 if set(wrong) - {"torch.compile"} else 0


if __name__ == "__main__":
    run_main(main)
