"""Result cards: written and read, shown, compared; sweeps as tables."""

import csv
import json

import pytest

from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards
from lpl_jax.evaluation.cards import Card, Metric
from lpl_jax.evaluation.sweep import varied, write_sweep


def card(fid=3.5, **provenance):
    facts = {"num_images": 100, "features.weights": "abc", "checkpoint.step": 10, "sampling.guidance": 1.5} | provenance
    metrics = {"fid": Metric(fid, fid - 1, fid + 1), "precision": Metric(0.75)}
    return Card(metrics, {"recall": "no images"}, facts, cards.context(["lpl", "eval", "--x"]))


def test_a_card_survives_its_file_and_says_everything(tmp_path):
    written = card()
    path = cards.write_card(written, tmp_path / "out")
    assert cards.read_card(path) == cards.read_card(tmp_path / "out") == written
    assert {"jax", "flax", "numpy", "python", "lpl_jax"} <= set(written.context["versions"])
    assert written.context["command"] == "lpl eval --x"
    page = (tmp_path / "out" / "card.md").read_text()
    for expected in ("| FID | 3.5 | 2.5 to 4.5 | lower |", "| precision | 0.75 | - | higher |", "- recall: no images"):
        assert expected in page
    for name, value in written.provenance.items():
        assert f"| {name} | {value} |" in page


def test_compare_marks_what_differs_and_what_forbids_a_comparison():
    text = cards.compare({"a": card(), "b": card(fid=2.0, **{"sampling.guidance": 2.0, "num_images": 50})})
    assert "| FID (lower is better) | 3.5 (2.5 to 4.5) | 2 (1 to 3) |" in text
    assert "| num_images (!) | 100 | 50 |" in text
    assert "| sampling.guidance | 1.5 | 2.0 |" in text
    assert "Not comparable: num_images must be the same" in text
    assert text.endswith("Same in all:\n\n- features.weights: abc\n- checkpoint.step: 10\n")
    assert "Same in all" not in cards.compare({"a": card(), "b": card(fid=2.0)}, same=False)


def test_compare_of_cards_made_alike_and_of_different_metrics():
    one, other = card(), card()
    other.metrics["clip_score"] = Metric(25.0)
    text = cards.compare({"a": one, "b": other})
    assert "| CLIPScore (higher is better) | - | 25 |" in text
    assert "All were made in the same way." in text and "Not comparable" not in text


@pytest.mark.parametrize(
    "field, expected",
    [
        ("features.weights", True),
        ("reference.statistics", True),
        ("reference.images", True),
        ("resolution", True),
        ("metrics.k", True),
        ("metrics.intervals", False),
        ("checkpoint.step", False),
        ("sampling.steps", False),
        ("images.source", False),
        ("reference.source", False),
        ("autoencoder.weights", False),
    ],
)
def test_which_fields_forbid_a_comparison(field, expected):
    assert cards.matters(field) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("not json", "cannot be read as JSON"),
        ("{}", "is not a result card"),
        (json.dumps({"format": 9, "metrics": {}}), "format 9"),
        (
            json.dumps({"format": 1, "metrics": {"fid": {"worth": 1}}, "absent": {}, "made": {}, "context": {}}),
            "'worth' not known; possible: value, low, high",
        ),
    ],
)
def test_what_is_no_card_is_refused(tmp_path, content, message):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(InputError, match=message):
        cards.read_card(tmp_path)
    with pytest.raises(InputError, match="no such result card"):
        cards.read_card(tmp_path / "elsewhere")


def test_sweep_has_a_row_for_each_evaluation(tmp_path):
    results = [
        (dict(checkpoint=10, weights=weights, guidance=guidance, steps=5), card(fid=guidance))
        for weights in ("params", "0.9")
        for guidance in (1.0, 1.5, 2.0)
    ]
    assert varied(results) == ["guidance", "weights"]
    path = write_sweep(results, tmp_path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["guidance"] for row in rows] == ["1.0", "1.5", "2.0"] * 2
    assert [float(row["fid_low"]) for row in rows[:3]] == [0.0, 0.5, 1.0]
    assert rows[0]["precision"] == "0.75" and rows[0]["precision_low"] == ""
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    other = [(settings, card(num_images=7)) for settings, _ in results]
    assert write_sweep(other, tmp_path) != path


def test_a_sweep_over_names_is_drawn_too(tmp_path):
    path = write_sweep([(dict(weights=name), card()) for name in ("params", "0.9", "0.99")], tmp_path)
    assert path.with_suffix(".png").stat().st_size > 1000
