"""The paper's recipe, whatever the data: what configs/imagenet.py and configs/cc12m.py have in common."""

from ml_collections import ConfigDict

from lpl_jax.configs import base
from lpl_jax.errors import InputError
from lpl_jax.fields import TO_BE_GIVEN

SIZES = ("paper796", "xl_two_stream", "sd3_faithful", "small", "tiny")
PARADIGMS = ("eps", "v", "flow")
LOSSES = {"lpl": "paper", "reference": "reference"}
# The best average without and with the perceptual loss (Fig. 10); every run keeps both.
AVERAGES = {"none": "0.9999", "lpl": "0.99975"}
FROM_SCRATCH = 10_000  # steps before LPL where no other run is started from: its weight is calibrated on the network


def get_config(file: str, arguments: str) -> ConfigDict:
    """All but data, autoencoder and condition, for the arguments that the head of configs/imagenet.py explains.

    file: the config file that takes them, for messages.
    """
    chosen = base.choose(file, arguments, ("256", "512", *PARADIGMS, *LOSSES, "economical", "post", *SIZES))
    large = base.one_of(file, chosen, ("256", "512")) == "512"
    c = base.get_config()
    c.resolution = 512 if large else 256
    c.model.preset = base.one_of(file, chosen, SIZES)
    c.model.remat = "full"
    c.paradigm.name = base.one_of(file, chosen, PARADIGMS)
    c.paradigm.schedule_rescale = 2.0 if large else 1.0
    loss = base.one_of(file, chosen, ("none", *LOSSES))
    c.lpl.preset = LOSSES.get(loss, "none")
    if loss != "none" and "post" not in chosen:
        c.loss.lpl_start = FROM_SCRATCH
    if "economical" in chosen:
        if loss == "none":
            raise InputError(f"{file}: economical says how LPL is estimated: add lpl or reference")
        c.loss.lpl_capacity = "economical"
        c.loss.stratified_t = True
    c.ema.decays = tuple(map(float, AVERAGES.values()))
    c.sampling.weights = AVERAGES["none" if loss == "none" else "lpl"]
    c.train.batch_size = 256 if large else 1024
    c.train.steps = 600_000
    c.sampling.guidance = 2.0 if large else 1.5
    if "post" in chosen:
        c.train.init_from = TO_BE_GIVEN
        c.train.steps = 120_000 if large else 200_000
        c.ema.start = 50_000  # averages begin there in the paper's post-training (Fig. 18)
    return c
