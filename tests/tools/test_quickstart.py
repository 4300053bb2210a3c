"""The quickstart's whole path with a few steps of a tiny model."""

import numpy as np
import pytest
from PIL import Image

from lpl_jax.tools.quickstart import main

CONFIG = """
from lpl_jax.configs import quickstart

def get_config(arguments=""):
    c = quickstart.get_config(arguments)
    c.resolution = 32
    c.data.crops = 2
    c.model.hidden, c.model.depth, c.model.heads, c.model.base_grid = 16, 1, 2, 2
    c.model.context_pre_only = False
    c.train.batch_size, c.train.steps, c.train.log_every = 8, 2, 1
    c.sampling.steps, c.sampling.per_class = 2, 1
    if "lpl" in arguments:
        c.lpl.taps, c.lpl.tau_ref_resolution = 1, 32
        c.loss.calibration_batches = 1
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, two_devices):
    root = tmp_path_factory.mktemp("quickstart")
    (root / "config.py").write_text(CONFIG)
    assert main(["--config", str(root / "config.py"), "--workdir", str(root / "run")]) == 0
    return root / "run"


def test_it_leaves_what_it_promises(folder):
    for run in ("base", "without_lpl", "with_lpl"):
        for name in ("config.json", "metrics.jsonl", "checkpoints/2"):
            assert (folder / run / name).exists(), f"{run}/{name}"
        assert list((folder / run).glob("events.out.tfevents*"))
    grid = Image.open(folder / "grid.png")
    assert grid.size == (4 * (32 + 8) + 3 * 12, 18 + 8 * 36 + 4)
    assert np.asarray(grid).std() > 10
    assert Image.open(folder / "losses.png").size[0] == 1350
    table = (folder / "summary.md").read_text()
    for run in ("base", "without_lpl", "with_lpl"):
        assert f"| {run} | 2 |" in table
    assert "dB PSNR" in table


@pytest.mark.slow
def test_a_second_call_continues_what_is_complete(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoints/2/files.json")}
    assert len(before) == 3
    root = folder.parent
    assert main(["--config", str(root / "config.py"), "--workdir", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
