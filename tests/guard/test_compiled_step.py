"""The compiled training step has not grown: operations, memory plan and collectives against tests/guard/*.json."""

import copy
from pathlib import Path

import jax
import pytest

from lpl_jax.cost import guard

FILE = Path(__file__).parent / "compiled_step.json"


@pytest.fixture(scope="module")
def measured():
    return guard.measure(guard.FAST)


@pytest.fixture(scope="module")
def committed():
    return guard.read(FILE)


def check(measured, committed):
    grown = guard.grown(measured, committed.cases)
    made_with = "" if committed.jax == jax.__version__ else f", made with jax {committed.jax}"
    assert not grown, (
        f"with jax {jax.__version__} the compiled step needs more than tests/guard/compiled_step.json{made_with}, "
        f"says: {'; '.join(grown)}. If that is meant: {guard.UPDATE} tests/guard/compiled_step.json"
    )


def test_the_step_has_not_grown(measured, committed):
    check(measured, committed)


@pytest.mark.slow
def test_the_other_steps_have_not_grown(committed):
    check(guard.measure([case for case in guard.CASES if case not in guard.FAST]), committed)


def test_every_case_has_what_it_should(measured, committed):
    assert set(committed.cases) == set(guard.CASES)
    for case, quantities in measured.items():
        assert quantities["memory: peak, bytes"] > 0 and quantities["full rematerializations"] == 0
        assert any("all-reduce" in name for name in quantities) == case.startswith("mesh")
        # All products are in both counts; what convolutions of small maps pad is in the second alone.
        assert 0.8 < quantities["compiled operations"] / quantities["traced operations"] < 1.2


QUANTITIES = ("compiled operations", "memory: temp, bytes", "all-gather: number", "all-reduce: bytes")


@pytest.mark.parametrize("name", QUANTITIES)
def test_what_grows_is_named(measured, name):
    """A base line that is doctored to lie 6 % below what is measured, as if that had grown since."""
    case = "mesh of 8, LPL"
    doctored = copy.deepcopy(measured)
    doctored[case][name] = measured[case][name] / 1.06
    (line,) = guard.grown(measured, doctored)
    assert line.startswith(f"{case}: {name} was ") and "(+6.0%)" in line
    doctored[case][name] = measured[case][name] / 1.04
    assert guard.grown(measured, doctored) == []


def test_a_new_kind_of_collective_is_named(measured):
    doctored = copy.deepcopy(measured)
    for name in [name for name in doctored["mesh of 8, LPL"] if name.startswith("all-gather")]:
        del doctored["mesh of 8, LPL"][name]
    assert [line.split(" was ")[0] for line in guard.grown(measured, doctored)] == [
        "mesh of 8, LPL: all-gather: number",
        "mesh of 8, LPL: all-gather: bytes",
    ]
