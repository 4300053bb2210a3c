"""The main job in miniature, on a CPU: `make quickstart` runs base, then post and post,lpl from its checkpoint.

    lpl train --config quickstart --workdir runs/base
    lpl train --config quickstart:post,lpl --workdir runs/lpl --config.train.init_from=runs/base

Data: random crops of the photographs inside scikit-image, 64 px; the class is the photograph. With `text` the same
network learns from captions, through the bundled text tower:

    lpl train --config quickstart:text --workdir runs/text --config.data.source=FOLDER_OF_TARS
"""

from lpl_jax.configs import base
from lpl_jax.fields import TO_BE_GIVEN


def get_config(arguments: str = ""):
    """arguments, comma separated: post (start from another run), lpl (with the perceptual loss), text (captions)."""
    chosen = base.choose("configs/quickstart.py", arguments, ("post", "lpl", "text"))
    c = base.get_config()
    c.resolution = 64
    c.model.preset = "small"
    c.model.hidden, c.model.depth, c.model.heads = 128, 6, 2
    if "text" in chosen:
        c.text.source = "bundled"
        c.text.length = 24
    else:
        c.data.crops = 128
        c.model.num_classes = 8
    c.model.base_grid = 4
    c.paradigm.name = "v"  # learns the layout of an image sooner than eps does
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    c.ema.decays = (0.99,)
    c.train.batch_size = 64
    c.train.steps = 1000
    c.train.log_every = 20
    c.train.checkpoint_every = 250
    if "post" in chosen:
        c.train.init_from = TO_BE_GIVEN
        c.train.steps = 120
        c.train.log_every = 10
        c.optimizer.learning_rate = 1e-3
        c.optimizer.warmup_steps = 10
    if "lpl" in chosen:
        c.lpl.preset = "paper"
        # The schedule is that of 256 px, so the threshold is stated for this size: 45 % of the timesteps take part.
        c.lpl.tau, c.lpl.tau_ref_resolution = 1.5, 64
        c.loss.lpl_capacity = "8"
        c.loss.calibration_batches = 4
    return c
