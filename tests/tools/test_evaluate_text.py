"""`lpl eval` on a run that was trained on captions: images of the prompts, each scored against its own."""

import json

import jax
import numpy as np
import pytest

from lpl_jax import autoencoders, text
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, classifier
from lpl_jax.evaluation.clip_score import ClipFeatures, clip_scores, text_features
from lpl_jax.experiment import build, resolve
from lpl_jax.runs import open_run
from lpl_jax.text.tokenizer import vocabulary_of
from lpl_jax.tools import evaluate as program

PROMPTS = ["a red bird", "two dogs", "snow"]
LENGTH = 12


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of both towers, with a vocabulary of single bytes."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    units = vocabulary_of([])
    shared = dict(layers=1, projection_dim=8)
    config = text.ClipConfig(
        text=text.TextConfig(
            16, heads=2, mlp_width=32, vocab_size=len(units), positions=LENGTH, eos_token_id=len(units) - 1, **shared
        ),
        vision=text.VisionConfig(24, heads=3, mlp_width=48, image_size=16, patch_size=8, **shared),
    )
    text.save(text.init(config, jax.random.key(0)), folder)
    (folder / "vocab.json").write_text(json.dumps(units))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, tiny_folder, clip_folder, write_run):
    config = tiny_config(sampling__steps=2, model__num_classes=None)
    config.text.source, config.text.length = str(clip_folder), LENGTH
    experiment = resolve(build(config), autoencoders.load(tiny_folder).config, text.load(clip_folder).config.text)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    write_run(workdir, experiment, [2])
    return workdir


@pytest.mark.slow
def test_images_are_drawn_for_prompts_and_scored_against_them(
    run, clip_folder, image_folder, tiny_folder, tmp_path, monkeypatch
):
    small = classifier.ClassifierConfig("small", ("a", "b"), side=16, stem=4, widths=(4, 8), blocks=1)
    network = classifier.init(small, jax.random.key(0))
    monkeypatch.setattr(classifier, "load", lambda: network)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    arguments = ["--workdir", str(run), "--reference", str(image_folder), "--features", "classifier"]
    arguments += [f"--config.evaluation.{name}={value}" for name, value in (("num_images", 8), ("resamples", 2))]
    arguments += [f"--config.evaluation.clip={clip_folder}", f"--config.evaluation.prompts={file}"]
    assert program.main([*arguments, "--config.evaluation.batch_size=8", "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").glob("step2_*")
    card = cards.read_card(folder)
    assert (card.provenance["prompts.count"], card.provenance["text"]) == (3, str(clip_folder))

    images = open_run(run).sampler(steps=2, guidance=1.5)((PROMPTS * 3)[:8])
    clip = text.load(clip_folder)
    embedded = np.asarray(ClipFeatures(clip).features(images)["clip"])
    prompts = text_features(clip, text.Tokenizer.load(clip_folder), (PROMPTS * 3)[:8])
    expected = clip_scores(images=embedded, texts=prompts)
    assert card.metrics["clip_score"].value == pytest.approx(expected.mean(), abs=0.05)
    assert np.ptp(expected) > 0.1  # prompts differ in their scores

    with pytest.raises(InputError, match="text.layer is 'last', given 'penultimate'"):
        program.main([*arguments, "--config.text.layer=penultimate", "--out", str(tmp_path / "other")])
