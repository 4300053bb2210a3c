"""Test session set-up: CPU only, eight emulated devices (set before jax is imported); a tiny run for all tests."""

import atexit
import functools
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("LPL_JAX_COMPILE_CACHE", "off")  # nothing is written into the user's home
# Programs here are tiny, so that compiling them is most of the time: LLVM's optimisation is switched off, and the
# emitters of fusions are the older ones, which compile a step in 70 % of the time.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_parallel_codegen_split_count=1",
)
for flag in FLAGS:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

# Many tests need the same programs: each is compiled once in a session, for all workers and the processes they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="lpl_jax-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# ruff: noqa: E402
import array_checks

array_checks.install()

import jax
import numpy as np
from PIL import Image

from lpl_jax import autoencoders, parallel
from lpl_jax.configs import base
from lpl_jax.data import FolderSource, write_store

# Tracing makes many objects that live long: looking through them again and again took a tenth of the time.
gc.set_threshold(100_000, 20, 50)

# Begun first, so that no worker is left with one of them when the other is done.
LONGEST = ("test_step.py", "test_loop.py", "test_gpu.py", "test_quickstart.py", "test_text.py", "test_distributed.py",
           "test_evaluate.py", "test_compiled_step.py", "test_mmdit.py", "test_chunked.py")  # fmt: skip

MANY_MAPS, MUCH_MEMORY = 12_000, 2 * 2**30  # of the 65,530 maps that Linux gives a process; bytes

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


def pytest_addoption(parser):
    parser.addoption("--part", metavar="I/N", help="only the files of part I of N, from 1; each is in one part")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--part"):
        part, parts = map(int, config.getoption("--part").split("/"))
        if not 1 <= part <= parts:
            raise pytest.UsageError(f"--part {part}/{parts}: parts are numbered from 1 to {parts}")
        items[:] = [item for item in items if part_of(item.path, parts) == part]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def part_of(path, parts):
    """The part that a file is in, 1 to parts: the longest files first, each into the part that has least so far.

    slow_seconds.json says how long the slow tests of a file take; files that it does not name have few or none.
    """
    return _parts(parts)[path.relative_to(TESTS).as_posix()]


@functools.cache
def _parts(parts):
    seconds = json.loads((TESTS / "slow_seconds.json").read_text())
    names = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
    loads, found = [0] * parts, {}
    for name in sorted(names, key=lambda name: -seconds.get(name, 1)):
        least = loads.index(min(loads))
        loads[least] += seconds.get(name, 1)
        found[name] = least + 1
    return found


@pytest.fixture(scope="session")
def shared():
    """Folder of real data and weights beside the checkout; tests that use it are marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data beside the checkout ({SHARED.name}/ is missing)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_autoencoder():
    """Random weights (drawn by numpy: compiling the initialisers takes longer)."""
    config = autoencoders.AutoencoderConfig.tiny()
    shapes = jax.eval_shape(functools.partial(autoencoders.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
        return (rng.standard_normal(leaf.shape) * spread + (len(leaf.shape) == 1)).astype(np.float32)

    return jax.tree.map(fill, shapes)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_autoencoder):
    """The same autoencoder in diffusers layout."""
    folder = tmp_path_factory.mktemp("autoencoder") / "tiny"
    autoencoders.save(tiny_autoencoder, folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(16):
        path = root / ("ant" if index % 2 else "bee") / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="session")
def stores(tmp_path_factory, tiny_folder, image_folder):
    """Latent stores of the images by resolution, each made when it is asked for."""
    root = tmp_path_factory.mktemp("stores")

    class Stores(dict):
        def __missing__(self, size):
            source = FolderSource(image_folder, size)
            write_store(root / str(size), source, autoencoders.load(tiny_folder), batch_size=16)
            self[size] = root / str(size)
            return self[size]

    return Stores()


@pytest.fixture(scope="session")
def tiny_config(tiny_folder, stores):
    """function(resolution, **changes by dotted name) -> ConfigDict of a run of a few steps."""

    def make(resolution=32, **changes):
        c = base.get_config()
        c.resolution = resolution
        c.data.store = str(stores[resolution])
        c.autoencoder.source = str(tiny_folder)
        c.model.hidden, c.model.depth, c.model.heads, c.model.num_classes, c.model.base_grid = 16, 2, 2, 2, 2
        c.optimizer.warmup_steps = 2
        c.optimizer.learning_rate = 1e-3
        c.ema.decays = (0.5, 0.9)
        c.train.batch_size, c.train.steps, c.train.log_every, c.train.checkpoint_every = 8, 6, 2, 3
        c.loss.calibration_batches = 2
        for name, value in changes.items():
            section, _, field = name.partition("__")
            c[section][field] = value
        return c

    return make


@pytest.fixture(scope="session")
def with_lpl():
    """Changes that switch the perceptual loss on, stated for 32 px, with a weight: none is calibrated from scratch."""
    return dict(lpl__preset="paper", lpl__weight=1.0, lpl__tau=3.0, lpl__tau_ref_resolution=32)


@pytest.fixture(scope="module")
def two_devices():
    """Runs use two devices: with eight they take half as long again, and what is saved is cut into eight parts."""
    with pytest.MonkeyPatch.context() as patch:
        make = parallel.make_mesh
        patch.setattr(parallel, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:2]))
        yield


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs serve the next modules, until they are many: they take gigabytes, and memory maps run out."""
    yield
    if programs_are_many():
        jax.clear_caches()


def programs_are_many():
    """By what Linux says of this process; True elsewhere."""
    maps, memory = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not (maps.exists() and memory.exists()):
        return True
    resident = int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident > MUCH_MEMORY or maps.read_bytes().count(b"\n") > MANY_MAPS
