"""ImageNet-1k in the paper's recipe: 256 px from scratch, then post-training at 256 or 512 px with or without LPL.

    python -m lpl_jax.tools.prepare --source /data/imagenet/train --autoencoder stabilityai/sdxl-vae --resolution 256 \
        --out /data/latents256
    python train.py --config configs/imagenet.py:256 --workdir runs/pretrain --config.data.store=/data/latents256
    python train.py --config configs/imagenet.py:512,post,lpl --workdir runs/lpl512 \
        --config.train.init_from=runs/pretrain --config.data.store=/data/latents512

Arguments, comma separated (defaults first):
  256 | 512                     image side; 512 rescales the noise schedule and tau with it, so that the same timesteps
                                carry the perceptual loss
  eps | v | flow                paradigm
  lpl | reference               add the Latent Perceptual Loss: the paper's reading, or the public PyTorch example's
  post                          post-training: 200k steps at 256, 120k at 512, with a new optimizer from train.init_from
  paper796 | xl_two_stream | sd3_faithful | small | tiny    size of the model
Values that the paper states: quadratic schedule, batch and steps, guidance 1.5 (256) and 2.0 (512), DDIM 50 steps. Not
stated, and chosen here: betas, warm-up, clipping, label dropout, EMA decays of the headline runs (docs/decisions.md).
"""

from configs import base

SIZES = ("paper796", "xl_two_stream", "sd3_faithful", "small", "tiny")
PARADIGMS = ("eps", "v", "flow")
LOSSES = {"lpl": "paper", "reference": "reference"}


def get_config(arguments: str = ""):
    """See the head of this file."""
    possible = ("256", "512", *PARADIGMS, *LOSSES, "post", *SIZES)
    chosen = base.choose("configs/imagenet.py", arguments, possible)
    large = base.one_of("configs/imagenet.py", chosen, ("256", "512")) == "512"
    c = base.get_config()
    c.resolution = 512 if large else 256
    c.data.source = "tfds:imagenet2012"
    c.autoencoder.source = "stabilityai/sdxl-vae"
    c.model.preset = base.one_of("configs/imagenet.py", chosen, SIZES)
    c.model.num_classes = 1000
    c.model.remat = "full"
    c.paradigm.name = base.one_of("configs/imagenet.py", chosen, PARADIGMS)
    c.paradigm.schedule_rescale = 2.0 if large else 1.0
    loss = base.one_of("configs/imagenet.py", chosen, ("none", *LOSSES))
    c.lpl.preset = LOSSES.get(loss, "none")
    c.ema.decays = (0.9999, 0.99975)  # the best without and with the perceptual loss (Fig. 10)
    c.train.batch_size = 256 if large else 1024
    c.train.steps = 600_000
    c.sampling.guidance = 2.0 if large else 1.5
    if "post" in chosen:
        c.train.init_from = ""  # to be given
        c.train.steps = 120_000 if large else 200_000
        c.ema.start = 50_000  # averages begin there in the paper's post-training (Fig. 18)
    return c
