"""Denoisers against diffusers' Stable Diffusion 3: prediction, gradients, folders, and the stock pipeline's loop."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from lpl_jax import denoisers
from lpl_jax.denoisers.diffusers_layout import POSITIONS, to_diffusers, to_tensors
from lpl_jax.diffusion import guided, paradigm, sample
from lpl_jax.io.paths import to_path
from lpl_jax.tools.parity.comparison import FORWARD, GRADIENT, Comparison, Group, Settings, close, equal_by_name
from lpl_jax.tools.parity.torch_side import Model, arrays, nchw, nhwc, randomize

FACTOR = 8  # pixels per latent, to turn --resolution into a size of latents
STEPS, SHIFT, GUIDANCE = 4, 3.0, 2.5
TOKENS = 5
PLACES = ("", "_2", "_3")  # of the pipeline's text towers
# Without a norm after them they add the same to all logits of a query: of their gradient only rounding is left.
KEY_BIASES = ("to_k.bias", "add_k_proj.bias")
TINY: dict[str, Any] = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=40,
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "SD3": dict(num_layers=3),
    "SD3.5 large": dict(num_layers=3, qk_norm="rms_norm"),
    "SD3.5 medium": dict(num_layers=4, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}


def groups(settings: Settings) -> list[Group]:
    """What is compared: the model that was given, else a tiny one of each layout."""
    if settings.denoiser:
        model, params = denoisers.load(settings.denoiser)
        to_diffusers(model.config)  # an InputError for a form that diffusers does not have
        return [Group(settings.denoiser, partial(_given, model.config, params, settings))]
    return [Group(f"{name} (tiny, random)", partial(_tiny, name, settings)) for name in LAYOUTS]


def _tiny(name: str, settings: Settings) -> Iterator[Comparison]:
    table = max(settings.sides(FACTOR)) // 2 + 3  # patches a side; the grid is its middle
    folder = settings.scratch / "denoisers" / name
    theirs = random_torch(LAYOUTS[name] | {"pos_embed_max_size": table}, folder, settings.seed)
    model, params = denoisers.load(folder)
    yield from compare(theirs, model.config, params, settings)


def random_torch(options: dict[str, Any], folder: Path, seed: int = 0) -> Model:
    """diffusers' model of TINY and these options with random weights, which are saved in `folder`."""
    model = randomize(SD3Transformer2DModel(**(TINY | options)), seed)
    model.save_pretrained(folder)
    return model


def _given(config, params, settings: Settings) -> Iterator[Comparison]:
    """A folder that only we read (our own layout) is written for diffusers first."""
    assert settings.denoiser is not None
    folder = to_path(settings.denoiser, "--denoiser")
    if not any(folder.glob("diffusion_pytorch_model*")):
        folder = settings.scratch / "denoisers" / "given"
        denoisers.save(config, params, folder)
    theirs = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    yield from compare(theirs.eval().requires_grad_(False), config, params, settings)


def compare(theirs: Model, config, params: Mapping, settings: Settings) -> Iterator[Comparison]:
    """All rows of one network: diffusers' model and our parameters from the same folder."""
    inputs = example(config, settings.sides(FACTOR), settings.seed)
    prediction, gradient = _gradient(config, params, *inputs)
    theirs.requires_grad_(True)
    expected = torch_prediction(theirs, *inputs)
    (expected**2).mean().backward()
    yield close("prediction", prediction, nhwc(expected), FORWARD)
    # Our gradient under their names; the table of positions is a constant there and is not trained here.
    ours, wanted = to_tensors(config, gradient), {name: p.grad for name, p in theirs.named_parameters()}
    ours.pop(POSITIONS, None)
    if ours.keys() != wanted.keys():
        raise ValueError(f"parameters with gradient on one side only: {sorted(ours.keys() ^ wanted.keys())}")
    names = [name for name in wanted if config.qk_norm or not name.endswith(KEY_BIASES)]
    found, expected = ([side[name] for name in names] for side in (ours, wanted))
    yield close("gradient of the parameters", found, expected, GRADIENT)

    theirs.requires_grad_(False)
    folder = settings.scratch / "denoisers" / "written" / str(len(theirs.state_dict()))
    denoisers.save(config, params, folder)
    again = SD3Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    states = arrays(again.state_dict()), arrays(theirs.state_dict())
    yield equal_by_name("tensors written by us, read by diffusers", *states)
    ours, expected = pipeline_trajectories(again, config, params, inputs)
    yield close("guided trajectory of StableDiffusion3Pipeline on our folder", ours, expected, FORWARD)


def example(config, sides: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Latents of this height and width, times, text tokens and pooled texts, two of each."""
    rng = np.random.default_rng(seed)
    shapes = (2, *sides, config.latent_channels), (2, TOKENS, config.context_dim), (2, config.pooled_dim)
    latents, text, pooled = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return latents, np.array([3.0, 871.25], np.float32), text, pooled


def torch_prediction(theirs: Model, latents, time, text, pooled) -> torch.Tensor:
    """(B, C, H, W), of inputs as `example` gives them."""
    return theirs(nchw(latents), *map(torch.from_numpy, (text, pooled, time))).sample


@partial(jax.jit, static_argnames="config")
def _gradient(config, params, latents, time, text, pooled):
    """Prediction, and the gradient of its mean square with respect to the parameters."""

    def total(params):
        prediction: Any = denoisers.MMDiT(config).apply({"params": params}, latents, time, text, pooled)
        return jnp.mean(prediction**2), prediction

    gradient, prediction = jax.grad(total, has_aux=True)(params)
    return prediction, gradient


def pipeline_trajectories(theirs, config, params, inputs) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The trajectory of our sampler, and that of the stock pipeline around diffusers' model of the same weights."""
    noise, _, text, pooled = inputs
    null_text, null_pooled = (0.1 * np.ones_like(each) for each in (text, pooled))
    absent: Any = dict.fromkeys(("vae", *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in PLACES)))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline: Any = StableDiffusion3Pipeline(transformer=theirs, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    expected = []

    def keep(_pipeline, _step, _time, given):
        expected.append(nhwc(given["latents"]))
        return given

    pipeline(
        latents=nchw(noise),
        prompt_embeds=torch.from_numpy(text),
        pooled_prompt_embeds=torch.from_numpy(pooled),
        negative_prompt_embeds=torch.from_numpy(null_text),
        negative_pooled_prompt_embeds=torch.from_numpy(null_pooled),
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        sigmas=np.linspace(1.0, 1 / STEPS, STEPS),
        height=FACTOR * noise.shape[1],
        width=FACTOR * noise.shape[2],
        output_type="latent",
        callback_on_step_end=keep,
    )
    return list(_trajectory(config, params, noise, (text, pooled), (null_text, null_pooled))), expected


@partial(jax.jit, static_argnames="config")
def _trajectory(config, params, noise, context, null_context):
    flow = paradigm("flow", schedule_rescale=SHIFT)

    def denoise(z, t, context) -> Any:
        return denoisers.MMDiT(config).apply({"params": params}, z, flow.time_input(t), *context)

    step = guided(denoise, GUIDANCE, context=context, null_context=null_context)
    return sample(step, noise, flow, sampler="euler", steps=STEPS, return_trajectory=True)[1]
