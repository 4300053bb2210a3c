"""Denoisers in files: what is written comes back, stock diffusers samples it, and what does not fit is named."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lpl_jax.denoisers import MMDiTConfig, load, preset, save, weights
from lpl_jax.denoisers.weights import load_params
from lpl_jax.errors import InputError
from lpl_jax.tools.parity import denoisers as parity

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


def message(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_stock_pipeline_samples_what_we_export(folder, text_params):
    theirs, inputs = SD3Transformer2DModel.from_pretrained(folder), parity.example(TEXT, (8, 8))
    got, want = parity.pipeline_trajectories(theirs, TEXT, text_params, inputs)
    assert len(want) == parity.STEPS
    assert np.abs(want[-1] - inputs[0]).max() > 1
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("form", ["diffusers", "lpl_jax", "file"])
def test_export_and_import_are_inverse(form, tmp_path, text_params):
    place = tmp_path / ("one.safetensors" if form == "file" else "folder")
    about = {"step": 7}
    layout = save(TEXT, text_params, place, layout=None if form == "file" else form, about=about)
    assert layout == ("lpl_jax" if form == "file" else form)
    model, params = load(place)
    assert model.config == TEXT
    chex.assert_trees_all_equal(params, text_params)
    chex.assert_trees_all_equal(load_params(replace(TEXT, dtype="bfloat16", remat="full"), place), text_params)
    # Links are as good as what they point to.
    link = tmp_path / ("link.safetensors" if form == "file" else "link")
    link.symlink_to(place)
    chex.assert_trees_all_equal(load(link)[1], text_params)


def test_one_file_is_the_folder_in_one(tmp_path, random_params):
    params = random_params(OWN["light"])
    save(OWN["light"], params, tmp_path / "one.safetensors", about={"step": 7})
    save(OWN["light"], params, tmp_path / "folder", layout="lpl_jax", about={"step": 7})
    with safe_open(tmp_path / "one.safetensors", "np") as file:
        assert file.metadata()["lpl_jax.MMDiT"] == (tmp_path / "folder/config.json").read_text()
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "folder/model.safetensors")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", OWN)
def test_own_layout_keeps_every_configuration_exactly(name, tmp_path, random_params):
    config = OWN[name]
    params = random_params(config)
    save(config, params, tmp_path, layout="lpl_jax")
    model, again = load(tmp_path)
    assert model.config == config
    chex.assert_trees_all_equal(again, params)
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
    chex.assert_trees_all_equal(got, want)
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
    text = message(save, TEXT, text_params, tmp_path / "one.safetensors", layout="diffusers")
    assert "one.safetensors" in text and "give a folder" in text
    huge = replace(TEXT, hidden=2**16)
    assert "hidden = 65536" in message(save, huge, text_params, target)
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.inf), text_params["head"])
    text = message(save, TEXT, {**text_params, "head": broken}, target)
    assert "undefined values in head/modulation/bias, head/modulation/kernel, head/out/bias, head/out/kernel" in text
    assert list(tmp_path.iterdir()) == []


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
    (folder / "config.json").unlink()
    (folder.parent / "dangling.safetensors").symlink_to("nowhere")
    for place in (folder, folder / THEIRS, folder.parent / "dangling.safetensors"):
        for layout in (None, "lpl_jax"):
            assert f"{place} exists" in message(save, TEXT, text_params, place, layout=layout)
    assert (folder / THEIRS).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == [THEIRS]
    (folder.parent / "empty").mkdir()
    save(TEXT, text_params, folder.parent / "empty")
    chex.assert_trees_all_equal(load(folder.parent / "empty")[1], text_params)


def truncate(folder):
    (folder / THEIRS).write_bytes((folder / THEIRS).read_bytes()[:-100])


def pickle(folder):
    torch.save({"proj_out.bias": torch.zeros(16)}, folder / "diffusion_pytorch_model.bin")
    (folder / THEIRS).unlink()


def pickle_in_disguise(folder):
    torch.save({"proj_out.bias": torch.zeros(16)}, folder / THEIRS)


def overlapping(folder):
    """Two names for the same bytes."""
    content = (folder / THEIRS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["again"] = header["proj_out.bias"]
    text = json.dumps(header).encode()
    (folder / THEIRS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def infinite(folder):
    save_file({**load_file(folder / THEIRS), "proj_out.bias": np.full(16, np.nan, np.float32)}, folder / THEIRS)


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
        (pickle, ["missing", "do not fit"]),
        (pickle_in_disguise, ["missing", "do not fit"]),
        (integers, ["proj_out.bias (I8)", "F32"]),
        (index({"a": "../shard.safetensors"}), ["'../shard.safetensors'", "beside it"]),
        (index({"a": "one.safetensors", "b": "two.safetensors"}), ["lacks one.safetensors, two.safetensors"]),
        (index({"proj_out.bias": "shard.safetensors", "a": "shard.safetensors"}), ["not where it says: a"]),
        (index(["a"]), ["weight_map"]),
        (overlapping, [THEIRS, "damaged", "offset"]),
        (infinite, [THEIRS, "undefined values in proj_out.bias"]),
        (config("{"), ["config.json", "JSON"]),
        (config(num_layers=10**9), ["config.json", "model.depth=1000000000", "1 to 1,000"]),
        (
            config(num_attention_heads=4096, caption_projection_dim=16 * 4096),
            ["hidden = 65536", "out of all proportion"],
        ),
        (config(pos_embed_max_size=10**30), ["config.json", "model.position_table=1000", "0 to 4,096"]),
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


def own(**fields):
    """Metadata of a single file: the fields of a config, some changed."""
    fields = {"_class_name": "lpl_jax.MMDiT", **asdict(OWN["labels"]), **fields}
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no config (lpl_jax.MMDiT)", "give the folder"]),
        ("{", ["metadata lpl_jax.MMDiT", "JSON"]),
        ("[" * 10**5, ["metadata lpl_jax.MMDiT", "more than 64 deep"]),
        ("[3]", ["metadata lpl_jax.MMDiT", "list", "object"]),
        (own(widths=64), ["unknown field widths", "hidden"]),
        (own(hidden=..., depth=...), ["missing field hidden; missing field depth"]),
        (own(hidden="64"), ["metadata lpl_jax.MMDiT", "hidden='64'", "whole number (1 to "]),
        (own(hidden=64.0), ["hidden=64.0", "whole number (1 to "]),
        (own(heads=True), ["heads=True", "whole number (1 to "]),
        (own(depth=[2]), ["depth=[2]", "whole number (1 to "]),
        (own(remat={"full": 1}), ["remat={'full': 1}", "one of"]),
        (own(hidden=2**16), ["hidden = 65536", "out of all proportion"]),
        (own(hidden=4 * 10**4000), ["metadata lpl_jax.MMDiT", "a number of 4,001 digits"]),
        (own(depth=10**9), ["depth=1000000000", "1 to 1,000"]),
        (own(num_classes=10**12), ["num_classes=1000000000000", "0 to 1,000,000"]),
        (own(hidden=128), ["blocks/attn/k/bias has shape (1, 64), the config needs (1, 128)", "; and 63 more"]),
        (own(num_classes=9), ["1 parameters", "label_embed/embedding has shape (11, 64)", "(10, 64)"]),
    ],
)
def test_a_file_with_another_config_is_refused(text, words, tmp_path, random_params, monkeypatch):
    tensors = {path: np.asarray(leaf) for path, leaf in flatten_dict(random_params(OWN["labels"]), sep="/").items()}
    save_file(tensors, tmp_path / "one.safetensors", None if text is None else {"lpl_jax.MMDiT": text})
    init = weights.init
    monkeypatch.setattr(weights, "init", lambda config, key: init(config, key) if config.hidden < 10**4 else 1 / 0)
    given = message(load, tmp_path / "one.safetensors")
    assert [word for word in words if word not in given] == []


def test_names_of_tensors_that_are_no_paths_are_surplus(tmp_path):
    names = ["head", "head/out", "head/out/kernel", "", "/", "../config.json"]
    tensors = {name: np.zeros(1, np.float32) for name in names}
    save_file(tensors, tmp_path / "one.safetensors", {"lpl_jax.MMDiT": own()})
    text = message(load, tmp_path / "one.safetensors")
    words = [
        "surplus head;",
        "surplus head/out;",
        "head/out/kernel has shape (1,)",
        "surplus /;",
        "surplus ../config.json",
    ]
    assert [word for word in words if word not in text] == []


def test_a_file_that_is_not_there_or_no_safetensors_file(tmp_path):
    assert "none.safetensors" in message(load, tmp_path / "none.safetensors")
    for name in ("one.bin", "one.pth"):
        torch.save({"a": torch.zeros(3)}, tmp_path / name)
        assert "no config (lpl_jax.MMDiT) in its metadata, nor a config.json beside it" in message(
            load, tmp_path / name
        )


def test_weights_of_another_network_are_listed(folder, text_params):
    """Heads, patches and positions show in no shape, and still make another network."""
    plain = replace(TEXT, qk_norm=False)
    flat = flatten_dict(text_params, sep="/")
    params = unflatten_dict({path: leaf for path, leaf in flat.items() if "_norm/" not in path}, sep="/")
    save(plain, params, folder.parent / "plain")
    other = replace(plain, heads=2, base_grid=8, latent_channels=16, patch_size=1)
    text = message(load_params, other, folder.parent / "plain")
    words = [
        "heads = 4 there, 2 in",
        "base_grid = 4 there, 8",
        "patch_size = 2 there, 1",
        "latent_channels = 4 there, 16",
    ]
    assert [word for word in words if word not in text] == []
    assert "shape" not in text
    text = message(load_params, TEXT, folder.parent / "plain")
    assert "missing blocks/attn/q_norm/scale" in text and text.endswith("; and 3 more")


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(InputError, match="pickles are not written; give a folder, or a name that ends in .safetensors"):
        save(preset("tiny"), {}, tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())
