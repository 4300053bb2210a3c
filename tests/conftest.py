"""Test session set-up: CPU only, eight emulated devices (set before the first import of jax)."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are tiny, so that compiling them is most of the time: LLVM's optimisation is switched off.
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
    """Folder of real data and weights beside the checkout; tests that use it are marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data beside the checkout ({SHARED.name}/ is missing)")
    return SHARED
