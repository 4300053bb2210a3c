"""The table of docs/scaling.md: its cells are configs that exist, and it shows what is there and what is missing."""

from pathlib import Path

import pytest

from benchmarks import compile_table
from lpl_jax.cost import topology
from lpl_jax.experiment import build
from lpl_jax.tools import compile_check, config_file


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(Path(compile_table.__file__).parents[1])


def test_cells_of_the_table_are_configs_that_exist():
    cells = compile_table.cells()
    assert len(cells) == 36 == len({cell.name for cell in cells})
    for cell in cells:
        args = compile_check.parser().parse_args(cell.arguments)
        assert (args.topology, args.batch_size) == (cell.slice, cell.batch)
        config = config_file.given(args)
        config.train.batch_size = args.batch_size
        experiment = build(config)
        assert experiment.resolution == cell.resolution and (experiment.lpl is None) == (cell.loss == "none")
        slice_ = topology.parse(cell.slice)
        assert slice_.devices == compile_table.CHIPS[cell.slice] and cell.batch % slice_.devices == 0


def test_table_shows_both_steps_and_what_is_missing():
    def report(peak, compiled):
        return {
            "state": 2**30, "hbm": 16 * 2**30, "fits": peak < 16, "memory": {"peak": peak * 2**30},
            "flops": {"compiled": compiled * 1e12, "traced": compiled * 2e12},
            "collectives": {"all-gather": {"count": 1, "bytes": 2**29}},
        }  # fmt: skip

    results = {"paper796 256 none v5e-16": report(4, 10), "paper796 256 lpl v5e-16": report(5, 15)}
    results |= {"paper796 512 none v5e-16": report(20, 10), "paper796 512 economical v5e-16": report(21, 12)}
    lines = compile_table.table(results).splitlines()
    assert len(lines) == 2 + 16 + 4
    assert "| paper796 | 512 | v5e-16 | 16 | 5 of 16 | 1.00 | 20.00 (does not fit) | - | - |" in lines[2]
    assert "| paper796 | 512 | v5e-16 | 16 | economical | 1.00 | 20.00 (does not fit) | 21.00 " in lines[3]
    values = "| 1.00 | 4.00 | 5.00 | 1.25 | 16.00 | 0.50 | 0.50 | 10.0 | 15.0 | 1.50 |"
    assert f"| paper796 | 256 | v5e-16 | 64 | 5 of 16 {values}" in lines[4]
