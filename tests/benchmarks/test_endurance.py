"""What the benchmark of long runs says of a process that it looks at."""

import os

import pytest

from benchmarks import endurance


def test_a_process_is_looked_at_until_it_ends():
    found = endurance.look(os.getpid())
    assert found["rss_mib"] > 50 and found["files"] > 2 and found["threads"] >= 1
    assert endurance.look(2**22 + 1) is None


@pytest.mark.parametrize(("leak", "flat"), [(0.0, True), (1.0, False)])
def test_what_grows_is_not_flat(leak, flat, capsys):
    """MiB per second over 200 s; the first tenth, in which caches fill, counts for nothing."""
    samples = [{"rss_mib": 300 + leak * second + 500 * (second > 5), "files": 9, "threads": 4} for second in range(200)]
    result = endurance.report("train", samples, 0, 200.0, step_time=[10.0, 10.1, 10.0, 10.2, 10.3], steps=7)
    assert result["flat"] == {"rss_mib": flat, "files": True, "threads": True, "step_time": True}
    assert result["windows"]["files"] == [9] * endurance.WINDOWS and result["steps"] == 7
    assert "growth" in result and "train: status 0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_programs_run(tmp_path):
    """A thousandth: too short for its figures to be flat."""
    assert endurance.main(["--scale", "0.001", "--out", str(tmp_path)]) in (0, 1)
    assert len(list(tmp_path.glob("*-endurance.json"))) == 1
