"""A reference implementation that needs more than is installed."""

import importlib
import importlib.util
import sys
import types

import pytest


@pytest.fixture(scope="module")
def torch_fidelity():
    """function(name) -> a module of torch-fidelity, without the package's __init__, which needs torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        before = set(sys.modules)
        yield lambda name: importlib.import_module(f"torch_fidelity.{name}")
        for name in set(sys.modules) - before:
            if name.startswith("torch_fidelity."):
                del sys.modules[name]
