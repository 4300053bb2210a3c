"""`lpl eval` and `lpl compare` from the command line, on a tiny run and on images of other people."""

import csv
import fcntl
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lpl_jax import autoencoders
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, classifier, inception, inception_weights
from lpl_jax.evaluation.figures import MARGIN, TITLE
from lpl_jax.evaluation.frechet import statistics, write_statistics
from lpl_jax.evaluation.reference import image_count
from lpl_jax.experiment import EvaluationConfig, build, resolve
from lpl_jax.runs import checkpoints
from lpl_jax.tools import compare_cards
from lpl_jax.tools import evaluate as program
from lpl_jax.training import train
from lpl_jax.training.logging import read_metrics

FAST = ["--features", "classifier", "--config.evaluation.num_images=12", "--config.evaluation.resamples=2",
        "--config.sampling.steps=2", "--config.evaluation.batch_size=8"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_classifier():
    """A random network of the classifier's kind: the bundled one takes seconds where nothing is optimised."""
    config = classifier.ClassifierConfig("small", ("a", "b"), side=16, stem=4, widths=(4, 8), blocks=1)
    network = classifier.init(config, jax.random.key(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "load", lambda: network)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, tiny_folder, image_folder, write_run, two_devices):
    """Checkpoints of random parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    config = tiny_config(sampling__steps=2)
    config.data.source = str(image_folder)
    write_run(workdir, resolve(build(config), autoencoders.load(tiny_folder).config), [2, 3])
    return workdir


@pytest.fixture(scope="module")
def evaluated(run, image_folder):
    assert program.main(["--workdir", str(run), "--reference", str(image_folder), *FAST]) == 0
    (folder,) = (run / "evaluation").glob("step3_ema0.5_steps2_guidance1.5_*")
    return folder


def test_an_evaluation_of_a_run_says_all_that_made_it(run, evaluated):
    card = cards.read_card(evaluated)
    assert set(card.metrics) == {
        "cfd", "precision", "recall", "density", "coverage", "spectrum_low", "spectrum_middle", "spectrum_high"
    }  # fmt: skip
    assert all(np.isfinite(metric.value) for metric in card.metrics.values())
    assert set(card.absent) == {"clip_score"}
    made = card.provenance
    assert (made["num_images"], made["resolution"], made["checkpoint.step"], made["checkpoint.weights"]) == (
        12, 32, 3, "0.5"
    )  # fmt: skip
    assert made["checkpoint.fingerprint"] == checkpoints.fingerprint(run / "checkpoints", 3)
    assert (made["sampling.sampler"], made["sampling.steps"], made["sampling.guidance"]) == ("ddim", 2, 1.5)
    for name in ("features.weights", "autoencoder.weights", "reference.images", "reference.statistics"):
        assert re.fullmatch("[0-9a-f]{64}", made[name]), name
    for name in ("rounding", "features.rule", "labels", "reference.crop", "metrics.k"):
        assert made[name]
    assert "--workdir" in card.context["command"]
    for name in ("card.md", "grid.png", "spectrum.png", "spectrum.csv", "spectrum_map.png"):
        assert (evaluated / name).stat().st_size > 0
    samples, picture = np.load(evaluated / cards.SAMPLES), np.asarray(Image.open(evaluated / "grid.png"))
    assert samples.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(picture[TITLE + MARGIN :][:32, MARGIN:][:, :32], samples[0])


def test_the_same_call_again_computes_no_features(run, evaluated, image_folder, monkeypatch):
    before = (evaluated / "card.json").read_text()
    monkeypatch.setattr("lpl_jax.evaluation.extract._Part.add", None)
    program.main(["--workdir", str(run), "--reference", str(image_folder), *FAST])
    again = cards.read_card(evaluated)
    assert again.metrics == {name: cards.Metric(**m) for name, m in json.loads(before)["metrics"].items()}


def test_a_sweep_evaluates_all_combinations(run, image_folder, tmp_path, capsys):
    arguments = ["--workdir", str(run), "--reference", str(image_folder), *FAST, "--out", str(tmp_path)]
    program.main([*arguments, "--checkpoint", "2,3", "--weights", "all"])  # all averages
    (path,) = tmp_path.glob("sweep_*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["checkpoint"], row["weights"]) for row in rows] == [
        ("2", "0.5"), ("2", "0.9"), ("3", "0.5"), ("3", "0.9")
    ]  # fmt: skip
    assert len({row["cfd"] for row in rows}) == 4
    assert path.with_suffix(".png").is_file()
    assert capsys.readouterr().out.count("cfd") == 4


def test_a_sweep_into_a_folder_in_which_another_job_writes_is_refused_before_it_evaluates(run, image_folder, tmp_path):
    arguments = ["--workdir", str(run), "--reference", str(image_folder), *FAST, "--out", str(tmp_path)]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"{tmp_path} is in use by another process"):
            program.main([*arguments, "--weights", "all"])
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("card*"))


def test_as_many_images_as_references(run, image_folder, tmp_path):
    """And a card that says which references precision and recall took."""
    arguments = ["--workdir", str(run), *FAST, "--config.evaluation.num_images=auto", "--out", str(tmp_path)]
    with pytest.raises(InputError, match=r"num_images=auto takes as many .* give evaluation.reference"):
        program.main(arguments)
    given = ["--reference", str(image_folder), "--config.evaluation.prdc_references=8"]
    program.main([*arguments, *given])
    (folder,) = tmp_path.glob("step3_*")
    made = cards.read_card(folder).provenance
    assert (made["num_images"], made["reference.num_images"]) == (16, 16)
    assert made["metrics.prdc_references"] == "8 of 16, drawn with seed 0"
    uncounted = tmp_path / "adm.npz"
    np.savez(uncounted, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match="does not say of how many images"):
        image_count(EvaluationConfig(num_images="auto", reference=str(uncounted)), 32)


def test_images_of_other_people(evaluated, image_folder, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    np.savez(tmp_path / "theirs.npz", images)
    for source, out in ((folder, "a"), (tmp_path / "theirs.npz", "b")):
        arguments = ["--images", str(source), "--reference", str(image_folder), "--out", str(tmp_path / out)]
        program.main([*arguments, *FAST])
    a, b = (cards.read_card(tmp_path / out) for out in "ab")
    assert a.metrics == b.metrics
    assert a.provenance["images.fingerprint"] != b.provenance["images.fingerprint"]
    capsys.readouterr()
    compare_cards.main([str(evaluated), str(tmp_path / "a"), "--out", str(tmp_path / "both")])
    shown = capsys.readouterr().out
    assert "Not comparable" not in shown  # the same reference, network and number
    assert "| checkpoint.step | 3 | - |" in shown
    assert (tmp_path / "both" / "spectrum_map.png").is_file()


def test_other_settings_have_a_card_of_their_own(run, evaluated, image_folder, tmp_path, capsys):
    program.main(["--workdir", str(run), "--reference", str(image_folder), *FAST, "--config.evaluation.k=2"])
    assert len(list((run / "evaluation").glob("step3_*"))) == 2
    folders = list(map(str, (run / "evaluation").iterdir()))  # features/ is among them
    capsys.readouterr()
    assert compare_cards.main(folders) == 0
    shown = capsys.readouterr()
    assert "metrics.k (!)" in shown.out and "left out, no result cards: " in shown.err
    images = ["--images", str(image_folder), "--reference", str(image_folder), "--out", str(tmp_path)]
    program.main([*images, *FAST])
    with pytest.raises(InputError, match="holds the card of another evaluation"):
        program.main([*images, *FAST, "--config.evaluation.num_images=10"])


def test_images_are_brought_to_a_size(image_folder, tmp_path):
    images = ["--images", str(image_folder), "--reference", str(image_folder), "--out", str(tmp_path)]
    program.main([*images, *FAST, "--resolution", "32"])
    card = cards.read_card(tmp_path)
    assert (
        card.provenance["resolution"] == 32 and card.provenance["images.resized"] == "shorter side to 32, centre crop"
    )


def test_a_set_against_itself(image_folder, tmp_path):
    program.main(["--images", str(image_folder), "--reference", str(image_folder), "--out", str(tmp_path), *FAST,
                  "--config.evaluation.num_images=16"])  # fmt: skip
    metrics = cards.read_card(tmp_path).metrics
    assert metrics["cfd"].value == pytest.approx(0, abs=1e-4)
    assert metrics["precision"].value == metrics["recall"].value == metrics["coverage"].value == 1


@pytest.mark.slow
def test_small_evaluations_during_training(tiny_config, image_folder, tmp_path):
    config = tiny_config(train__steps=3, train__checkpoint_every=2, sampling__steps=2)
    config.data.source = str(image_folder)
    config.evaluation.every, config.evaluation.every_images = 2, 8
    train(build(config), tmp_path)
    (line,) = [line for line in read_metrics(tmp_path) if "evaluation/cfd" in line]
    assert line["step"] == 2
    assert {"evaluation/precision", "evaluation/spectrum_high"} <= set(line)
    assert (tmp_path / "evaluation" / "training" / "step0000002.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "one of --workdir RUN .* and --images"),
        (["--workdir", "{run}", "--images", "x"], "one of --workdir RUN"),
        (["--workdir", "{run}", "--checkpoint", "7"], "no checkpoint of step 7.*2, 3"),
        (["--workdir", "{run}", "--weights", "0.7"], "weights '0.7'.*params, 0.5, 0.9"),
        (["--workdir", "{run}", "--guidance", "much"], "--guidance much: must be a number"),
        (["--workdir", "{run}", "--steps", "2,5000"], "steps must be an integer between 1 and 1000, got 5000"),
        (["--workdir", "{run}", "--steps", "1.5"], "--steps 1.5: must be a whole number"),
        (["--workdir", "{run}", "--guidance", "1,-1"], r"--guidance -1: must be in \[0, 1000\]"),
        (["--workdir", "{run}", "--resolution", "64"], "--resolution and --statistics are for --images"),
        (["--workdir", "{run}", "--config.evaluation.k=0"], "evaluation.k=0"),
        (["--workdir", "{run}", "--config.evaluation.kk=0"], "config.evaluation has no field 'kk'"),
        (["--workdir", "{run}", "--config.paradigm.name=flow"], "paradigm.name is 'eps', given 'flow'|paradigm"),
        (["--workdir", "{tmp}"], "no such file; is .* the folder of a run"),
        (["--images", "{tmp}", "--out", "{tmp}/o"], "nothing to compare with: give --reference"),
        (["--images", "{images}", "--reference", "{images}"], "give --out"),
        (["--images", "{tmp}/none", "--reference", "{images}", "--out", "{tmp}/o"], "does not exist"),
        (["--images", "{images}", "--reference", "{tmp}/none.npz", "--out", "{tmp}/o"], "no such file"),
        (["--images", "{images}", "--reference", "{stats}", "--out", "{tmp}/o"], "statistics of Inception features"),
        (["--images", "{images}", "--reference", "{images}", "--out", "o", "--steps", "3"], "--steps is for runs"),
        (["compare", "{tmp}"], "two or more"),
        (["compare", "{tmp}", "{tmp}/none"], "none: no such evaluation"),
        (["compare", "{tmp}", "{run}"], "two or more"),
        (["compare", "{tmp}/a", "{tmp}/b"], "a: no such evaluation"),
    ],
)  # fmt: skip
def test_mistakes_are_named(run, image_folder, tmp_path, arguments, message):
    stats = tmp_path / "stats.npz"
    write_statistics(stats, statistics(np.random.default_rng(0).standard_normal((9, 4))))
    places = dict(run=run, images=image_folder, tmp=tmp_path / "empty", stats=stats)
    (tmp_path / "empty").mkdir()
    given = [argument.format(**places) for argument in arguments]
    with pytest.raises(InputError, match=message):
        if given[:1] == ["compare"]:
            compare_cards.main(given[1:])
        program.main([*given, "--features", "classifier"])
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_fid_of_images_and_of_statistics(image_folder, tmp_path):
    """With random weights in the published layout: a set against itself, by its images and by its statistics."""
    weights = tmp_path / "inception.safetensors"
    inception_weights.save(inception.init(jax.random.key(0)), weights)
    options = [f"--config.evaluation.inception={weights}", "--config.evaluation.splits=2", *FAST[2:]]
    stats = tmp_path / "stats.npz"
    assert program.main(["--images", str(image_folder), "--statistics", str(stats), *options]) == 0
    options += ["--images", str(image_folder), "--config.evaluation.num_images=16"]
    program.main([*options, "--reference", str(image_folder), "--out", str(tmp_path / "images")])
    program.main([*options, "--reference", str(stats), "--out", str(tmp_path / "statistics")])
    whole, short = (cards.read_card(tmp_path / name) for name in ("images", "statistics"))
    scale = np.trace(np.load(stats)["sigma"])
    for card in (whole, short):
        assert card.metrics["fid"].value == pytest.approx(0, abs=1e-6 * scale)
        assert 1 <= card.metrics["inception_score"].value < 1008
    assert {"sfid", "precision", "spectrum_high"} <= set(whole.metrics)
    assert set(short.metrics) == {"fid", "sfid", "inception_score"}
    assert whole.provenance["reference.statistics"] == short.provenance["reference.statistics"]
    assert short.provenance["reference.num_images"] == 16


def test_inception_without_its_weights_says_where_they_are(run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="github.com/.*features.*classifier"):
        program.main(["--workdir", str(run), "--reference", str(image_folder)])


@pytest.mark.parametrize(
    "folders, names",
    [
        (["/r/a/evaluation/x", "/r/b/evaluation/x"], ["a", "b"]),
        (["/r/a/evaluation/x", "/r/a/evaluation/y"], ["x", "y"]),
        (["/r/a/x", "/r/b/y"], ["a", "b"]),
        (["/r/a/x", "/r/a/y", "/r/b/x"], ["a/x", "a/y", "b/x"]),
        (["/r/a", "/r/a/x"], ["a", "x"]),
        (["/r/a/x", "/s/x", "/r/b/x"], ["r/a", "s", "r/b"]),
    ],
)
def test_cards_are_named_by_what_differs(folders, names):
    assert compare_cards.short_names([Path(folder) for folder in folders]) == names
