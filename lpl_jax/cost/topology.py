"""Machines to compile for without having them: TPU slices by name, and emulated CPU devices.

    v5e:4x4, v5p:2x2x4     libtpu's own names, chips along each axis
    v5e-16, v6e-16         the cloud's names; the number counts chips
    v5p-16, v4-16          the cloud's names; the number counts TensorCores, two in each chip
    cpu:8                  devices of this machine's CPU backend

A chip is one device of JAX.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lpl_jax.errors import InputError, short

# JAX is imported where devices are asked for: it reads the environment once.

GIB = 2**30
MOST_EMULATED, MOST_CHIPS = 1024, 64  # devices on this CPU; chips of a slice along an axis


@dataclass(frozen=True)
class Family:
    """A generation of TPUs.

    hbm: bytes of a chip that a program may use, as libtpu's own errors state them. cores: TensorCores of a chip, which
    the cloud's names count. axes: of a slice.
    """

    hbm: float
    cores: int
    axes: int


FAMILIES = {
    "v4": Family(30.75 * GIB, 2, 3),
    "v5e": Family(15.75 * GIB, 1, 2),
    "v5p": Family(95.73 * GIB, 2, 3),
    "v6e": Family(31.24 * GIB, 1, 2),
}
# Slices that the cloud has, by number of axes and of chips.
SLICES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}
INSTALL = 'compiling for TPUs needs libtpu: pip install "lpl_jax[tpu-compile]" (or libtpu alone; no TPU is needed)'
MESSAGES = "LPL_JAX_COMPILER_MESSAGES"  # names a file for what the compiler says, for who starts the process
LIBRARY = "TPU_LIBRARY_PATH"  # names libtpu's file where it is no package


@dataclass(frozen=True)
class Topology:
    """given: as asked for. name: libtpu's name, or cpu:N. devices: number of them. hbm: bytes of each, None unknown."""

    given: str
    family: str
    name: str
    devices: int
    hbm: float | None

    @property
    def platform(self) -> str:
        """The name of the platform in jax: cpu or tpu."""
        return "cpu" if self.family == "cpu" else "tpu"

    @property
    def text(self) -> str:
        """What was asked for and what that is."""
        kind = "devices emulated on this CPU" if self.family == "cpu" else f"{self.family} chips"
        name = self.name if self.given == self.name else f"{self.given} = {self.name}"
        if self.given != self.name and FAMILIES[self.family].cores > 1:
            kind += f" (the name counts TensorCores, {FAMILIES[self.family].cores} in each chip)"
        return f"{name}: {self.devices} {kind}"


def parse(given: str) -> Topology:
    """A name of the list above. Raises InputError for another one, with what is possible."""
    if match := re.fullmatch(r"cpu:(\d+)", given):
        count = int(match[1])
        if not 1 <= count <= MOST_EMULATED:
            raise InputError(f"--topology {short(given)}: possible are 1 to {MOST_EMULATED:,} emulated devices")
        return Topology(given, "cpu", given, count, None)
    match = re.fullmatch(r"(\w+)(:|-)([\dx]+)", given)
    family = FAMILIES.get(match[1]) if match else None
    if match is None or family is None:
        raise InputError(f"--topology {given!r} is not known; possible: {_possible()}")
    if match[2] == ":":
        sizes = [int(size or 0) for size in match[3].split("x")]
        if len(sizes) != family.axes or min(sizes) < 1:
            axes = " x ".join("ABC"[: family.axes])
            raise InputError(f"--topology {given}: a slice of {match[1]} is {axes} chips; possible: {_possible()}")
        if max(sizes) > MOST_CHIPS:
            raise InputError(f"--topology {short(given)}: at most {MOST_CHIPS} chips along an axis are possible")
        return Topology(given, match[1], given, math.prod(sizes), family.hbm)
    slices = {chips * family.cores: shape for chips, shape in SLICES[family.axes].items()}
    if not match[3].isdecimal() or int(match[3]) not in slices:
        names = ", ".join(f"{match[1]}-{number}" for number in slices)
        raise InputError(f"--topology {given} is no slice that there is; possible: {names}")
    number = int(match[3])
    return Topology(given, match[1], f"{match[1]}:{slices[number]}", number // family.cores, family.hbm)


def _possible() -> str:
    return f"cpu:N, or {', '.join(FAMILIES)} with chips along each axis (v5e:4x4, v5p:2x2x4) or a number (v5e-16)"


def environment(topology: Topology) -> dict[str, str]:
    """Environment variables that have to be set before jax is imported.

    With them libtpu looks for no TPU, and logs the partitioner's warnings.
    """
    values = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}
    flags = os.environ.get("XLA_FLAGS", "").split()
    if topology.platform == "cpu":
        flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
        flags.append(f"--xla_force_host_platform_device_count={topology.devices}")
        return values | {"XLA_FLAGS": " ".join(flags)}
    flags = [flag for flag in flags if not flag.startswith(("--xla_cpu_", "--xla_gpu_"))]  # libtpu ends at unknown ones
    return values | {
        "XLA_FLAGS": " ".join(flags),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: the topology is asked for by name
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "1",
        "TPU_MIN_LOG_LEVEL": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compile side by side
    }


def has_libtpu() -> bool:
    """Whether libtpu is there: as a package, or as the file that TPU_LIBRARY_PATH names."""
    return importlib.util.find_spec("libtpu") is not None or Path(os.environ.get(LIBRARY, "")).is_file()


def check_libtpu() -> None:
    """Raises InputError where libtpu is not there, or not where TPU_LIBRARY_PATH says."""
    named = os.environ.get(LIBRARY)
    if named and not Path(named).is_file():
        raise InputError(f"{LIBRARY}={named}: there is no such file; it has to name libtpu.so, or be unset")
    if not has_libtpu():
        raise InputError(INSTALL)


def devices(topology: Topology) -> Sequence:
    """Devices to make a mesh of; of a TPU slice they can be compiled for, not computed on.

    Raises InputError: no libtpu, a slice that it does not know, or a process with another number of CPU devices.
    """
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.devices:
            raise InputError(f"--topology {topology.name}: this process has {len(found)} CPU devices")
        return found[: topology.devices]
    check_libtpu()
    options = {}
    if topology.family == "v4":  # one device for each chip, as the others have it
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "wrap": (False,) * 3}
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except Exception as error:  # jax's and libtpu's own kinds
        reason = str(error).splitlines()[0]
        shapes = ", ".join(SLICES[FAMILIES[topology.family].axes].values())
        raise InputError(f"libtpu does not know {topology.name}: {reason}; possible shapes: {shapes}") from error
    if len(found) != topology.devices:
        raise InputError(f"libtpu gives {len(found)} devices for {topology.name}, not {topology.devices}")
    return found


def mesh_context(mesh):
    """Context manager: `mesh` is set, as in training; of devices that are not there, its shape alone can be."""
    import jax

    there = mesh.devices.flat[0].platform != "tpu" or jax.default_backend() == "tpu"
    return jax.set_mesh(mesh) if there else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
