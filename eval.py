"""Evaluate the checkpoints of a run, or a set of images, against real images; or compare result cards.

    python eval.py --workdir runs/lpl --config.evaluation.reference=/data/imagenet/val
    python eval.py --images samples/ --reference /data/imagenet/val --out results/theirs
    python eval.py compare runs/lpl/evaluation/* results/theirs

Every field of the section `evaluation` and its meaning: configs/base.py. The sections sampling, mesh and evaluation of
the config count; what the images depend on besides is the run's own.

    --config FILE[:ARGUMENTS]      config file; without it that of the run, or configs/base.py
    --config.SECTION.FIELD=VALUE   change a field of it
    --workdir FOLDER               folder of a run
    --images SET                   folder of images, .npz or .npy
    --out FOLDER                   where cards, pictures and features go (runs: WORKDIR/evaluation)
    --features NAME                inception (FID; weights file needed) | classifier (ours; comparisons only)
    --reference SET                real images or .npz statistics (runs: the images that the run learns from)
    --resolution SIDE              bring --images to this size first (shorter side resized, centre crop)
    --statistics FILE.npz          only write means and covariances of --images, as pytorch-fid and ADM have them
    --checkpoints 10000,20000      steps of checkpoints, comma separated, or all; in the same way
    --weights params,0.9999        weights,
    --guidance 1,1.5,2             guidance scales
    --steps 10,50,250              and sampling steps: every combination is evaluated, with a table and curves
    --distributed                  one of several processes (or --coordinator ..., as in train.py)
    --debug                        show the traceback of an error

Call it again after it was stopped: features that were computed are not computed again.
"""

from collections.abc import Sequence

from lpl_jax import xla_flags
from lpl_jax.tools import cli


def main(argv: Sequence[str]) -> int:
    if not argv or {"--help", "-h", "--helpshort"} & set(argv):
        print(__doc__)
        return 0
    xla_flags.set_for_gpu()
    from lpl_jax.configs import base
    from lpl_jax.tools import evaluate  # imports jax: not for the help

    return evaluate.main(argv, base.get_config())


if __name__ == "__main__":
    cli.run_main(main)
