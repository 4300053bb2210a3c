"""CC12M in the paper's recipe: text to image at 256 px from scratch, then post-training at 256 or 512 px.

    lpl prepare --source '/data/cc12m/{00000..01242}.tar' --resolution 256 \
        --autoencoder cross-attention/asymmetric-autoencoder-kl-x-1-5 --tokenizer openai/clip-vit-large-patch14 \
        --out /data/cc12m256
    lpl train --config cc12m:256 --workdir runs/pretrain --config.data.store=/data/cc12m256
    lpl train --config cc12m:512,post,lpl --workdir runs/lpl512 \
        --config.train.init_from=runs/pretrain --config.data.store=/data/cc12m512

Arguments are those of configs/imagenet.py (256 | 512, eps | v | flow, lpl | reference, economical, post, size of the
model).
The tars are img2dataset's. Stated by the paper: autoencoder of the main results, steps, batch, guidance, DDIM 50 steps,
captions rewritten by Florence-2 (ours are those of the tars: put others into them as a field of the json). From the
companion paper: CLIP ViT-L/14 and its 77 tokens. Not stated: layer of CLIP and pooled vector (docs/decisions.md).
"""

from lpl_jax.configs import recipe

AUTOENCODER = "cross-attention/asymmetric-autoencoder-kl-x-1-5"
CLIP = "openai/clip-vit-large-patch14"


def get_config(arguments: str = ""):
    """See the head of this file."""
    c = recipe.get_config("configs/cc12m.py", arguments)
    c.data.source = "/data/cc12m"  # or --config.data.store, a store that was prepared
    c.autoencoder.source = AUTOENCODER
    c.text.source = CLIP
    c.evaluation.num_images = "auto"  # as many as the reference, CC12M's validation images (Sec. 4.1)
    return c
