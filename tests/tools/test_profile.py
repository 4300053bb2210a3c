"""The profile tool as a user calls it: the paper's tables, full-size counts, and a tiny step compiled and run."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.cost import flops, paper_tables, step_cost
from lpl_jax.denoisers import preset
from lpl_jax.errors import InputError
from lpl_jax.tools import profile

ROOT = Path(profile.__file__).parents[2]
TINY = [
    "--config=configs/base.py",
    "--config.resolution=32",
    "--config.model.hidden=16",
    "--config.model.depth=3",
    "--config.model.heads=2",
    "--config.model.num_classes=2",
    "--config.model.context_pre_only=False",
    "--config.train.batch_size=16",
    "--config.lpl.preset=paper",
    "--config.lpl.taps=1",
    "--config.lpl.mask_layers=none",
    "--config.loss.lpl_capacity=all",
]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def call(argv, folder):
    assert profile.main([*argv, f"--out={folder}"]) == 0
    return json.loads((folder / "profile.json").read_text()), (folder / "profile.md").read_text()


def test_table8_prints_them(capsys):
    assert profile.main(["--table8"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {row.printed:.3f} |" in text for row in paper_tables.ROWS.values())
    document = (ROOT / "docs/flops.md").read_text()
    assert all(line in document for line in text.splitlines() if line.startswith(("| Table", "| Condition")))
    # Whole trainings: totals and percentages, and the document's table is this one.
    assert "| ImageNet, 256 px | 50,711.20 | 58,030.80 | +14.43 % |" in text
    assert text[text.index("| training |") :] in document


def test_full_size_config_is_counted_without_weights_or_data(tmp_path, capsys):
    report, text = call(["--config=configs/imagenet.py:512,post,lpl"], tmp_path)
    assert text in capsys.readouterr().out
    model, paper = preset("paper796"), report["analytic"]["paper"]
    assert paper["base"] == flops.step_flops(flops.PAPER, model, AutoencoderConfig(), 512).base
    assert report["decoding"] == {"active_fraction": 0.478, "images": 136, "share": 136 / 256}
    # The gate lets 0.478 of the timesteps through; a step has room for a tenth more, in equal parts on 8 devices.
    added = {name: paper[name] - 1 for name in ("ratio", "ratio_at_active_fraction")}
    assert added["ratio"] / added["ratio_at_active_fraction"] == pytest.approx(136 / 256 / 0.478)
    assert added["ratio"] == pytest.approx(paper["perceptual"] / paper["base"])
    assert report["parameters"]["denoiser"] == pytest.approx(786.4e6, rel=1e-4)
    assert "nothing fetched" in report["autoencoder"]
    # The step recomputes its blocks (remat): one denoiser pass above the model's own operations.
    usual, traced = report["analytic"]["usual"], report["traced"]["step"] / 256
    assert traced == pytest.approx(usual["total"] + usual["denoiser_forward"], rel=1e-4)
    assert traced > usual["total"]


def test_tiny_step_is_counted_compiled_and_run(tmp_path, tiny_folder):
    argv = [*TINY, f"--config.autoencoder.source={tiny_folder}"]
    report, text = call([*argv, "--run", "--repeats=3", "--peak-tflops=0.5"], tmp_path)
    # The traced step holds exactly the products of the formulas, as nothing is computed again here.
    exact = dataclasses.replace(flops.USUAL, first_layers=False)
    model = preset("tiny", hidden=16, depth=3, heads=2, num_classes=2, context_pre_only=False)
    tiny = AutoencoderConfig.tiny()
    decoder = flops.decoder_work(tiny, 32, 1)
    base = flops.step_flops(exact, model, tiny, 32).base
    decoded = 2 * exact.forward(decoder) + exact.input_backward(decoder)
    assert report["traced"]["step"] == 16 * (base + decoded)
    usual = report["analytic"]["usual"]
    assert usual["perceptual"] == decoded and usual["ratio"] == usual["total"] / usual["base"]
    # tau = 3 at 512 px is 3 / 16 at 32 px, and 36 of the 1000 timesteps have so little noise.
    assert report["decoding"] == {"active_fraction": 0.036, "images": 16, "share": 1.0}

    compiled, measured = report["compiled"], report["measured"]
    memory = compiled["memory"]
    assert memory["peak"] == memory["argument"] + memory["output"] + memory["temp"] - memory["alias"]
    # Donated: parameters, two moments and an average, all float32, take the place of the old ones.
    assert memory["alias"] >= 16 * report["parameters"]["denoiser"]
    missed = report["traced"]["step"] - report["traced"]["bodies_once"]
    assert compiled["flops_with_loops"] - compiled["flops"] == pytest.approx(missed / 8) and missed > 0
    # The eight devices share the work. XLA also counts elementwise operations, but not what convolutions pad.
    assert 0.5 < compiled["flops_with_loops"] / (report["traced"]["step"] / 8) < 2

    low, high = measured["step_seconds_range"]
    assert 0 < low <= measured["step_seconds"] <= high and measured["devices"] == 8
    assert measured["images_per_second"] == pytest.approx(16 / measured["step_seconds"])
    assert measured["mfu"] == pytest.approx(usual["total"] * 16 / measured["step_seconds"] / 8 / 0.5e12)
    assert math.isfinite(measured["loss"]) and measured["loss"] > 0
    assert "(MFU: " in text and "% of 0.5)" in text


@pytest.mark.slow
def test_comparison_losses_are_traced(tmp_path, tiny_folder):
    tiny = [*TINY[:-4], f"--config.autoencoder.source={tiny_folder}"]
    assert not any("lpl" in flag for flag in tiny)
    network = "--config.comparison.network=anything"  # shapes are all it takes
    comparisons = {
        "none": [],
        "latent_lpips": ["--config.comparison.kind=latent_lpips", network],
        "self_perceptual": ["--config.comparison.kind=self_perceptual", "--config.comparison.block=2"],
        "reweighting": [*TINY[-4:], "--config.comparison.kind=reweighting"],
    }
    reports = {name: call([*tiny, *extra], tmp_path / name)[0] for name, extra in comparisons.items()}
    added = {
        name: (report["traced"]["step"] - reports["none"]["traced"]["step"]) / 16 for name, report in reports.items()
    }
    # Eq. 15: two decodes of every image, no gradient.
    parts = reports["reweighting"]["analytic"]["usual"]
    assert added["reweighting"] == parts["perceptual"] == parts["clean_decode"] + parts["predicted_decode"] > 0
    # Self-Perceptual behind block 2 of 3: two passes and a gradient of the input, of at most the whole network.
    assert 0 < added["self_perceptual"] < 3 * reports["none"]["analytic"]["usual"]["denoiser_forward"]
    # VGG16 on 4 x 4 latents: two passes, and one back, each of its convolutions' multiply-adds.
    widths = [4, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    pixels = [16] * 10 + [4] * 3
    once = sum(2 * 9 * a * b * n for (a, b), n in zip(itertools.pairwise(widths), pixels, strict=True))
    assert added["latent_lpips"] == 3 * once


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, peak):
    assert step_cost.peak_tflops(kind) == peak


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no config given"),
        ([*TINY, "--peak-tflops=1"], "give --run too"),
        ([*TINY, "--config.autoencoder.source=./nowhere"], "no autoencoder at './nowhere'"),
        ([*TINY, "--config.train.batch_size=12"], "train.batch_size=12 is not divisible by the 8 shards"),
        ([*TINY, "--repeats=0"], "--repeats 0: must be 1 to 1,000,000"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(InputError, match=message):
        profile.main(argv)


TEXT = ["--config=configs/cc12m.py:256", "--config.model.preset=tiny"]


def test_text_tower_is_a_part_of_its_own(tmp_path, capsys):
    """Counted without files where the tower is known."""
    report, text = call(TEXT, tmp_path)
    assert report["parameters"]["text tower"] == pytest.approx(123.1e6, rel=1e-3)
    usual = report["analytic"]["usual"]
    assert usual["text"] == pytest.approx(2 * 77 * 12 * (12 * 768**2 + 2 * 77 * 768))
    assert "| text tower forward | all | " in text


@pytest.mark.slow
def test_text_tower_is_not_counted_where_its_outputs_come_from_the_store(tmp_path):
    report, _ = call(TEXT, tmp_path / "step")
    stored, _ = call([*TEXT, "--config.text.embeddings=store"], tmp_path / "store")
    usual = report["analytic"]["usual"]
    assert stored["analytic"]["usual"]["total"] == pytest.approx(usual["total"] - usual["text"])
    # The traced steps: the tower's pass is all that differs.
    difference = (report["traced"]["step"] - stored["traced"]["step"]) / report["batch_size"]
    assert difference == pytest.approx(usual["text"])
