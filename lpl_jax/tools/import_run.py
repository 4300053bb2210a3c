"""Make a run from weights: a folder at step 0, which `lpl train` resumes with the same config and overrides.

    lpl import exports/base.safetensors --config quickstart --workdir runs/imported

Its parameters and averages are the weights in SOURCE: a folder, a file of weights or a hub id (docs/weights.md).
Nothing is overwritten, and nothing appears under its name before all of it is written.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from lpl_jax import autoencoders
from lpl_jax.denoisers.weights import load_params
from lpl_jax.errors import InputError
from lpl_jax.experiment import Experiment, build, resolve, to_dict
from lpl_jax.io.atomic import atomic_path, check_free, write_json
from lpl_jax.parallel import MeshConfig, make_mesh
from lpl_jax.runs import checkpoints
from lpl_jax.runs.workdir import CHECKPOINTS, CONFIG
from lpl_jax.text import load_conditioner
from lpl_jax.tools import cli, config_file, flags
from lpl_jax.training import create_state
from lpl_jax.training.optimizer import make_optimizer


def import_run(source: str, experiment: Experiment, workdir: Path, variant: str | None = None) -> str:
    """Makes a run folder at step 0 with the weights in `source`, and returns a line that says what it is.

    source, variant: what `denoisers.load` takes.
    Raises InputError: weights that cannot be read or are not of the experiment's model (what differs is named), or
    a folder that exists; nothing has been written then.
    """
    check_free(workdir)
    if (other := experiment.train.init_from) is not None:
        raise InputError(f"train.init_from={other} is given, which lpl train starts from by itself")
    autoencoder = autoencoders.load(**dataclasses.asdict(experiment.autoencoder))
    text = load_conditioner(experiment.text)[0] if experiment.text else None
    experiment = resolve(experiment, autoencoder.config, text.clip.config.text if text else None)
    params = load_params(experiment.model, source, variant=variant)
    optimizer, _ = make_optimizer(experiment.optimizer)
    # The mesh of the config is that of the machine that will train; a checkpoint is restored on any.
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), atomic_path(workdir) as partial:
        state = create_state(lambda given: given, optimizer, experiment.ema.decays, mesh, params)
        metadata = to_dict(experiment) | {"imported_from": str(source)}
        with checkpoints.Checkpointer(partial / CHECKPOINTS, metadata=metadata) as checkpointer:
            checkpointer.save(state)
        write_json(partial / CONFIG, to_dict(experiment))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"{workdir}: a run at step 0, {size:,} parameters from {source}"


def parser() -> cli.Parser:
    """The flags of `lpl import`."""
    result = cli.Parser(__doc__, prog="lpl import")
    result.add_argument("source", type=cli.text, metavar="SOURCE", help="a folder, a file of weights or a hub id")
    text = "which weights, where SOURCE has several and none in full precision, such as fp16 or ema"
    result.add_argument("--variant", type=cli.text, metavar="NAME", help=text)
    flags.add(result, "workdir", required=True)
    flags.add_config(result, required=True)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    args = parser().parse_args(argv)
    flags.check_local(args, "workdir")
    print(import_run(args.source, build(config_file.given(args)), args.workdir, args.variant))
    return 0
