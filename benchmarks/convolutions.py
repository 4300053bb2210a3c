"""3x3 convolutions at the sizes of Stable Diffusion's decoder, written in several ways, beside PyTorch's.

    python -m benchmarks.convolutions                      a 128 px image on the CPU
    XLA_FLAGS=--xla_cpu_use_onednn=true python -m benchmarks.convolutions --plain

Each way is timed forward and backward (gradient of the input), float32, the weights being arguments, in turns; values
are compared with the plain one. The last rows are a convolution behind nearest upsampling by 2, as one convolution of
the large map and as four of 2x2 taps on the small one, one for each place of a pixel in its square: 4 taps in place of
9. The program of the plain convolution says whose kernel it is. Printed and written to benchmarks/results.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common
from lpl_jax.tools.cli import Parser, run_main

NHWC = ("NHWC", "HWIO", "NHWC")
SIDES = ((16, 512), (32, 512), (64, 256), (128, 128))  # of maps and channels, for a 128 px image
UPSAMPLED = ((16, 512), (32, 512), (64, 256))
# Rows: taps of the small map that an even and an odd place sum, out of the three of the kernel.
_PLACES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def plain(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def channels_first(x, kernel):
    """With transposes of the map around it."""
    found = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    return found.transpose(0, 2, 3, 1)


def shifted_products(x, kernel):
    """Nine products of shifted maps."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = 0
    for row in range(3):
        for column in range(3):
            shifted = padded[:, row : row + height, column : column + width].reshape(-1, channels)
            total += shifted @ kernel[row, column]
    return total.reshape(batch, height, width, -1)


def one_product(x, kernel):
    """All nine shifted maps side by side, and one product."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * channels)
    return (columns @ kernel.reshape(9 * channels, -1)).reshape(batch, height, width, -1)


def upsampled(x, kernel):
    return plain(x.repeat(2, axis=1).repeat(2, axis=2), kernel)


def upsampled_by_place(x, kernel):
    """The same from four convolutions of the small map."""
    batch, height, width, _ = x.shape
    kernels = jnp.einsum("api,bqj,ijcd->abpqcd", _PLACES, _PLACES, kernel)
    rows = []
    for a in (0, 1):
        pair = [
            lax.conv_general_dilated(x, kernels[a, b], (1, 1), ((1 - a, a), (1 - b, b)), dimension_numbers=NHWC)
            for b in (0, 1)
        ]
        rows.append(jnp.stack(pair, axis=3))
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


WAYS = {"plain": plain, "NCHW": channels_first, "9 products": shifted_products, "1 product": one_product}
UPSAMPLED_WAYS = {"upsampled, plain": upsampled, "upsampled, by place": upsampled_by_place}


def torch_runs(x, kernel, cotangent) -> dict[str, Any]:
    """PyTorch's convolution, where it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    weight = torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1)))
    maps, gradient = (torch.from_numpy(np.array(each.transpose(0, 3, 1, 2))) for each in (x, cotangent))

    def backward():
        return torch.nn.grad.conv2d_input(maps.shape, weight, gradient, padding=1)

    return {
        "PyTorch, forward": lambda: torch.nn.functional.conv2d(maps, weight, padding=1),
        "PyTorch, backward": backward,
    }


def compare(side: int, channels: int, ways: dict, repeats: int, torch: bool) -> dict[str, Any]:
    """Milliseconds and largest relative difference of each way."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, side, side, channels), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, channels, channels), np.float32) / (3 * channels**0.5))
    first = jax.jit(next(iter(ways.values())))
    expected = first(x, kernel)
    cotangent = jnp.cos(expected)
    runs, errors = {}, {}
    for name, way in ways.items():
        forward = jax.jit(way)

        @jax.jit
        def backward(x, kernel, cotangent, way=way):
            return jax.vjp(lambda x: way(x, kernel), x)[1](cotangent)[0]

        errors[name] = float(jnp.abs(forward(x, kernel) - expected).max() / jnp.abs(expected).max())
        runs[f"{name}, forward"] = common.blocking(forward, x, kernel)
        runs[f"{name}, backward"] = common.blocking(backward, x, kernel, cotangent)
    runs |= torch_runs(x, kernel, cotangent) if torch else {}
    seconds = common.interleaved(runs, repeats)
    return {
        "map": [side, side, channels],
        "milliseconds": {name: round(1e3 * common.spread(each)["median_seconds"], 2) for name, each in seconds.items()},
        "differences": errors,
        "kernel": _library(first.lower(x, kernel).compile().as_text()),
    }


def _library(program: str) -> str:
    """Who computes the convolution of a compiled program."""
    found = re.findall(r'"kind":"(__\w+)"|custom_call_target="([^"]*)"', program)
    return ", ".join(sorted({name for pair in found for name in pair if name})) or "XLA's own"


def main(argv: Sequence[str]) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--plain", action="store_true", help="only XLA's convolution: to compare flags")
    flags.add_argument("--scale", type=int, default=1, help="divide sides and channels by this, for tests")
    flags.add_argument("--repeats", type=int, default=5, help="timed turns")
    flags.add_argument("--results", type=Path, default=common.RESULTS, help="folder for the result")
    args = flags.parse_args(argv)
    ways, rows = ({"plain": plain} if args.plain else WAYS), []
    tables = ((SIDES, ways, not args.plain), (UPSAMPLED, {} if args.plain else UPSAMPLED_WAYS, False))
    for sizes, each, torch in tables:
        for side, channels in sizes if each else ():
            rows.append(compare(side // args.scale, channels // args.scale, each, args.repeats, torch))
            print(rows[-1]["map"], rows[-1]["milliseconds"], rows[-1]["kernel"], flush=True)
    result = {"benchmark": "convolutions", "date": common.today(), "rows": rows, "machine": common.machine()}
    result["command"] = " ".join(["python -m benchmarks.convolutions", *argv])
    path = common.write(result, f"convolutions-{jax.default_backend()}", args.results)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    run_main(main)
