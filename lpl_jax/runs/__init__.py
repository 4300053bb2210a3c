"""The folder of a run: its config, its checkpoints, its lock."""

from lpl_jax.runs.workdir import load_run

__all__ = ["load_run"]
