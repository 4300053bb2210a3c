"""The weights of a run out of its checkpoint, and weights into a run. docs/weights.md describes the layouts.

    python -m lpl_jax.tools.export --workdir RUN --out FOLDER                      for diffusers, where it has the class
    python -m lpl_jax.tools.export --workdir RUN --out FOLDER --layout lpl_jax     any model
    python -m lpl_jax.tools.export --workdir RUN --out FILE.safetensors            any model, in one file
    python -m lpl_jax.tools.export --import PLACE --config CONFIG --workdir NEWRUN

Import makes a run folder at step 0 whose parameters and averages are the weights in PLACE: such a folder or file, or a
hub id. `train.py` goes on from it with the same --config and overrides (--config.SECTION.FIELD=VALUE).

Nothing is written over, and nothing appears under its name before all of it is written.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

import lpl_jax
from lpl_jax import autoencoders, denoisers
from lpl_jax.denoisers.weights import WEIGHTS, load_params
from lpl_jax.errors import InputError
from lpl_jax.experiment import Experiment, build, resolve, to_dict
from lpl_jax.io.atomic import atomic_path, check_free, write_json
from lpl_jax.parallel import MeshConfig, make_mesh
from lpl_jax.runs import checkpoints, open_run
from lpl_jax.runs.workdir import CHECKPOINTS, CONFIG
from lpl_jax.tools import cli, config_file
from lpl_jax.training import create_state
from lpl_jax.training.optimizer import make_optimizer


def export(workdir: Path, place: Path, *, step: int | None, weights: str | None, layout: str | None) -> str:
    """Writes the model of a run to a folder or file (see `denoisers.save`), and returns a line that says what it is.

    step, weights: of the checkpoint, see `Run.params`.
    Raises InputError: whatever cannot be read, or cannot be written in this layout; nothing has been written then.
    """
    run = open_run(workdir)
    step, weights = run.step(step), run.weights(weights)
    about = {"version": lpl_jax.__version__, "step": step, "weights": weights}
    params = run.params(step=step, weights=weights)
    layout = denoisers.save(run.experiment.model, params, place, layout=layout, about=about)
    return f"{place}: {layout} layout, {_count(params)}, step {step}, weights {weights}"


def import_run(source: str, experiment: Experiment, workdir: Path) -> str:
    """Makes a run folder at step 0 with the weights in `source`, and returns a line that says what it is.

    source: what `denoisers.load` takes.
    Raises InputError: weights that cannot be read or are not of the experiment's model (all that differs is named), or
    a folder that exists; nothing has been written then.
    """
    check_free(workdir)
    if (other := experiment.train.init_from) is not None:
        raise InputError(f"train.init_from={other} is given, which train.py starts from by itself, without --import")
    autoencoder = autoencoders.load(**dataclasses.asdict(experiment.autoencoder))
    experiment = resolve(experiment, autoencoder.config)
    params = load_params(experiment.model, source)
    optimizer, _ = make_optimizer(experiment.optimizer)
    # The mesh of the config is that of the machine that will train; a checkpoint is restored on any.
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), atomic_path(workdir) as partial:
        state = create_state(lambda given: given, optimizer, experiment.ema.decays, mesh, params)
        metadata = to_dict(experiment) | {"imported_from": str(source)}
        with checkpoints.Checkpointer(partial / CHECKPOINTS, metadata=metadata) as checkpointer:
            checkpointer.save(state)
        write_json(partial / CONFIG, to_dict(experiment))
    return f"{workdir}: a run at step 0, {_count(params)} from {source}"


def _count(params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"


def main(argv: Sequence[str]) -> int:
    if any(argument.partition("=")[0] in ("--import", "-import") for argument in argv):
        print(_import(argv))
    else:
        args = _parser().parse_args(argv)
        options = {"step": args.step, "weights": args.weights, "layout": args.layout}
        print(export(Path(args.workdir), Path(args.out), **options))
    return 0


def _import(argv: Sequence[str]) -> str:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("import", None, "weights: a folder, a .safetensors file or a hub id", flag_values=values)
        flags.DEFINE_string("workdir", None, "folder of the new run", flag_values=values)

    config, values = config_file.parse(argv, define)
    if values.help:
        return __doc__
    for name, meaning in (("import", "PLACE"), ("workdir", "NEWRUN")):
        if not values[name].value:
            raise InputError(f"--{name} {meaning} is needed: python -m lpl_jax.tools.export --help")
    return import_run(values["import"].value, build(config), Path(values.workdir).expanduser())


def _parser():
    parser = cli.parser("Write the weights of a run for others to read; with --import, make a run from weights.")
    add = parser.add_argument
    add("--workdir", required=True, help="folder of the run")
    add("--out", required=True, help="new folder, or new file that ends in .safetensors (layout lpl_jax, all in one)")
    add("--step", type=int, help="step of the checkpoint (default: the newest)")
    add("--weights", help="params, or the name of an average such as 0.9999 (default: the first average)")
    add("--layout", choices=WEIGHTS, help="default: diffusers for a folder, lpl_jax for a file")
    parser.epilog = (
        "The other way: --import PLACE --config FILE [--config.SECTION.FIELD=VALUE] --workdir NEWRUN makes a run "
        "folder at step 0 from weights in a folder, a .safetensors file or a hub id."
    )
    return parser


if __name__ == "__main__":
    cli.run_main(main)
