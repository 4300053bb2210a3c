"""Every field of a config, with its default. Other configs start from this one and change a few.

    lpl train --config base --workdir runs/mine --config.train.steps=1000

A field at None (a placeholder) takes the default of its part or of the named preset; give it a value to change that.
The same file describes one CPU and a TPU pod: sizes are global, and the mesh says how they are split.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lpl_jax.errors import InputError


def choose(file: str, arguments: str, possible: tuple[str, ...]) -> set[str]:
    """The comma-separated arguments of a config file, each one of `possible`."""
    chosen = {word for word in arguments.split(",") if word}
    if unknown := sorted(chosen - set(possible)):
        raise InputError(f"{file} does not take {', '.join(unknown)!r}; possible: {', '.join(possible) or 'nothing'}")
    return chosen


def one_of(file: str, chosen: set[str], alternatives: tuple[str, ...]) -> str:
    """The one of the alternatives that was chosen; the first where none was."""
    found = [word for word in alternatives if word in chosen]
    if len(found) > 1:
        raise InputError(f"{file} takes one of {', '.join(alternatives)}, got {' and '.join(found)}")
    return (found or alternatives)[0]


def get_config(arguments: str = "") -> ConfigDict:
    """arguments: none are taken here."""
    choose("configs/base.py", arguments, ())
    c = ConfigDict()
    c.seed = 0  # every random number of a run follows from it
    c.resolution = 256  # side of the images, pixels

    c.data = ConfigDict()  # where latents come from
    c.data.source = "photos"  # photos | tfds:NAME | tar files of a webdataset | folder of images or of class folders
    c.data.store = placeholder(str)  # latent store; prepared from the source if missing. None: WORKDIR/latents
    c.data.crop = placeholder(str)  # resize_center_crop | random_crop; None: random_crop for photos, else the former
    c.data.crops = placeholder(int)  # photos only: random crops of each photograph
    c.data.split = placeholder(str)  # tfds only: split, such as train
    c.data.data_dir = placeholder(str)  # tfds only: where prepared data sets lie
    c.data.caption_key = placeholder(str)  # captions: txt (file beside the image) | field of its json | tfds: feature
    c.data.second_caption_key = placeholder(str)  # a second caption of each image, mixed by text.second_caption
    c.data.limit = placeholder(int)  # use at most so many images, drawn at random
    c.data.unfinished = False  # train on what is there of a store that is still being made

    c.autoencoder = ConfigDict()  # the frozen first stage; its decoder is also the perceptual loss's network
    c.autoencoder.source = "bundled"  # bundled | folder in diffusers layout | hub id owner/name
    c.autoencoder.subfolder = placeholder(str)  # the autoencoder's folder inside a pipeline, such as vae
    c.autoencoder.dtype = "float32"  # compute type of encoder and decoder: float32 | bfloat16

    c.text = ConfigDict()  # the frozen text tower of a run on captions (docs/text.md); without a source: class labels
    c.text.source = placeholder(str)  # bundled (knows no language) | CLIP folder or hub id; None: class labels
    c.text.subfolder = placeholder(str)  # the tower's folder inside a pipeline, such as text_encoder
    c.text.tokenizer = placeholder(str)  # tokeniser, where it is not beside the tower
    c.text.tokenizer_subfolder = placeholder(str)  # its folder inside a pipeline, such as tokenizer
    c.text.dtype = "auto"  # compute type of the tower: float32 | bfloat16 | auto (bfloat16 on accelerators)
    c.text.length = 77  # tokens of a prompt, that of the store
    c.text.layer = "last"  # states that the denoiser is given: last (final norm applied) | penultimate
    c.text.pooled = True  # also give it the state of the end token, added to the time embedding
    c.text.padding = "keep"  # behind the end of a prompt: keep the tower's states | replicate the prompt's tokens
    c.text.padding_noise = 0.02  # replicate, training: noise on the tokens, in units of their standard deviation
    c.text.embeddings = "step"  # the tower runs in each step | its outputs are in the store
    c.text.second_caption = 0.0  # probability of the store's second caption column in place of the first

    c.model = ConfigDict()  # the denoiser, an MMDiT
    c.model.preset = "tiny"  # tiny | small | paper796 | xl_two_stream | sd3_faithful | literal1536
    c.model.hidden = placeholder(int)  # width of the streams
    c.model.depth = placeholder(int)  # number of blocks
    c.model.heads = placeholder(int)  # attention heads
    c.model.patch_size = placeholder(int)  # side of a patch, latent pixels
    c.model.mlp_ratio = placeholder(int)  # hidden width of the MLPs, in units of the width
    c.model.num_classes = placeholder(int)  # rows of the class table (one more stands for "no class")
    c.model.control = placeholder(bool)  # condition on original size and crop of each image (store of format 2)
    c.model.context_attn = placeholder(str)  # attention projections of the context stream: own | shared
    c.model.context_mlp = placeholder(str)  # MLP of the context stream: own | shared | none
    c.model.modulation = placeholder(str)  # per_block | single (one Linear for all blocks, adaLN-single)
    c.model.context_modulation_chunks = placeholder(int)  # 6 (own) | 3 (own, without MLP) | 0 (the image stream's)
    c.model.context_pre_only = placeholder(bool)  # the last block's context only feeds the attention
    c.model.base_grid = placeholder(int)  # patches per side at the base resolution: range of the position embedding
    c.model.attention = "auto"  # xla | cudnn (NVIDIA GPUs) | splash (TPUs) | auto (the platform's own, else xla)
    c.model.remat = placeholder(str)  # what the backward pass recomputes: none | full | dots
    c.model.dtype = "auto"  # compute type: float32 | bfloat16 | auto (bfloat16 on accelerators)

    c.paradigm = ConfigDict()  # forward process and what the network predicts
    c.paradigm.name = "eps"  # eps | v (zero terminal SNR) | flow
    c.paradigm.schedule_rescale = 1.0  # image side over that of the schedule: 2.0 for 512 px with the 256 px schedule
    c.paradigm.zero_terminal_snr = placeholder(bool)  # eps, v: rescale the schedule to end in pure noise (v: on)
    c.paradigm.train_steps = placeholder(int)  # eps, v: number of timesteps (1000)
    c.paradigm.beta_start = placeholder(float)  # eps, v: first beta (0.00085)
    c.paradigm.beta_end = placeholder(float)  # eps, v: last beta (0.012)
    c.paradigm.time_sampling = placeholder(str)  # flow: mode | uniform | logit_normal
    c.paradigm.mode_scale = placeholder(float)  # flow, mode: scale of the heavy tails (1.29)
    c.paradigm.logit_mean = placeholder(float)  # flow, logit_normal: mean (0)
    c.paradigm.logit_std = placeholder(float)  # flow, logit_normal: standard deviation (1)

    c.loss = ConfigDict()  # the diffusion loss, and how the perceptual loss enters a step
    c.loss.weighting = "none"  # weight of the diffusion loss over t: none | min_snr
    c.loss.gamma = 5.0  # min_snr: upper bound of the signal-to-noise ratio
    c.loss.label_dropout = 0.1  # probability of training without the class or prompt, for guidance
    c.loss.lpl_capacity = "auto"  # decoded images of a batch: auto (expected + 10 %) | economical | all | a number
    c.loss.lpl_groups = "auto"  # they are drawn from as many equal groups of it: auto (parts on devices) | a number
    c.loss.lpl_chunk = "auto"  # images that a device decodes at a time: auto (as many as fill 512 x 512 px) | a number
    c.loss.stratified_t = False  # spread the timesteps of each group evenly over their distribution: less noise in LPL
    c.loss.calibration_batches = 50  # batches that weights are calibrated on, before the first step
    c.loss.lpl_start = 0  # LPL, or a comparison loss, counts from this step on

    c.lpl = ConfigDict()  # the Latent Perceptual Loss
    c.lpl.preset = "none"  # none (diffusion loss alone) | paper | reference (the public PyTorch example)
    c.lpl.weight = placeholder(float)  # weight of the loss; or calibrate it by target_share
    c.lpl.target_share = placeholder(float)  # calibrate the weight to this share of the total loss (paper: 0.2)
    c.lpl.tau = placeholder(float)  # largest noise level sigma/alpha that takes part, stated for tau_ref_resolution
    c.lpl.tau_ref_resolution = placeholder(int)  # image side that tau is stated for; tau grows linearly with the side
    c.lpl.batch = placeholder(str)  # average over all samples or the active ones: all | active
    c.lpl.extra_weight = placeholder(str)  # weight per sample: none | min_snr (uses loss.gamma)
    c.lpl.post_quant_conv = placeholder(bool)  # latents pass through the decoder's 1x1 convolution
    c.lpl.stats = placeholder(str)  # statistics that normalise features: predicted | clean | separate | none
    c.lpl.norm = placeholder(str)  # channel_std (each channel over space) | channel_vector (each pixel over channels)
    c.lpl.norm_eps = placeholder(float)  # added to the variance, or to the length of the vector
    c.lpl.stats_grad = placeholder(bool)  # gradient flows through the statistics
    c.lpl.mask_on = placeholder(str)  # outliers are looked for in predicted | clean features
    c.lpl.mask_layers = placeholder(str)  # masked taps: deep (up_1, up_2, up_3) | all | none
    c.lpl.mask_zero_input = placeholder(bool)  # zero the masked map before it is measured (channel_vector only)
    c.lpl.kernel_scaling = placeholder(str)  # mask kernels follow the size of the map (auto) or are fixed by tap
    c.lpl.quantile = placeholder(float)  # quantiles of the outlier test (0.02)
    c.lpl.quantile_method = placeholder(str)  # how quantiles are found, to the same values: auto | top_k | counting
    c.lpl.opening = placeholder(int)  # kernel that grows outliers (5)
    c.lpl.closing = placeholder(int)  # kernel that removes specks (3)
    c.lpl.spatial = placeholder(str)  # mean | sum over pixels
    c.lpl.layers = placeholder(str)  # sum | mean over taps
    c.lpl.omega = placeholder(str)  # weight of a tap: inverse (of its upscaling) | uniform | literal
    c.lpl.metric = placeholder(str)  # mse | l1
    c.lpl.taps = placeholder(object)  # maps that are compared: 1 to 5, or rgb (decoded images); None: 5

    c.comparison = ConfigDict()  # the paper's comparison losses, in place of LPL (Tables 5 and 6)
    c.comparison.kind = "none"  # none | latent_lpips | self_perceptual | reweighting (Eq. 15; lpl says of which LPL)
    c.comparison.network = placeholder(str)  # latent_lpips: weights; self_perceptual: run or denoiser, None: the start
    c.comparison.block = placeholder(int)  # self_perceptual: tokens behind this block (paper: 8, 16 or 28)
    c.comparison.tau = placeholder(float)  # largest noise level sigma/alpha that takes part; None: every sample
    c.comparison.tau_ref_resolution = placeholder(int)  # image side that tau is stated for
    c.comparison.weight = placeholder(float)  # factor on the loss; None: calibrated by variance_share
    c.comparison.variance_share = placeholder(float)  # variance of the loss over the diffusion loss's (App. A.4: 0.1)

    c.optimizer = ConfigDict()  # AdamW; parameters and moments are float32
    c.optimizer.learning_rate = 1e-4  # after the warm-up
    c.optimizer.warmup_steps = 1000  # linear warm-up
    c.optimizer.schedule = "constant"  # constant | cosine (to 0 at total_steps)
    c.optimizer.total_steps = placeholder(int)  # cosine only: updates in the whole run
    c.optimizer.b1 = 0.9  # decay of the first moment
    c.optimizer.b2 = 0.95  # decay of the second moment
    c.optimizer.eps = 1e-8  # added to the root of the second moment
    c.optimizer.weight_decay = 0.0  # decoupled, on kernels only
    c.optimizer.clip_norm = 1.0  # largest global norm of the gradient

    c.ema = ConfigDict()  # moving averages of the parameters
    c.ema.decays = (0.9999,)  # one average each, side by side
    c.ema.start = 0  # until this step the averages equal the parameters

    c.mesh = ConfigDict()  # how devices share the work; -1: all that are left
    c.mesh.data = -1  # batch split, parameters copied
    c.mesh.fsdp = 1  # batch and parameters split
    c.mesh.tensor = 1  # attention heads and hidden units split
    c.mesh.decoder = "replicated"  # the first stage: replicated | fsdp (split, and gathered where it is used)

    c.train = ConfigDict()  # length and output of a run
    c.train.batch_size = 256  # images of a step, over all devices
    c.train.accumulate = 1  # parts that a batch is taken in, one after another, to save memory
    c.train.steps = 100_000  # updates in all
    c.train.log_every = 50  # steps between lines of metrics
    c.train.checkpoint_every = 5000  # steps between checkpoints
    c.train.keep = 3  # newest checkpoints that are kept
    c.train.keep_every = placeholder(int)  # keep those of every so many steps for good
    c.train.init_from = placeholder(str)  # run (its folder) or weights (docs/weights.md) that this run starts from
    c.train.init_weights = "params"  # which of them: params, or the name of an average such as 0.9999

    c.sampling = ConfigDict()  # how images are generated
    c.sampling.sampler = placeholder(str)  # ddim (eps, v) | euler | rk4 (flow); None: ddim or euler
    c.sampling.steps = 50  # steps of the sampler
    c.sampling.guidance = 1.5  # classifier-free guidance scale; 1: none
    c.sampling.guidance_resolution = placeholder(int)  # image side it is for; s times that: 1 + s (guidance - 1)
    c.sampling.spacing = "trailing"  # timesteps of ddim: trailing | leading
    c.sampling.per_class = 4  # images of each class in a grid
    c.sampling.weights = placeholder(str)  # params or the name of an average; None: the first average

    c.evaluation = ConfigDict()  # what `lpl eval` measures, and how
    c.evaluation.num_images = 50_000  # images to generate, or to take of a given set
    c.evaluation.batch_size = 64  # images at a time, over all devices; changes no number
    c.evaluation.seed = 0  # of the generated images, of subsets and of the bootstrap
    c.evaluation.features = "inception"  # inception (FID) | classifier (our small network: relative comparisons only)
    c.evaluation.inception = placeholder(str)  # weights file of the FID Inception; None: looked for in the usual places
    c.evaluation.clip = placeholder(str)  # CLIPScore: CLIP folder or hub id, such as openai/clip-vit-large-patch14
    # Text file with a line for each image, in turn (of a run on classes: for each class), or a store with captions.
    c.evaluation.prompts = placeholder(str)  # what a run on text draws (None: captions of its store); CLIPScore's texts
    c.evaluation.reference = placeholder(str)  # folder of images | .npz images or statistics; None: the run's data
    c.evaluation.reference_images = placeholder(int)  # use so many of the reference images, drawn at random; None: all
    c.evaluation.cache = placeholder(str)  # where features are kept; None: in the output folder
    c.evaluation.k = 3  # nearest neighbours of precision and recall, and of density and coverage
    c.evaluation.k_density = placeholder(int)  # nearest neighbours of density and coverage, where they differ
    c.evaluation.splits = 10  # parts of the Inception score
    c.evaluation.resamples = 20  # bootstrap resamples of the distances; 0: no intervals
    c.evaluation.every = placeholder(int)  # `lpl train`: steps between small evaluations during training; None: never
    c.evaluation.every_images = 256  # images of such a small evaluation, with the classifier's features
    return c
