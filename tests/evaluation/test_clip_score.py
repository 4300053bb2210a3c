"""CLIPScore: the formula, and the way from 8-bit images and prompts to scores against transformers."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lpl_jax import text
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, classifier
from lpl_jax.evaluation.clip_score import ClipFeatures, clip_scores, text_features
from lpl_jax.text.tokenizer import BOS, EOS, WORD_END, vocabulary_of
from lpl_jax.tools import evaluate as program

PROMPTS = ["a photo of a cat", "Noise, in three COLOURS", "", "word " * 30, "naïve café 😀"]
CLASSIFIER = classifier.ClassifierConfig("small", ("a", "b"), side=16, stem=4, widths=(4, 8), blocks=1)
MERGES = [("a", "t" + WORD_END), ("c", "at" + WORD_END), ("p", "h"), ("ph", "o"), ("o", "f" + WORD_END)]


def photo(height, width, seed):
    """Blocks of colour and noise, so that resizing and clipping matter."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST)).astype(int)
    return np.clip(image + rng.integers(-40, 40, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers writes it: random weights in CLIPModel's layout, and a byte-pair vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    units = vocabulary_of(MERGES)
    (folder / "vocab.json").write_text(json.dumps(units))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]) + "\n", encoding="utf-8")
    layers = dict(num_hidden_layers=2, projection_dim=8)
    sizes = dict(vocab_size=len(units), bos_token_id=len(units) - 2, eos_token_id=len(units) - 1, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, max_position_embeddings=20)
        | sizes
        | layers,
        vision_config=dict(hidden_size=24, intermediate_size=48, num_attention_heads=3, image_size=32, patch_size=8)
        | layers,
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # the published initial values make all images nearly alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "embedding" in name else parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def ours(published):
    return text.load(published[1]), text.Tokenizer.load(published[1])


def reference_scores(published, images, prompts):
    """transformers end to end: its image processor, its tokeniser, its model."""
    model, folder = published
    side = model.config.vision_config.image_size
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=20, truncation=True, return_tensors="pt"
    )
    pixels = torch.from_numpy(processor([Image.fromarray(image) for image in images], return_tensors="np").pixel_values)
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    return 100 * cosines.clamp(min=0).numpy(), cosines.numpy()


def test_from_pixels_and_prompts_to_scores_equal_transformers(published, ours):
    clip, tokenizer = ours
    images = np.stack([photo(50, 70, seed) for seed in range(len(PROMPTS))])
    reference, cosines = reference_scores(published, images, PROMPTS)
    assert cosines.min() < 0 < cosines.max() and len(set(np.round(reference, 2))) > 2  # both sides of the cut
    features = ClipFeatures(clip).features(images)
    assert list(features) == ["clip"] and features["clip"].shape == (5, 8) and features["clip"].dtype == np.float32
    scores = clip_scores(images=features["clip"], texts=text_features(clip, tokenizer, PROMPTS))
    assert scores.shape == (5,)
    np.testing.assert_allclose(scores, reference, atol=1e-4)


def test_the_two_steps_are_the_features(ours):
    """`embed` is pure and can be jitted and sharded by others; images of several sizes are prepared alike."""
    network = ClipFeatures(ours[0])
    images = [photo(40, 40, 0), photo(33, 64, 1)]
    pixels = network.prepare(images)
    assert pixels.shape == (2, 32, 32, 3)
    embedded = jax.jit(lambda network, pixels: network.embed(pixels))(network, pixels)["clip"]
    for row, image in zip(embedded, images, strict=True):
        np.testing.assert_allclose(row, network.features(image[None])["clip"][0], rtol=1e-4, atol=1e-5)
    assert np.abs(embedded[0] - embedded[1]).max() > 0.1


def test_batches_do_not_change_embeddings_of_texts(ours):
    whole = text_features(*ours, PROMPTS)
    assert whole.shape == (5, 8) and whole.dtype == np.float32
    np.testing.assert_allclose(text_features(*ours, PROMPTS, batch_size=2), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(text_features(*ours, PROMPTS[3:4])[0], whole[3], rtol=1e-5, atol=1e-6)


def test_known_angles():
    images = np.array([[3, 0], [1, 1], [0, 2], [-1, 0], [1e-30, 1e-30], [1e30, 0]], np.float32)
    texts = np.array([[5, 0], [7, 0], [1, 0], [1, 0], [1, 0], [1e-25, 0]], np.float32)
    half = 100 / np.sqrt(2)
    np.testing.assert_allclose(clip_scores(images=images, texts=texts), [100, half, 0, 0, half, 100], rtol=1e-12)
    random = np.random.default_rng(0).normal(size=(200, 512))
    assert clip_scores(images=random, texts=3 * random).max() <= 100
    np.testing.assert_allclose(clip_scores(images=random, texts=3 * random), 100, rtol=1e-12)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_embeddings_without_direction_are_refused(kind, value):
    good, bad = np.ones((4, 3)), np.ones((4, 3))
    bad[2:] = value
    images, texts = (bad, good) if kind == "image" else (good, bad)
    with pytest.raises(InputError, match=f"2 of 4 {kind} embeddings are zero or not finite, the first is 2"):
        clip_scores(images=images, texts=texts)


def test_what_cannot_be_used_is_refused(published, ours):
    clip, tokenizer = ours
    with pytest.raises(InputError, match=r"\(4, 3\) and \(5, 3\)"):
        clip_scores(images=np.ones((4, 3)), texts=np.ones((5, 3)))
    with pytest.raises(InputError, match=r"\(0, 3\)"):
        clip_scores(images=np.ones((0, 3)), texts=np.ones((0, 3)))
    with pytest.raises(InputError, match="float32; needed: .*uint8"):
        ClipFeatures(clip).features(np.zeros((1, 32, 32, 3), np.float32))
    for prompts in ([], "a photo"):
        with pytest.raises(InputError, match="needed: a list of at least one text"):
            text_features(clip, tokenizer, prompts)
    with pytest.raises(InputError, match="vision tower with projection"):
        ClipFeatures(text.load(published[1], tower="text")).features(photo(32, 32, 0)[None])
    with pytest.raises(InputError, match="text tower with projection"):
        text_features(text.load(published[1], tower="vision"), tokenizer, PROMPTS)


def test_a_tokeniser_of_another_model_is_refused(ours):
    clip, tokenizer = ours
    vocabulary = dict(tokenizer.vocabulary)
    vocabulary[BOS], vocabulary[EOS] = vocabulary[EOS], vocabulary[BOS]  # the model would look for the start token
    with pytest.raises(InputError, match="end token 517, model with 519 numbers and end token 518"):
        text_features(clip, text.Tokenizer(vocabulary, MERGES), PROMPTS)
    vocabulary = tokenizer.vocabulary | {"more": 519}
    with pytest.raises(InputError, match="numbers up to 519"):
        text_features(clip, text.Tokenizer(vocabulary, MERGES), PROMPTS)


def test_eval_py_gives_the_mean_over_images_and_their_prompts(published, tmp_path, monkeypatch):
    """A set of images with a prompt for each, through the command; a wrong number of prompts is refused."""
    monkeypatch.setattr(classifier, "load", lambda: classifier.init(CLASSIFIER, jax.random.key(0)))
    folder, file = tmp_path / "images", tmp_path / "prompts.txt"
    folder.mkdir()
    images = [photo(48, 48, seed) for seed in range(8)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    prompts = [prompt or "nothing" for prompt in (PROMPTS * 2)[:8]]
    file.write_text("\n".join(prompts), encoding="utf-8")
    arguments = ["--images", str(folder), "--reference", str(folder), "--features", "classifier"]
    arguments += [f"--config.evaluation.clip={published[1]}", f"--config.evaluation.prompts={file}"]
    program.main([*arguments, "--out", str(tmp_path / "out"), "--config.evaluation.resamples=2"])
    card = cards.read_card(tmp_path / "out")
    expected, _ = reference_scores(published, images, prompts)
    assert card.metrics["clip_score"].value == pytest.approx(np.mean(expected), abs=1e-3)
    assert len(card.provenance["clip.weights"]) == len(card.provenance["prompts.hash"]) == 64
    file.write_text("one prompt")
    with pytest.raises(InputError, match="has 1 lines for 8 images"):
        program.main([*arguments, "--out", str(tmp_path / "other")])
