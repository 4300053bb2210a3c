"""Flags of XLA for GPUs, as data, and their way into XLA_FLAGS before jax is imported.

XLA reads the variable once, when the first backend starts, and ends the process at a flag that it does not know; so
each flag here is known to the pinned jaxlib, which a test checks. What the user has set himself stays as it is. This
module does not import jax.

Left at XLA's defaults in jaxlib 0.10.2, on purpose:
  xla_gpu_autotune_level (4)           algorithms of products and convolutions are timed, and their results compared
  xla_gpu_enable_triton_gemm (true),   products are tuned over Triton's kernels and cuBLAS's, whichever is faster
  xla_gpu_triton_gemm_any (true)
  xla_gpu_enable_command_buffer        launches are already recorded as CUDA graphs; collectives are left out, and have
                                       hung where they were added (marin-community/marin #5675)
  xla_gpu_force_conv_nhwc (false)      cuDNN gets NHWC convolutions anyway: from compute capability 9 (H100) in every
                                       type, from 7 in 16-bit types (XLA's gpu/transforms/layout_assignment.cc)
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# flag -> (value, why)
GPU_FLAGS: Mapping[str, tuple[str, str]] = {
    "xla_gpu_enable_latency_hiding_scheduler": (
        "true",
        "collectives (FSDP's gathers, the reduction of gradients) run beside computation; off by default, on in "
        "NVIDIA's own JAX images",
    ),
    "xla_gpu_enable_pipelined_all_gather": (
        "true",
        "blocks are scanned: the gather of the next block's parameters begins in the iteration before",
    ),
    "xla_gpu_enable_pipelined_all_reduce": (
        "true",
        "as above for gradients that are reduced inside a scan; reduce-scatters are pipelined by default",
    ),
    "xla_gpu_all_gather_combine_threshold_bytes": (
        str(128 * 2**20),
        "fewer and larger gathers than with 30 MiB; a block of paper796 is 28 M parameters, 56 MiB in bfloat16",
    ),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": (str(128 * 2**20), "the same for the sums of gradients"),
    "xla_gpu_all_reduce_combine_threshold_bytes": (str(128 * 2**20), "the same for gradients that are not sharded"),
}

_GPU_PLATFORMS = ("gpu", "cuda")
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version")


def merged(flags: str, wanted: Mapping[str, tuple[str, str]] = GPU_FLAGS) -> str:
    """`flags`, a value of XLA_FLAGS, with those of `wanted` appended that it does not set itself."""
    given = {flag.lstrip("-").partition("=")[0] for flag in flags.split()}
    added = [f"--{name}={value}" for name, (value, _) in wanted.items() if name not in given]
    return " ".join([*flags.split(), *added])


def wants_gpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether jax will use a GPU of NVIDIA: one is asked for by JAX_PLATFORMS, or there is one with jax's plugin."""
    if platforms := environment.get("JAX_PLATFORMS", ""):
        return any(platform in _GPU_PLATFORMS for platform in platforms.split(","))
    plugin = any(importlib.util.find_spec(name) for name in _PLUGINS)
    return plugin and any(Path(path).exists() for path in _DEVICES)


def set_for_gpu(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Add `GPU_FLAGS` to XLA_FLAGS where a GPU will be used; says whether they were. Call it before jax is imported."""
    if not wants_gpu(environment):
        return False
    environment["XLA_FLAGS"] = merged(environment.get("XLA_FLAGS", ""))
    return True
