"""Train a latent diffusion transformer, with or without the Latent Perceptual Loss.

    lpl train --config quickstart --workdir runs/mine --config.train.steps=200
    lpl train --config imagenet:256,lpl --workdir runs/lpl256 --config.data.store=/data/latents256

Call it again with the same --workdir to resume. `lpl config` explains every field of a config. Exit status: 0 when all
steps are done, 2 for a mistake in what was given, 130 when a signal stopped the run.
"""

import time
from collections.abc import Sequence

from lpl_jax import stopping
from lpl_jax.tools import cli, config_file, flags


def parser() -> cli.Parser:
    """The flags of `lpl train`."""
    result = cli.Parser(__doc__, prog="lpl train")
    flags.add(result, "workdir", required=True)
    flags.add_config(result, required=True)
    flags.add_processes(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Arguments after the verb -> exit status."""
    began = time.perf_counter()
    args = parser().parse_args(argv)
    flags.check_out(args, "workdir")
    config = config_file.given(args)
    flags.join_processes(args)
    import jax  # only once the flags are known to be good

    from lpl_jax.experiment import build

    experiment = build(config)  # before the rest is imported, so that a mistake is said at once
    from lpl_jax.training import train

    result = train(experiment, args.workdir, began=began, given=config.to_dict())
    if jax.process_index() == 0:
        if result.stopped:
            stopping.say(f"{args.workdir} stopped at step {result.step}")
        else:
            print(f"{args.workdir}: step {result.step}")
    return stopping.STATUS if result.stopped else 0
