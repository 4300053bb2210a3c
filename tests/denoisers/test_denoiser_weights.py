"""Denoisers in files: what is written comes back, stock diffusers samples it, and what does not fit is named."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.numpy import load_file, save_file

from lpl_jax.denoisers import MMDiT, MMDiTConfig, load, preset, save
from lpl_jax.diffusion import guided, paradigm, sample
from lpl_jax.errors import InputError

TEXT = MMDiTConfig(hidden=64, depth=2, heads=4, context_dim=24, pooled_dim=40, base_grid=4)
THEIRS = "diffusion_pytorch_model.safetensors"
OWN = {
    "labels": preset("tiny", depth=2, remat="full"),
    "shared": preset(
        "tiny",
        depth=2,
        context_attn="shared",
        context_mlp="shared",
        modulation="single",
        context_modulation_chunks=0,
        context_pre_only=False,
        dtype="bfloat16",
    ),
    "light": preset(
        "tiny", depth=2, context_attn="shared", context_mlp="none", context_modulation_chunks=3, control=True
    ),
    "dual": replace(TEXT, depth=3, dual_attention=1, position_table=6, qk_norm=False),
}


@pytest.fixture(scope="module")
def text_params(random_params):
    return random_params(TEXT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text_params):
    folder = tmp_path_factory.mktemp("denoiser") / "saved"
    save(TEXT, text_params, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A network in diffusers' layout, for one test to break."""
    return Path(shutil.copytree(saved, tmp_path / "saved"))


def assert_same_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def message(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_stock_pipeline_samples_what_we_export(folder, text_params):
    steps, shift, scale = 4, 3.0, 2.5
    rng = np.random.default_rng(0)
    shapes = ((2, 8, 8, 4), (2, 5, 24), (2, 40), (2, 5, 24), (2, 40))
    noise, text, pooled, null_text, null_pooled = (rng.standard_normal(s).astype(np.float32) for s in shapes)

    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(folder),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        **dict.fromkeys(("text_encoder_3", "tokenizer_3")),
    )
    pipeline.set_progress_bar_config(disable=True)
    want = []

    def keep(pipeline, step, time, given):
        want.append(given["latents"].numpy().transpose(0, 2, 3, 1))
        return given

    pipeline(
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        prompt_embeds=torch.from_numpy(text),
        pooled_prompt_embeds=torch.from_numpy(pooled),
        negative_prompt_embeds=torch.from_numpy(null_text),
        negative_pooled_prompt_embeds=torch.from_numpy(null_pooled),
        guidance_scale=scale,
        num_inference_steps=steps,
        sigmas=np.linspace(1.0, 1 / steps, steps),
        height=64,
        width=64,
        output_type="latent",
        callback_on_step_end=keep,
    )

    flow, model = paradigm("flow", schedule_rescale=shift), MMDiT(TEXT)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
    def trajectory(params, noise, context, null_context):
        def denoise(z, t, context):
            return model.apply({"params": params}, z, flow.time_input(t), *context)

        denoise = guided(denoise, scale, context=context, null_context=null_context)
        return sample(denoise, noise, flow, sampler="euler", steps=steps, return_trajectory=True)[1]

    got = trajectory(text_params, noise, (text, pooled), (null_text, null_pooled))
    assert len(want) == steps
    assert np.abs(want[-1] - noise).max() > 1
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_export_and_import_are_inverse(folder, text_params):
    model, params = load(folder)
    assert model.config == TEXT
    assert_same_trees(params, text_params)


@pytest.mark.parametrize("name", OWN)
def test_own_layout_keeps_every_configuration_exactly(name, tmp_path, random_params):
    config = OWN[name]
    params = random_params(config)
    save(config, params, tmp_path, layout="lpl_jax")
    model, again = load(tmp_path)
    assert model.config == config
    assert_same_trees(again, params)
    # The documented layout: names are paths.
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["time_mlp/fc1/kernel"], params["time_mlp"]["fc1"]["kernel"])
    assert json.loads((tmp_path / "config.json").read_text()) == {"_class_name": "lpl_jax.MMDiT", **asdict(config)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shards_and_low_precision_files_load(dtype, tmp_path, folder):
    theirs = SD3Transformer2DModel.from_pretrained(folder).to(dtype)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    theirs.float().save_pretrained(tmp_path / "whole")
    (_, got), (_, want) = load(tmp_path / "sharded"), load(tmp_path / "whole")
    assert_same_trees(got, want)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}


def test_every_tensor_that_does_not_fit_is_named(folder):
    tensors = load_file(folder / THEIRS)
    del tensors["context_embedder.bias"]
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    tensors["transformer_blocks.0.attn2.to_q.weight"] = np.zeros((64, 64), np.float32)
    tensors["pos_embed.pos_embed"] = np.zeros((1, 16, 64), np.float32)
    tensors["proj_out.bias"] = np.zeros(15, np.float32)
    save_file(tensors, folder / THEIRS)
    text = message(load, folder)
    words = [
        "5 parameters",
        "missing context_embed/bias",
        "missing block_1/attn/q/kernel",
        "surplus transformer_blocks.0.attn2.to_q.weight",
        "surplus pos_embed.pos_embed",
        "proj_out.bias has shape (15,)",
    ]
    assert [word for word in words if word not in text] == []


def test_nothing_is_written_where_something_does_not_fit(tmp_path, text_params):
    target = tmp_path / "new"
    broken = {**text_params, "extra": {"bias": jnp.zeros(3)}, "head": {**text_params["head"], "out": {}}}
    broken["context_embed"] = {**broken["context_embed"], "bias": jnp.zeros(63)}
    for layout in ("diffusers", "lpl_jax"):
        text = message(save, TEXT, broken, target, layout=layout)
        words = [
            "surplus extra/bias",
            "missing head/out/kernel",
            "missing head/out/bias",
            "context_embed/bias",
            "(63,)",
        ]
        assert [word for word in words if word not in text] == []
    assert "diffusers, lpl_jax" in message(save, TEXT, text_params, target, layout="torch")
    assert not target.exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OWN["labels"], ["num_classes = 10", "pooled_dim = 0"]),
        (OWN["shared"], ["context_attn = 'shared'", "modulation = 'single'", "context_pre_only = False"]),
        (replace(TEXT, mlp_ratio=2, control=True), ["mlp_ratio = 2", "control = True"]),
    ],
    ids=["labels", "shared", "text"],
)
def test_a_network_that_diffusers_has_no_class_for_says_why(config, words, tmp_path, random_params):
    text = message(save, config, random_params(config), tmp_path / "new")
    assert [word for word in [*words, "layout 'lpl_jax'"] if word not in text] == []
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_over(folder, text_params):
    before = (folder / THEIRS).read_bytes()
    assert "exists" in message(save, TEXT, text_params, folder)
    assert "exists" in message(save, TEXT, text_params, folder, layout="lpl_jax")
    (folder / "config.json").unlink()
    assert THEIRS in message(save, TEXT, text_params, folder)
    assert (folder / THEIRS).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == [THEIRS]


def truncate(folder):
    (folder / THEIRS).write_bytes((folder / THEIRS).read_bytes()[:-100])


def pickle(folder):
    torch.save({"proj_out.bias": torch.zeros(16)}, folder / "diffusion_pytorch_model.bin")
    (folder / THEIRS).unlink()


def pickle_in_disguise(folder):
    torch.save({"proj_out.bias": torch.zeros(16)}, folder / THEIRS)


def integers(folder):
    save_file({**load_file(folder / THEIRS), "proj_out.bias": np.zeros(16, np.int8)}, folder / THEIRS)


def index(weight_map):
    def write(folder):
        (folder / THEIRS).rename(folder / "shard.safetensors")
        (folder / f"{THEIRS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def config(text=None, **fields):
    def write(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields) if text is None else text)

    return write


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, [THEIRS, "damaged"]),
        (pickle, ["neither", "only safetensors"]),
        (pickle_in_disguise, [THEIRS, "damaged or not a safetensors file"]),
        (integers, ["proj_out.bias (I8)", "F32"]),
        (index({"a": "../shard.safetensors"}), ["'../shard.safetensors'", "beside it"]),
        (index({"a": "one.safetensors", "b": "two.safetensors"}), ["lacks one.safetensors, two.safetensors"]),
        (index({"proj_out.bias": "shard.safetensors", "a": "shard.safetensors"}), ["not where it says: a"]),
        (index(["a"]), ["weight_map"]),
        (config("{"), ["config.json", "JSON"]),
        (config("[]"), ["config.json", "list", "object"]),
        (config(_class_name="FluxTransformer2DModel"), ["FluxTransformer2DModel", "SD3Transformer2DModel"]),
        (config(_class_name="lpl_jax.MMDiT"), ["unknown field attention_head_dim", "missing field hidden"]),
        (config(axes=3), ["axes", "sample_size"]),
        (config(num_layers="2"), ["num_layers", "'2'", "integer"]),
        (config(num_layers=0), ["depth", "0"]),
        (config(out_channels=8), ["out_channels", "8", "in_channels = 4"]),
        (config(caption_projection_dim=32), ["caption_projection_dim", "32", "64"]),
        (config(pooled_projection_dim=0), ["pooled_projection_dim", "positive"]),
        (config(patch_size=0), ["patch_size", "positive"]),
        (config(pos_embed_max_size=0), ["pos_embed_max_size", "positive"]),
        (config(qk_norm="layer_norm"), ["qk_norm", "layer_norm", "rms_norm"]),
        (config(dual_attention_layers=[1]), ["dual_attention_layers", "[1]", "0, 1"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_what_is_possible(damage, words, folder):
    damage(folder)
    text = message(load, folder)
    assert [word for word in words if word not in text] == []


def test_a_missing_folder_is_named_and_a_pipeline_points_to_its_transformer(folder):
    assert "nowhere" in message(load, folder / "nowhere")
    folder.rename(folder.parent / "transformer")
    assert str(folder.parent / "transformer") in message(load, folder.parent)


def test_fields_that_a_file_leaves_out_have_the_defaults_of_diffusers(folder):
    raw = json.loads((folder / "config.json").read_text())
    # As in the files of Stable Diffusion 3.0, which are older than these two fields.
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in ("qk_norm", "dual_attention_layers")})
    )
    text = message(load, folder)
    assert "surplus transformer_blocks.0.attn.norm_q.weight" in text
    assert "missing" not in text
