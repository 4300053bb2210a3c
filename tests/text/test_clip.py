"""CLIP's towers against transformers' on the same weights, folders in and out, and what is refused."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lpl_jax import text
from lpl_jax.errors import InputError
from lpl_jax.text import ClipConfig
from lpl_jax.text.config import CLASSES
from lpl_jax.tools.parity import text as parity
from lpl_jax.tools.parity.comparison import FORWARD, close
from lpl_jax.tools.parity.torch_side import nchw, randomize

# Row 1 has two end tokens behind each other, row 2 has a number above 2 only at its end, and all rows differ in length.
TOKENS = np.array(
    [
        [97, 5, 7, 9, 98, 98, 98, 98, 98, 98, 98, 98],
        [97, 98, 98, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [97, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 98],
        [97, 96, 2, 98, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)


def pixels(side=24, seed=0):
    return np.random.default_rng(seed).normal(size=(2, side, side, 3)).astype(np.float32)


def assert_equal(ours, theirs, projection=None):
    """Features of ours and an output of theirs, to the error of float32 sums through a few layers."""
    assert (ours.projected is None) == (projection is None)
    rows = list(parity.feature_rows("tower", ours, theirs, projection))
    assert all(row.ok for row in rows), rows


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A CLIPModel of transformers, ours, and the folder between them."""
    folder = tmp_path_factory.mktemp("clip")
    return parity.random_torch("CLIPModel", folder), text.load(folder), folder


@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 98), ("gelu", 2)])
def test_text_tower_equals_transformers(tmp_path, activation, eos):
    changes = {"hidden_act": activation, "eos_token_id": eos}
    model = parity.random_torch("CLIPTextModelWithProjection", tmp_path, **changes)
    ours = parity.encode_text(text.load(tmp_path), TOKENS)
    theirs = model.text_model(torch.from_numpy(TOKENS), output_hidden_states=True)
    assert_equal(ours, theirs, model.text_projection)


def test_legacy_eos_pools_at_the_highest_number(tmp_path):
    """The two rules differ where a number above the configured end token comes first."""
    tokens = np.array([[97, 98, 50, 2, 0, 0]], np.int32)
    parity.random_torch("CLIPTextModel", tmp_path, eos_token_id=50)
    by_number = text.load(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"eos_token_id": 2}))
    legacy = text.load(tmp_path)
    ours = parity.encode_text(by_number, tokens)
    np.testing.assert_allclose(ours.pooled[0], ours.last[0, 2], rtol=1e-6)
    np.testing.assert_allclose(parity.encode_text(legacy, tokens).pooled[0], ours.last[0, 1], rtol=1e-6)


def test_text_tower_is_causal(pair):
    clip = pair[1]
    changed = TOKENS.copy()
    changed[:, 7:] = 42
    before, after = parity.encode_text(clip, TOKENS).last, parity.encode_text(clip, changed).last
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(1, 2)).min() > 0.01


def test_vision_tower_equals_transformers(tmp_path):  # quick_gelu: see the similarities
    model = parity.random_torch("CLIPVisionModelWithProjection", tmp_path, hidden_act="gelu")
    ours = parity.encode_images(text.load(tmp_path), pixels())
    theirs = model.vision_model(nchw(pixels()), output_hidden_states=True)
    assert_equal(ours, theirs, model.visual_projection)


def test_similarities_equal_transformers(pair):
    model, clip, _ = pair
    theirs = model(torch.from_numpy(TOKENS), nchw(pixels())).logits_per_image
    assert close("similarities", parity.similarities(clip, pixels(), TOKENS), theirs, FORWARD).ok


def test_bfloat16_stays_near_float32(pair):
    _, clip, folder = pair
    half = text.load(folder, dtype=jnp.bfloat16)
    assert half.params["text"]["layer_0"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    for mine, reference in (
        (parity.encode_text(half, TOKENS), parity.encode_text(clip, TOKENS)),
        (parity.encode_images(half, pixels()), parity.encode_images(clip, pixels())),
    ):
        assert mine.projected.dtype == jnp.float32
        # 8 bits of mantissa: 2**-9 for each rounding, a few dozen of them in a row
        error = jnp.abs(mine.projected - reference.projected).max() / jnp.abs(reference.projected).max()
        assert 1e-5 < error < 0.05


@pytest.mark.parametrize("kind", CLASSES)
def test_saved_folder_is_read_by_transformers_and_by_us_exactly(kind, tmp_path):
    model = parity.random_torch(kind, tmp_path / "theirs")
    ours = text.load(tmp_path / "theirs")
    assert (ours.config.text is not None, ours.config.vision is not None) == ("Vision" not in kind, "Text" not in kind)
    text.save(ours, tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    chex.assert_trees_all_equal(text.load(tmp_path / "ours").params, ours.params)
    with pytest.raises(InputError, match="exists"):
        text.save(ours, tmp_path / "ours")


def test_one_tower_of_a_whole_model(pair):
    _, clip, folder = pair
    for tower, other in (("text", "vision"), ("vision", "text")):
        half = text.load(folder, tower=tower)
        chex.assert_trees_all_equal(half.params, {tower: clip.params[tower]})
        assert getattr(half.config, tower) == getattr(clip.config, tower)
        assert getattr(half.config, other) is None
    with pytest.raises(InputError, match="no vision tower"):
        text.load(folder, tower="text").encode_images(pixels())


def test_older_files_are_read(pair, tmp_path):
    """Before transformers 5: a prefix in single towers, constant position_ids; before 4.27: sections given twice."""
    _, clip, folder = pair
    tensors = load_file(folder / "model.safetensors")
    for side, count in (("text", 12), ("vision", 10)):
        tensors[f"{side}_model.embeddings.position_ids"] = np.arange(count)[None]
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config_dict"] = settings["text_config"]
    settings["text_config"] = settings["text_config"] | {"hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(text.load(tmp_path).params, clip.params)


def test_shards_and_single_files(pair, tmp_path):
    model, clip, folder = pair
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    chex.assert_trees_all_equal(text.load(tmp_path).params, clip.params)

    file = folder / "model.safetensors"
    chex.assert_trees_all_equal(text.load(file).params, clip.params)
    alone = tmp_path / "alone.d"
    alone.mkdir()
    (alone / "weights.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no config.json.*config="):
        text.load(alone / "weights.safetensors")
    loaded = text.load(alone / "weights.safetensors", config=clip.config)
    chex.assert_trees_all_equal(loaded.params, clip.params)

    lost = sorted(tmp_path.glob("model-0*"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"lacks {lost.name}, which model.safetensors.index.json names"):
        text.load(tmp_path)


def test_everything_that_does_not_fit_is_named_at_once(pair, tmp_path):
    folder = pair[2]
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_model.encoder.layers.1.mlp.fc1.bias"], tensors["logit_scale"]
    tensors["vision_model.embeddings.class_embedding"] = np.zeros(5, np.float32)
    tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((7, 16), np.float32)
    tensors["something.else"] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="5 parameters") as caught:
        text.load(tmp_path)
    for part in (
        "missing text/layer_1/mlp/fc1/bias",
        "missing logit_scale",
        "vision_model.embeddings.class_embedding has shape (5,)",
        "text_model.embeddings.token_embedding.weight has shape (7, 16)",
        "surplus something.else",
    ):
        assert part in str(caught.value)


def test_what_cannot_be_loaded_is_refused(pair, tmp_path):
    folder = pair[2]
    with pytest.raises(InputError, match="nothing at .*nowhere"):
        text.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no tower 'images'; it has: text, vision"):
        text.load(folder, tower="images")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(InputError, match="BertModel; possible: CLIPModel"):
        text.load(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no weights, such as"):
        text.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        text.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(InputError, match="names '../elsewhere.safetensors'; possible: files of weights beside it"):
        text.load(tmp_path)
    settings["text_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="'relu': possible: quick_gelu, gelu"):
        text.load(tmp_path)


def test_inputs_and_configurations_are_checked(pair):
    clip = pair[1]
    with pytest.raises(InputError, match=r"\(1, 13\).*up to 12"):
        clip.encode_text(np.zeros((1, 13), np.int32))
    with pytest.raises(InputError, match=r"\(1, 16, 24, 3\).*24, 24, 3"):
        clip.encode_images(np.zeros((1, 16, 24, 3), np.float32))
    with pytest.raises(InputError, match="a text tower, a vision tower or both"):
        ClipConfig()
    with pytest.raises(InputError, match="width=16: not divisible by heads=3"):
        text.TextConfig(16, 2, 3, 32)
    with pytest.raises(InputError, match="image_size=20.*patch_size=8"):
        text.VisionConfig(16, 2, 2, 32, image_size=20, patch_size=8)


def test_random_model_of_the_tiny_configuration():
    def features(key):
        clip = text.init(ClipConfig.tiny(), key)
        return clip.encode_text(TOKENS).projected, clip.encode_images(pixels(16)).projected

    of_texts, of_images = jax.jit(features)(jax.random.key(0))
    assert (of_texts.shape, of_images.shape) == ((4, 12), (2, 12))
    assert np.std(of_texts, axis=0).min() > 0 and np.isfinite(of_images).all()


@pytest.mark.slow
def test_vit_large_14_equals_transformers(tmp_path):
    """Both towers of ViT-L/14 at their real widths and depths: 428 million random weights."""
    sizes = dict(intermediate_size=4096, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    text_sizes = dict(intermediate_size=3072, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    config = transformers.CLIPConfig(
        text_config=text_sizes | {"projection_dim": 768},
        vision_config=sizes | {"patch_size": 14, "image_size": 224, "projection_dim": 768},
        projection_dim=768,
    )
    model = randomize(transformers.CLIPModel(config), seed=0)
    model.save_pretrained(tmp_path)
    clip = text.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 49406, (2, 77)).astype(np.int32)
    tokens[:, 0], tokens[0, 20:], tokens[1, 76] = 49406, 49407, 49407
    images = pixels(224)
    theirs = model.text_model(torch.from_numpy(tokens), output_hidden_states=True)
    assert_equal(parity.encode_text(clip, tokens), theirs, model.text_projection)
    theirs = model.vision_model(nchw(images), output_hidden_states=True)
    assert_equal(parity.encode_images(clip, images), theirs, model.visual_projection)
