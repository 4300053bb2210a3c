"""What the other tests find without XLA's optimisation holds at its normal level, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMERIC = ("training/test_step.py", "losses/test_gate.py", "losses/test_reference_twin.py", "losses/test_paper_twin.py")


@pytest.mark.slow
@pytest.mark.parametrize("file", NUMERIC)
def test_numbers_hold_at_the_normal_level_of_optimisation(file):
    """In a process of its own, whose programs are not shared with this one; conftest.py adds no flag that is given."""
    flags = "--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTEST_"))}
    environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"tests/{file}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
