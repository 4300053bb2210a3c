"""The folder of a run: its config, its checkpoints, its lock; and the run as an object."""

from lpl_jax.runs.run import Run, open_run

__all__ = ["Run", "open_run"]
