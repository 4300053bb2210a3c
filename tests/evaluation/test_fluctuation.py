"""How much a metric changes from checkpoint to checkpoint: known answers, and what is too few."""

import pytest

from lpl_jax.evaluation.cards import Card, Metric
from lpl_jax.evaluation.fluctuation import fluctuation, markdown, table


def test_a_straight_line_changes_and_does_not_deviate():
    found = fluctuation({10: 5.0, 20: 4.0, 40: 2.0})  # unequal distances, one slope
    assert found.checkpoints == 3
    assert found.change.value == pytest.approx(1.5) and found.deviation.value == pytest.approx(0)
    assert found.change.low == 1 and found.change.high == 2


def test_a_zigzag_deviates():
    found = fluctuation({step: 3.0 + step % 2 for step in range(9)})
    assert found.change == Metric(1, 1, 1) and found.deviation == Metric(1, 1, 1)


def test_two_checkpoints_have_no_neighbours_on_both_sides():
    assert fluctuation({1: 1.0, 2: 2.0}) is None
    assert markdown(table([({"row": "a"}, card(1, 1.0)), ({"row": "a"}, card(2, 2.0))])) == ""


def card(step, fid):
    return Card({"fid": Metric(fid)}, {}, {"checkpoint.step": step}, {})


def test_runs_and_averages_are_kept_apart():
    cards = [({"row": row}, card(step, row * step)) for step in (3, 1, 2) for row in (1.0, 2.0)]
    rows = table(cards)
    assert [(row["row"], row["metric"], row["change"], row["deviation"]) for row in rows] == [
        (1.0, "fid", 1.0, 0.0), (2.0, "fid", 2.0, 0.0)
    ]  # fmt: skip
    assert "| 2.0 | fid | 3 | 2 (2 to 2) | 0 |" in markdown(rows)
