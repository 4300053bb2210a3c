"""The parity tool: every part in a small form, the report, what counts as a failure, and mistakes of the user."""

import json
import sys

import numpy as np
import pytest

from lpl_jax.errors import InputError
from lpl_jax.tools import cli
from lpl_jax.tools.parity import autoencoders, denoisers, loss, samplers, text, twins
from lpl_jax.tools.parity import program as tool
from lpl_jax.tools.parity.comparison import Settings, close, equal, equal_by_name
from lpl_jax.tools.parity.features import CHANNELS, SIZES, feature_pair


@pytest.fixture
def run(tmp_path, capsys):
    """argv -> exit status, rows by what was compared."""

    def call(*argv):
        status = tool.main([*argv, "--out", str(tmp_path / "out"), "--resolution", "32"])
        report = json.loads((tmp_path / "out" / "parity.json").read_text())
        return status, {row["what"]: row for row in report["rows"]}

    return call


def verdicts(rows):
    return {row["verdict"] for row in rows.values()}


def only(monkeypatch, module, name, *keys):
    """Leaves these entries of a module's table."""
    table = getattr(module, name)
    monkeypatch.setattr(module, name, {key: table[key] for key in keys})


def test_samplers_and_both_files_of_the_report(run, tmp_path, capsys):
    status, rows = run("samplers", "--seed", "7")
    assert status == 0
    for name in (
        *samplers.DDIM,
        *(f"flow, Euler, shift {k}" for k in (1, 2, 3)),
        *(f"flow, RK4, shift {k}" for k in (1, 2)),
    ):
        row = rows[f"{name}: trajectory of 50 steps"]
        assert row["part"] == "samplers" and row["verdict"] == "ok" and row["values"] == 50 * 128
        assert 0 < row["mean_error"] <= row["max_error"] <= row["tolerance"] == 1e-5

    printed, saved = capsys.readouterr().out, (tmp_path / "out" / "parity.md").read_text()
    assert saved.strip() in printed and "[1/10] samplers: DDIM, eps, trailing: 2 ok" in printed
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    for what in (report["command"], report["date"], "seed 7", report["result"], report["device"]):
        assert what in saved
    assert report["command"].startswith("lpl parity samplers --seed 7")
    for package in ("lpl_jax", "python", "jax", "flax", "numpy", "torch", "diffusers", "transformers", "torchdiffeq"):
        assert f"{package} {report['versions'][package]}" in saved
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in saved.splitlines() if line[:1] == "|"][
        2:
    ]
    assert len(table) == len(rows)
    for cells, row in zip(table, rows.values(), strict=True):
        assert cells[:2] == [row["part"], row["what"]] and cells[5] == row["verdict"]
        if not row["exact"]:
            np.testing.assert_allclose(list(map(float, cells[2:4])), [row["max_error"], row["mean_error"]], rtol=0.06)


def test_text(run):
    status, rows = run("text")
    assert status == 0 and verdicts(rows) == {"ok"}
    for tower in ("text", "vision"):
        for what in ("last hidden state", "last hidden state but one", "pooled", "embedding"):
            assert rows[f"CLIP (tiny, random): {tower}, {what}"]["max_error"] < 1e-4
    for what in ("tokeniser: token numbers of 500 random texts, length 77", "image preprocessing: pixels at 224 x 224"):
        assert rows[what]["values"] > 10000
    assert rows["CLIP (tiny, random): tensors written by us, read by transformers"]["max_error"] == 0


@pytest.mark.slow
def test_loss(run, monkeypatch):
    only(monkeypatch, twins, "REFERENCE_OPTIONS", "paper_settings")
    only(monkeypatch, twins, "PAPER_OPTIONS", "preset")
    monkeypatch.setattr(loss, "TINY", ("TAESD", "KL of three levels"))
    status, rows = run("loss")
    assert status == 0 and verdicts(rows) == {"ok"}
    for preset, option in (("reference", "paper settings"), ("paper", "preset")):
        assert rows[f"preset {preset}: outlier masks of up_1, up_2, up_3"]["tolerance"] == 0
        assert rows[f"preset {preset}: {option}, value"]["tolerance"] == 1e-4
        assert rows[f"preset {preset}: {option}, gradient"]["tolerance"] == 1e-3
        for family in loss.TINY:
            assert f"end to end, {family} (tiny, random): preset {preset}, gradient of the latents" in rows


def test_loss_that_is_wrong_fails(run, monkeypatch):
    only(monkeypatch, twins, "REFERENCE_OPTIONS", "mid_only")
    monkeypatch.setattr(loss, "groups", lambda settings, groups=loss.groups: groups(settings)[:1])
    monkeypatch.setitem(twins.REFERENCE_OPTIONS, "mid_only", (dict(norm_type="default"), dict(taps=1)))
    mask = loss.outlier_mask
    monkeypatch.setattr(loss, "outlier_mask", lambda *args, **options: mask(*args, **options).at[0, 0, 0, 0].set(False))
    status, rows = run("loss")
    assert status == 1 and verdicts(rows) == {"FAIL"} and len(rows) == 3
    assert 1 <= rows["preset reference: outlier masks of up_1, up_2, up_3"]["max_error"] <= 3


FORWARD_ROWS = ("encoder mean", "decoded image", "encoder mean in bfloat16", "taps in bfloat16")


def test_autoencoders(run, monkeypatch):
    only(monkeypatch, autoencoders, "FAMILIES", "TAESD")
    status, rows = run("autoencoders")
    assert status == 0 and verdicts(rows) == {"ok"}
    for what in (*FORWARD_ROWS, *(f"tap level_{level}" for level in range(4))):
        assert rows[f"TAESD (tiny, random): {what}"]["tolerance"] == (0.05 if "bfloat16" in what else 1e-4)
    assert rows["TAESD (tiny, random): gradient of the taps"]["tolerance"] == 1e-3
    assert rows["TAESD (tiny, random): tensors written by us, read by diffusers"]["tolerance"] == 0


def test_weights_that_differ_fail(run, monkeypatch):
    load = text.text.load

    def wrong(*args, **options):
        clip = load(*args, **options)
        mlp = clip.params["text"]["layer_1"]["mlp"]["fc1"]
        mlp["kernel"] = mlp["kernel"].at[0, 0].add(1.0)
        clip.params["vision"]["projection"]["kernel"] *= np.nan
        return clip

    monkeypatch.setattr(text.text, "load", wrong)
    monkeypatch.setattr(text, "groups", lambda settings, groups=text.groups: groups(settings)[:1])
    status, rows = run("text")
    assert status == 1
    rows = {what.removeprefix("CLIP (tiny, random): "): row for what, row in rows.items()}
    for what in ("text, last hidden state", "text, pooled", "text, embedding"):
        assert rows[what]["verdict"] == "FAIL" and rows[what]["max_error"] > 1e-3
    assert rows["vision, embedding"]["verdict"] == "FAIL" and rows["vision, embedding"]["max_error"] is None
    assert rows["vision, pooled"]["verdict"] == rows["text, last hidden state but one"]["verdict"] == "ok"
    assert rows["tensors written by us, read by transformers"]["max_error"] == 1 + 24 * 8


def test_taesd_files_with_norms_in_the_middle(run, tmp_path):
    """The published layout of a form that diffusers has no class for."""
    kind, options = autoencoders.FAMILIES["TAESD"]
    model = kind(**options | {"scaling_factor": 1.0})
    for layers, numbers in ((model.encoder.layers, (8,)), (model.decoder.layers, (2, 3))):
        for number in numbers:
            block = layers[number]
            layers[number] = autoencoders.NormedBlock(block, block.conv[0].in_channels)
    autoencoders.randomize(model, 0)
    folder = tmp_path / "weights"
    folder.mkdir()
    autoencoders.save_taesd_pair(model, folder, "x")
    status, rows = run("autoencoders", "--autoencoder", str(folder))
    assert status == 0 and verdicts(rows) == {"ok"}
    assert rows[f"{folder}: tensors written by us, read by diffusers"]["values"] == sum(
        tensor.numel() for tensor in model.state_dict().values()
    )


@pytest.mark.slow
def test_denoisers(run, monkeypatch):
    monkeypatch.setattr(denoisers, "LAYOUTS", {"X": dict(num_layers=2, qk_norm="rms_norm", dual_attention_layers=(0,))})
    status, rows = run("denoisers")
    assert status == 0 and verdicts(rows) == {"ok"}
    expected = ("prediction", "gradient of the parameters", "tensors written by us, read by diffusers",
        "guided trajectory of StableDiffusion3Pipeline on our folder")  # fmt: skip
    assert list(rows) == [f"X (tiny, random): {what}" for what in expected]
    assert rows["X (tiny, random): gradient of the parameters"]["values"] > 60000


@pytest.mark.slow
def test_everything_and_the_bundled_weights(tmp_path):
    assert tool.main([]) == 0
    assert tool.main(["--autoencoder", "bundled", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"autoencoders", "loss"}


def test_a_group_that_crashes_is_a_row_and_hides_no_other(run, monkeypatch):
    def odeint(*_args, **_options):
        raise RuntimeError("no | solver\nhere")

    monkeypatch.setattr(samplers.torchdiffeq, "odeint", odeint)
    monkeypatch.setattr(samplers, "groups", lambda settings, groups=samplers.groups: groups(settings)[-3:])
    status, rows = run("samplers")
    crashed = [what for what, row in rows.items() if row["verdict"] == "FAIL"]
    assert status == 1 and crashed == ["flow, RK4, shift 1: crashed", "flow, RK4, shift 2: crashed"]
    assert rows[crashed[0]]["note"] == "RuntimeError: no | solver here" and rows[crashed[0]]["max_error"] is None
    assert list(rows)[-1].startswith("schedules: ")


def test_how_errors_are_measured():
    row = close("x", [np.array([1.0, 2.0]), np.array([100.0])], [np.array([1.0, 4.0]), np.array([101.0])], 0.5)
    assert (row.max_error, row.values, row.ok) == (0.5, 3, True)
    assert row.mean_error == pytest.approx((0 + 0.5 + 1 / 101) / 3)
    assert not close("x", np.ones(2), np.array([1.0, np.nan]), 1e9).ok
    assert not close("x", np.array([np.inf, 1.0]), np.array([np.inf, 1.0]), 1e9).ok
    assert not close("x", np.full(2, 1e-3), np.zeros(2), 1e-4).ok and close("x", np.zeros(2), np.zeros(2), 1e-4).ok
    with pytest.raises(ValueError, match=r"x: shape \(2,\) here, \(3,\) in PyTorch"):
        close("x", np.ones(2), np.ones(3), 1.0)
    assert equal("x", np.arange(4), np.arange(4)).ok
    assert equal("x", np.arange(4), np.array([0, 1, 3, 3]))[1:5] == (1, 0.25, 0, 4)
    assert equal("x", np.arange(3), np.arange(4)).max_error == 4
    assert not equal("x", [], []).ok  # nothing compared shows nothing
    row = equal_by_name("x", {"a": np.ones(3), "b": np.ones(2)}, {"a": np.ones(3), "c": np.ones(5)})
    assert row.max_error == 1 + 5 and not row.ok


def test_which_parts_run():
    nothing = dict.fromkeys(tool.PATHS)
    assert tool.choose_parts([], nothing) == list(tool.PARTS)
    assert tool.choose_parts(["text", "loss"], nothing) == ["loss", "text"]
    assert tool.choose_parts([], nothing | {"autoencoder": "a"}) == ["autoencoders", "loss"]
    assert tool.choose_parts([], nothing | {"denoiser": "a", "text": "b"}) == ["denoisers", "text"]
    assert tool.choose_parts(["loss"], nothing | {"autoencoder": "a"}) == ["loss"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sampler"], "there is no part 'sampler' (did you mean samplers?)"),
        (["samplers", "--text", "x"], "--text belongs to text; given with samplers"),
        (["--autoencoder", "./nowhere"], "no autoencoder at './nowhere'"),
        (["--denoiser", "./nowhere"], "not a folder with a denoiser"),
        (["--text", "./nowhere"], "--text ./nowhere: a folder in transformers layout is needed"),
        (["samplers", "--resolution", "40"], "--resolution 40: a positive multiple of 32"),
        (["samplers", "--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_of_the_user_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run_main(tool.main, argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        InputError, match="^diffusers, torchdiffeq not installed.*pip install diffusers torchdiffeq.*dev.txt"
    ):
        tool.main(["samplers"])
    tool.check_packages(["text"])


def test_a_report_is_not_written_over(tmp_path):
    (tmp_path / "parity.md").write_text("kept")
    with pytest.raises(InputError, match="parity.md exists: choose another folder for --out"):
        tool.main(["samplers", "--out", str(tmp_path)])
    assert (tmp_path / "parity.md").read_text() == "kept"


def test_features_of_the_loss_have_outliers_and_plain_channels():
    predicted, clean = feature_pair(0)
    assert [maps.shape for maps in clean] == [(2, s, s, c) for s, c in zip(SIZES, CHANNELS, strict=True)]
    for maps in (predicted[4], clean[4]):
        spread = np.abs(maps - np.median(maps, axis=(1, 2), keepdims=True)).max(axis=(1, 2)) / maps.std(axis=(1, 2))
        assert spread[:, 0].min() > 8 and spread[:, 1].max() < 6


def test_settings_give_sides(tmp_path):
    assert Settings(tmp_path, resolution=96).sides(8) == (12, 18)
    assert text.MERGED  # the vocabulary of the tokeniser has merges
