"""ImageNet-1k in the paper's recipe: 256 px from scratch, then post-training at 256 or 512 px with or without LPL.

    lpl prepare --source /data/imagenet/train --autoencoder stabilityai/sdxl-vae --resolution 256 \
        --out /data/latents256
    lpl train --config imagenet:256 --workdir runs/pretrain --config.data.store=/data/latents256
    lpl train --config imagenet:512,post,lpl --workdir runs/lpl512 \
        --config.train.init_from=runs/pretrain --config.data.store=/data/latents512

Arguments, comma separated (defaults first):
  256 | 512                     image side; 512 rescales the noise schedule and tau with it, so that the same timesteps
                                carry the perceptual loss
  eps | v | flow                paradigm
  lpl | reference               add the Latent Perceptual Loss: the paper's reading, or the public PyTorch example's;
                                without post it begins after 10,000 steps, when its weight can be calibrated
  economical                    an unbiased estimate of it from one image in 12, at stratified timesteps: a step then
                                takes about 1.2 times the operations of one without (docs/flops.md)
  post                          post-training: 200k steps at 256, 120k at 512, with a new optimizer from train.init_from
  paper796 | xl_two_stream | sd3_faithful | small | tiny    size of the model
Values that the paper states: quadratic schedule, batch and steps, guidance 1.5 (256) and 2.0 (512), DDIM 50 steps. Not
stated, and chosen here: betas, warm-up, clipping, label dropout, EMA decays of the headline runs (docs/decisions.md).
"""

from lpl_jax.configs import recipe


def get_config(arguments: str = ""):
    """See the head of this file."""
    c = recipe.get_config("configs/imagenet.py", arguments)
    c.data.source = "tfds:imagenet2012"
    c.autoencoder.source = "stabilityai/sdxl-vae"
    c.model.num_classes = 1000
    return c
