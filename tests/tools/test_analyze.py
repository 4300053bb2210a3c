"""The three analyses from the command line, at a tiny size."""

import csv

import chex
import pytest
from PIL import Image

from lpl_jax.autoencoders import load
from lpl_jax.errors import InputError
from lpl_jax.experiment import build, resolve
from lpl_jax.tools import analyze, cli
from lpl_jax.tools.analyze import main, parser, read_images


@pytest.fixture(scope="module")
def argv(tiny_folder, image_folder):
    """function(command, out, *options) -> arguments."""

    def make(command, out, *options):
        return [command, "--images", str(image_folder), "--autoencoder", str(tiny_folder), "--out", str(out), *options]

    return make


def test_the_autoencoder_of_a_run(tmp_path, tiny_config, tiny_folder, write_run):
    ours = load(tiny_folder)
    write_run(tmp_path, resolve(build(tiny_config()), ours.config), [])

    def chosen(*options):
        return analyze.autoencoder_of(parser().parse_args(["interp", "--images", "photos", "--out", "x", *options]))

    chex.assert_trees_all_equal(chosen("--workdir", str(tmp_path)).params, ours.params)
    assert chosen().config == load("bundled").config
    with pytest.raises(InputError, match="give one of --workdir .* and --autoencoder"):
        chosen("--workdir", str(tmp_path), "--autoencoder", "bundled")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_interp(argv, tmp_path, capsys):
    options = ["--methods", "pixel-bilinear,latent-nearest", "--factors", "1,2", "--count", "3", "--batch-size", "2"]
    assert main(argv("interp", tmp_path, *options)) == 0
    out, err = capsys.readouterr()
    assert (
        err == ""
        and out.count("\n") == 1
        and out.startswith("3 images, 4 resamplings: latent MSE orders pairs of them ")
    )
    rows = read(tmp_path / "interp.csv")
    assert [(row["method"], row["factor"], row["reduced_to"], row["images"]) for row in rows] == [
        ("pixel-bilinear", "1.0", "64x64", "3"),
        ("pixel-bilinear", "2.0", "32x32", "3"),
        ("latent-nearest", "1.0", "8x8", "3"),
        ("latent-nearest", "2.0", "4x4", "3"),
    ]
    for row in rows:
        numbers = [float(row[name]) for name in ("latent_mse", "psnr_db", "perceptual_distance", "detail")]
        if row["factor"] == "1.0":
            assert numbers == [0, float("inf"), 0, 1]
        else:
            assert min(numbers) > 0 and numbers[1] < 100
    for name in ("interp.png", "interp_images.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200


def test_irregularity(argv, tmp_path, capsys):
    options = [
        "--count",
        "2",
        "--draws",
        "1",
        "--stride",
        "3",
        "--batch-size",
        "4",
        "--noise",
        "fixed_norm",
        "--no-images",
    ]
    assert main(argv("irregularity", tmp_path, *options)) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("2 images, 9 positions, 1 draws, fixed_norm: error ")
    rows = read(tmp_path / "irregularity.csv")
    places = [(int(row["row"]), int(row["column"])) for row in rows]
    assert places == 2 * [(row, column) for row in (0, 3, 6) for column in (0, 3, 6)]
    assert len({row["image"] for row in rows}) == 2
    assert all(float(row["total_error"]) > float(row["outside_error"]) > 0 for row in rows)
    assert (tmp_path / "irregularity.png").stat().st_size > 1000


def test_outliers(argv, tmp_path, capsys):
    options = [
        "--count",
        "3",
        "--batch-size",
        "2",
        "--taps",
        "mid,up_2",
        "--channels",
        "5",
        "--top",
        "1",
        "--show",
        "2",
    ]
    assert main(argv("outliers", tmp_path, *options)) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()] == ["mid", "up_2"]
    taps, channels = read(tmp_path / "outliers_taps.csv"), read(tmp_path / "outliers_channels.csv")
    shapes = [(row["tap"], row["height"], row["width"], row["channels"], row["images"]) for row in taps]
    assert shapes == [("mid", "8", "8", "16", "3"), ("up_2", "64", "64", "8", "3")]
    assert [row["masked_in_the_loss"] for row in taps] == ["False", "True"]
    assert [(row["tap"], int(row["channel"])) for row in channels] == (
        [("mid", channel) for channel in range(16)] + [("up_2", channel) for channel in range(8)]
    )
    largest = max(float(row["max_median_ratio"]) for row in channels if row["tap"] == "up_2")
    assert float(taps[1]["ratio_largest"]) == largest > 1
    heights = {}
    for name in ("mid", "up_2"):
        with Image.open(tmp_path / f"outliers_{name}.png") as image:
            heights[name] = image.height
    assert heights["up_2"] > 500, "two channels below each other"


def test_photos_are_drawn_by_the_seed():
    names, images = read_images("photos", 16, 9, 0)
    assert images.shape == (9, 16, 16, 3) and len(set(names)) == 9
    assert (read_images("photos", 16, 9, 1)[1] != images).any()


def test_a_folder_gives_as_many_as_asked_for(image_folder):
    names, images = read_images(str(image_folder), 32, 5, 0)
    assert images.shape == (5, 32, 32, 3) and len(set(names)) == 5
    assert read_images(str(image_folder), 32, 5, 1)[0] != names
    assert len(read_images(str(image_folder), None, 99, 0)[0]) == 16


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("interp", ["--methods", "latent-cubic"], "method 'latent-cubic' is not one of"),
        ("interp", ["--factors", "0.5"], "--factors 0.5: must be numbers of 1 or more"),
        ("interp", ["--factors", "two"], "--factors 'two': needed: numbers"),
        ("interp", ["--count", "0"], "--count 0: must be 1 to 10,000"),
        ("interp", ["--images", "nowhere"], "image set nowhere does not exist"),
        ("interp", ["--autoencoder", "nowhere"], "no autoencoder at 'nowhere'"),
        ("interp", ["--resolution", "30"], "needs a multiple of 8 pixels"),
        ("irregularity", ["--patch", "9"], "patch=9: must be 1 to 8"),
        ("irregularity", ["--noise", "white"], "--noise white is not possible; possible: "),
        ("irregularity", ["--draws", "0"], "--draws 0: must be 1 to 10,000"),
        ("outliers", ["--taps", "up_9"], "tap 'up_9'"),
        ("outliers", ["--channels", "99"], "--channels 99: up_2 has channels 0 to 7"),
        ("outliers", ["--preset", "other"], "--preset other is not possible; possible: paper, reference"),
        ("outliers", ["--show", "8"], "--show 8: must be less than --count 8"),
        ("outliers", ["--top", "0"], "--top 0: must be at least 0, and at least 1"),
    ],
)
def test_a_mistake_is_one_line(argv, tmp_path, capsys, command, options, message):
    with pytest.raises(SystemExit) as end:
        cli.run_main(main, argv(command, tmp_path / "out", *options))
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not list((tmp_path / "out").glob("*")), "nothing is left behind"
