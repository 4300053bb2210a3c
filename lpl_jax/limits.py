"""The ranges that fields of configs and flags share.

Each is far above what anybody runs, and within what its type holds on the devices: a step and a row are int32 there, a
seed is uint32.
"""

from lpl_jax.fields import between, whole

SEED = whole(0, 2**32 - 1)
STEPS = whole(1, 10**9)
STEP = whole(0, 10**9)
SIDE = whole(1, 2**14)  # of an image, pixels
BATCH = whole(1, 2**20)  # images
IMAGES = whole(2, 10**7)  # of an evaluation: a distance between distributions needs two
MOST_IMAGES = whole(1, 10**10)  # "at most so many": fewer are no mistake
COUNT = whole(1, 10**4)  # images of a class or prompt
DEPTH = whole(1, 1000)  # blocks of a denoiser
REFERENCES = whole(2, 10**10)
CROPS = whole(1, 10**6)  # of a photograph
SAMPLER_STEPS = whole(1, 10**5)
GUIDANCE = between(0, 1000)
TOKENS = whole(2, 4096)  # of a text: start and end at least
# A decay that float32 tells from 1.
DECAY = between(0, 0.9999999)
WEIGHT = between(0, 1e6)  # of a term of the loss
CALIBRATED_SHARE = between(0, 1, ends="none")
NOISE_LEVEL = 1e6  # sigma / alpha: at most

# What has no unit of its own is bounded by what it makes together.
PARAMETERS = 10**12  # of a denoiser: 16 TB with its moments and an average
BATCH_PIXELS = 2**38  # of all images of a batch: a million at 512 px
