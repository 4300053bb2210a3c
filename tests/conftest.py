"""Test session set-up: CPU only, eight emulated devices (set before the first import of jax)."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
    """Folder of real data and weights beside the checkout; tests that use it are marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data beside the checkout ({SHARED.name}/ is missing)")
    return SHARED
