"""The main job in miniature, on a CPU: `make quickstart` runs base, then post and post,lpl from its checkpoint.

    python train.py --config configs/quickstart.py --workdir runs/base
    python train.py --config configs/quickstart.py:post,lpl --workdir runs/lpl --config.train.init_from=runs/base

Data: random crops of the photographs inside scikit-image, 64 px; the class is the photograph.
"""

from configs import base


def get_config(arguments: str = ""):
    """arguments, comma separated: post (post-training: start from another run), lpl (with the perceptual loss)."""
    chosen = base.choose("configs/quickstart.py", arguments, ("post", "lpl"))
    c = base.get_config()
    c.resolution = 64
    c.data.crops = 256
    c.model.preset = "small"
    c.model.hidden, c.model.depth, c.model.heads = 192, 6, 3
    c.model.num_classes = 8
    c.model.base_grid = 4
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 50
    c.ema.decays = (0.99,)
    c.train.batch_size = 64
    c.train.steps = 600
    c.train.log_every = 20
    c.train.checkpoint_every = 200
    c.sampling.guidance = 2.0
    if "post" in chosen:
        c.train.steps = 150
        c.optimizer.learning_rate = 3e-4
        c.optimizer.warmup_steps = 10
    if "lpl" in chosen:
        c.lpl.preset = "paper"
        # The schedule is that of 256 px, so the threshold is stated for this size: 48 % of the timesteps take part.
        c.lpl.tau, c.lpl.tau_ref_resolution = 1.5, 64
        c.loss.lpl_capacity = "16"
        c.loss.calibration_batches = 4
    return c
