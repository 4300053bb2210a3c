"""Latent Perceptual Loss for latent diffusion models, in JAX and Flax: `open_run` opens what `lpl train` has made."""

import importlib as _importlib
from typing import Any as _Any

__version__ = "0.1.0"
__all__ = ["open_run"]

_PARTS = (
    *("analysis", "autoencoders", "cost", "data", "denoisers", "diffusion", "evaluation", "experiment", "losses"),
    *("parallel", "runs", "text", "training"),
)


def __getattr__(name: str) -> _Any:
    """Parts are imported when they are first used: `lpl --help` needs no jax."""
    if name == "open_run":
        return _importlib.import_module("lpl_jax.runs").open_run
    if name in _PARTS:
        return _importlib.import_module(f"lpl_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS, "__version__"])
