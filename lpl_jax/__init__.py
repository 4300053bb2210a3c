"""Latent Perceptual Loss for latent diffusion models, in JAX and Flax: `open_run` opens what `lpl train` has made."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpl_jax.runs import open_run

__version__ = "0.1.0"
__all__ = ["open_run"]


def __getattr__(name: str) -> Any:
    if name == "open_run":  # imported when it is used: `lpl --help` needs no jax
        from lpl_jax.runs import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
