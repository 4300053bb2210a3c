"""Flags for GPUs: merged with the user's, set only where a GPU will be used, and known to the installed jaxlib."""

import os
import subprocess
import sys

from lpl_jax import xla_flags
from lpl_jax.xla_flags import GPU_FLAGS


def test_what_the_user_set_stays():
    flags = xla_flags.merged("--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x").split()
    assert flags[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=/x"]
    assert len(flags) == len(GPU_FLAGS) + 1
    assert xla_flags.merged(" ".join(flags)).split() == flags
    assert xla_flags.merged("").split() == [f"--{name}={value}" for name, (value, _) in GPU_FLAGS.items()]
    # a flag without a value is the user's too, and one that begins alike is another
    given = xla_flags.merged("--xla_gpu_enable_pipelined_all_gather --xla_gpu_enable_pipelined_all_reduce_x=1").split()
    assert given.count("--xla_gpu_enable_pipelined_all_gather") == 1
    assert "--xla_gpu_enable_pipelined_all_gather=true" not in given
    assert "--xla_gpu_enable_pipelined_all_reduce=true" in given


def test_set_only_for_gpus():
    for platforms, wanted in (("cpu", False), ("tpu,cpu", False), ("cuda", True), ("cuda,cpu", True), ("gpu", True)):
        environment = {"JAX_PLATFORMS": platforms, "XLA_FLAGS": "--mine"}
        assert xla_flags.set_for_gpu(environment) is wanted
        assert environment["XLA_FLAGS"] == (xla_flags.merged("--mine") if wanted else "--mine")


def test_each_flag_says_why():
    assert all(name.startswith("xla_gpu_") and len(why) > 20 for name, (_, why) in GPU_FLAGS.items())


def _start(flags: str):
    code = "import jax; jax.devices()"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_jaxlib_knows_them():
    # XLA ends a process at an unknown flag, also on a CPU and also for a flag of GPUs.
    known = _start(xla_flags.merged(""))
    assert known.returncode == 0, known.stderr[-500:]
    unknown = _start("--xla_gpu_no_such_flag=true")
    assert unknown.returncode != 0 and "xla_gpu_no_such_flag" in unknown.stderr
