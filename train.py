"""Train a latent diffusion transformer, with or without the Latent Perceptual Loss.

    python train.py --config configs/quickstart.py --workdir runs/mine --config.train.steps=200

Call it again with the same --workdir to resume. Every field of a config and its meaning: configs/base.py.

    --config FILE[:ARGUMENTS]         config file, such as configs/imagenet.py:256,lpl
    --config.SECTION.FIELD=VALUE      change a field of it
    --workdir FOLDER                  folder of the run: config, metrics, checkpoints
    --distributed                     one of several processes; TPU pod, SLURM or Open MPI say which (docs/scaling.md)
    --coordinator HOST:PORT           or by hand: where process 0 listens,
    --num_processes N --process_id I  how many there are and which this is
    --connect_timeout SECONDS         in which all must have started (300)
    --debug                           show the traceback of an error

Exit status: 0 when all steps are done, 2 for a mistake in what was given, 130 when a signal stopped the run.
"""

import time
from collections.abc import Sequence

from absl import flags

from lpl_jax import distributed, xla_flags
from lpl_jax.errors import InputError
from lpl_jax.tools import cli, config_file


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run: config, metrics, checkpoints", flag_values=values)
    distributed.define_flags(values)


def main(argv: Sequence[str]) -> int:
    began = time.perf_counter()
    config, values = config_file.parse(argv, _flags)
    if values.help:
        print(__doc__)
        return 0
    if not values.workdir:
        raise InputError("no folder for the run given: --workdir FOLDER")
    xla_flags.set_for_gpu()
    distributed.initialize_from(values)
    import jax

    from lpl_jax.experiment import build  # imports jax: only once the flags are known to be good
    from lpl_jax.training import train  # imports jax: only once the flags are known to be good

    result = train(build(config), values.workdir, began=began)
    end = (
        f"stopped by a signal at step {result.step}; call again to resume" if result.stopped else f"step {result.step}"
    )
    if jax.process_index() == 0:
        print(f"{values.workdir}: {end}")
    return 130 if result.stopped else 0


if __name__ == "__main__":
    cli.run_main(main)
