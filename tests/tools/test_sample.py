"""`lpl sample`: pictures of runs on text and on classes, reproducible, with what made them; and what is refused."""

import fcntl
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from lpl_jax import autoencoders, text
from lpl_jax.errors import InputError
from lpl_jax.evaluation.figures import captioned_rows
from lpl_jax.evaluation.image_sets import open_images
from lpl_jax.experiment import build, resolve
from lpl_jax.tools import sample


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config, tiny_folder, write_run, two_devices):
    """Folders of a run on text and of one on classes, with random parameters."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    autoencoder = autoencoders.load(tiny_folder).config
    for name in ("text", "classes"):
        config = tiny_config(sampling__steps=2)
        if name == "text":
            config.model.num_classes = None
            config.text.source, config.text.length = "bundled", 6
        experiment = resolve(build(config), autoencoder, text.bundled.CONFIG if name == "text" else None)
        (root / name).mkdir()
        write_run(root / name, experiment, [1, 3])
        found[name] = root / name
    return found


def call(out, *arguments):
    assert sample.main([*map(str, arguments), "--out", str(out)]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(out.glob("[0-9]*.png"))]


def test_prompts_become_pictures_that_say_what_they_are(runs, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("A red bird!\nsnow\n")
    arguments = ["--workdir", runs["text"], "--prompts", file, "--count", 2, "--seed", 5]
    images = call(tmp_path / "a", *arguments)
    assert f"written to {tmp_path / 'a'}" in capsys.readouterr().out
    assert len(images) == 4 and images[0].shape == (32, 32, 3)
    names = sorted(path.name for path in (tmp_path / "a").glob("[0-9]*.png"))
    assert names == ["0000_a-red-bird.png", "0001_a-red-bird.png", "0002_snow.png", "0003_snow.png"]
    about = Image.open(tmp_path / "a" / names[2]).text
    assert about["Description"] == "snow"
    made = json.loads(about["lpl_jax"])
    assert (made["number"], made["seed"], made["checkpoint"], made["weights"], made["guidance"]) == (
        2,
        5,
        3,
        "0.5",
        1.5,
    )
    assert len(open_images(tmp_path / "a", resolution=None)) == 4  # without the grid
    with pytest.raises(InputError, match="holds other samples: give another --out"):
        sample.main([*map(str, arguments), "--steps", "3", "--out", str(tmp_path / "a")])
    listed = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert listed["shows"] == ["A red bird!"] * 2 + ["snow"] * 2
    # The same image alone or with others, another one of another prompt or checkpoint.
    alone = ["--workdir", runs["text"], "--count", 1, "--seed", 5, "--prompt"]
    np.testing.assert_allclose(call(tmp_path / "b", *alone, "A red bird!")[0].astype(int), images[0], atol=1)
    for number, changes in enumerate((["a long road"], ["A red bird!", "--checkpoint", 1])):
        (changed,) = call(tmp_path / f"c{number}", *alone, *changes)
        assert np.abs(changed.astype(int) - images[0]).max() > 1, changes


def test_classes_become_pictures(runs, tmp_path):
    """By number or by name; they are named by the run's store, and by what the run has kept where that is gone."""
    arguments = ["--workdir", runs["classes"], "--label", 1, "--label", "ant", "--count", 1, "--steps", 3]
    images = call(tmp_path / "named", *arguments)
    assert sorted(path.name for path in (tmp_path / "named").glob("[0-9]*.png")) == ["0000_bee.png", "0001_ant.png"]
    assert not np.array_equal(*images)
    kept = runs["classes"] / "classes.json"
    kept.write_text('["0", "wren"]')
    try:
        again = call(tmp_path / "kept", *[{"ant": 0}.get(argument, argument) for argument in arguments])
        assert sorted(path.name for path in (tmp_path / "kept").glob("[0-9]*.png")) == [
            "0000_wren.png",
            "0001_class-0.png",
        ]
        with pytest.raises(InputError, match=r"label 'wrem' is no class of .*did you mean wren.*names 0, wren"):
            sample.main(["--workdir", str(runs["classes"]), "--label", "wrem"])
    finally:
        kept.unlink()
    np.testing.assert_array_equal(images, again)


def test_several_runs_side_by_side(runs, tmp_path):
    """From the same noise: a row of each, and each alone as it would have been."""
    other = tmp_path / "other"
    shutil.copytree(runs["classes"], other)
    shutil.rmtree(other / "checkpoints" / "3")
    out = tmp_path / "out"
    arguments = ["--label", 1, "--label", 0, "--count", 2]
    call(out, "--workdir", runs["classes"], other, *arguments)
    both = [call(tmp_path / run.name, "--workdir", run, *arguments) for run in (runs["classes"], other)]
    first, second = (np.stack([np.asarray(Image.open(path)) for path in sorted((out / name).glob("[0-9]*.png"))])
                     for name in ("classes", "other"))  # fmt: skip
    np.testing.assert_array_equal(first, both[0])
    np.testing.assert_array_equal(second, both[1])
    rows = np.concatenate([first[:2], second[:2], first[2:], second[2:]])
    titles = ["classes: bee", "other: bee", "classes: ant", "other: ant"]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "grid.png")), captioned_rows(rows, titles, 2))
    for given, message in (
        (["--workdir", runs["classes"], "--workdir", other], "give --out"),
        (["--workdir", other, other, "--out", out], "is given twice"),
        (["--workdir", other, runs["text"], "--out", tmp_path / "none"], "is a run on text"),
    ):
        with pytest.raises(InputError, match=message):
            sample.main([*map(str, given), "--label", "1"])
    assert not (tmp_path / "none").exists()


def test_a_folder_for_several_runs_in_which_another_job_writes_is_left_alone(runs, tmp_path):
    other = shutil.copytree(runs["classes"], tmp_path.parent / f"{tmp_path.name}-other")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"{tmp_path} is in use by another process"):
            sample.main(["--workdir", str(runs["classes"]), str(other), "--label", "1", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "run, arguments, message",
    [
        ("text", [], "nothing to draw: give --prompt"),
        ("text", ["--label", "1"], "is a run on text"),
        ("classes", ["--prompt", "snow"], "is a run on classes: give --label N, 0 to 1, or the name of a class"),
        ("classes", ["--label", "be"], r"label 'be' is no class .*did you mean bee.*names ant, bee"),
        ("classes", ["--label", "7"], "labels must be 0 to 1"),
        (
            "classes",
            ["--label", "1", "--sampler", "euler"],
            "sampling.sampler='euler' with paradigm 'eps'; possible: ddim",
        ),
        ("classes", ["--label", "1", "--count", "0"], "--count 0: must be 1 to 10,000"),
        ("classes", ["--label", "1", "--weights", "0.7"], "0.7"),
        ("text", ["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_drawn(runs, tmp_path, run, arguments, message):
    with pytest.raises(InputError, match=message):
        sample.main(["--workdir", str(runs[run]), *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_rows_under_their_captions():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    picture = np.asarray(captioned_rows(images, ["a very long caption " * 5, "“short” ✨"], 2, least=120))
    assert picture.shape[1] == 120 and picture.min() == 0
    assert picture.shape[0] > np.asarray(captioned_rows(images, ["a", "b"], 2, least=120)).shape[0]


def test_file_names_of_prompts():
    assert sample.slug("A Cat, (on) a  mat!") == "a-cat-on-a-mat"
    assert sample.slug("../../etc") == "etc" and sample.slug("?!") == "image"
    assert len(sample.slug("word " * 50)) <= 40
