"""All that is known about one training step: formulas, the traced, compiled and measured program, in one report."""

from typing import Any

import jax

from lpl_jax import parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.cost import step_cost
from lpl_jax.experiment import Experiment
from lpl_jax.text import TextConditioner


def profile_step(
    experiment: Experiment,
    autoencoder: Autoencoder,
    text: TextConditioner | None = None,
    *,
    compile: bool = False,
    run: bool = False,
    repeats: int = 10,
    peak: float | None = None,
) -> dict[str, Any]:
    """All that is known about the step of a resolved experiment, as plain values. `run` needs `compile`."""
    mesh = parallel.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        report = step_cost.analyse(experiment, autoencoder, text)
        traced = report["traced"] = step_cost.trace(experiment, autoencoder, mesh, text)
        compiled = None
        if compile:
            compiled, report["compiled"] = step_cost.compile_step(experiment, autoencoder, mesh, text)
            missed = (traced["step"] - traced["bodies_once"]) / mesh.size
            report["compiled"] |= {"devices": mesh.size, "flops_with_loops": report["compiled"]["flops"] + missed}
        if run:
            measured = step_cost.measure(experiment, autoencoder, mesh, compiled, text, repeats=repeats)
            model_flops = report["analytic"]["usual"]["total"] * experiment.train.batch_size
            report["measured"] = measured | step_cost.utilisation(measured["step_seconds"], model_flops, mesh, peak)
    return report
