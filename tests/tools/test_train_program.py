"""`lpl train` as a user calls it: one line for each mistake, status 2, no traceback, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lpl_jax.tools import cli, train

WORKDIR = "--workdir=never-made"
QUICK = "--config=configs/quickstart.py"
BASE = "--config=configs/base.py"
ROOT = Path(train.__file__).parents[2]


def call(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run_main(train.main, argv)
    return caught.value.code, capsys.readouterr()


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([WORKDIR], "missing --config; lpl train --help"),
        ([QUICK], "missing --workdir"),
        ([QUICK, WORKDIR, "--confg=1"], "unknown flag --confg (did you mean --config?)"),
        ([QUICK, WORKDIR, "extra"], "unrecognized arguments: extra"),
        (["--config=nowhere.py", WORKDIR], "config file nowhere.py: no such file; possible: base,"),
        ([QUICK + ":fast", WORKDIR], "does not take 'fast'; possible: post, lpl"),
        (["--config=configs/imagenet.py:256,512", WORKDIR], "takes one of 256, 512, got 256 and 512"),
        ([QUICK, WORKDIR, "--config.train.stepps=3"], "config.train has no field 'stepps' (did you mean steps?)"),
        ([QUICK, WORKDIR, "--config.trian.steps=3"], "config has no field 'trian' (did you mean train?)"),
        (
            [QUICK, WORKDIR, "--config.train.steps=many"],
            "config.train.steps=many is not possible: it must be a whole number",
        ),
        ([QUICK, WORKDIR, "--config.paradigm.name=eps", "--config.paradigm.zero_terminal_snr=True"], "impossible with"),
        ([QUICK + ":lpl", WORKDIR, "--config.lpl.tau=2", "--config.lpl.tau_ref_resolution=0"], "tau_ref_resolution=0"),
        (
            [QUICK + ":lpl", WORKDIR, "--config.loss.lpl_capacity=65"],
            "lpl_capacity=65 is more than train.batch_size=64",
        ),
        ([QUICK, WORKDIR, "--config.autoencoder.source=./nowhere"], "no autoencoder at './nowhere'"),
        ([QUICK, "--workdir=README.md"], "README.md is a file"),
        ([QUICK + ":post", WORKDIR], "train.init_from"),
        (["--config=README.md", WORKDIR], "config file README.md fails: "),
        ([BASE, WORKDIR, "--config.data.source=./nowhere"], "image folder ./nowhere: no such folder"),
        ([QUICK, WORKDIR, "--config.model.patch_size=3", "--config.data.crops=1"], "patch_size = 3"),
        ([QUICK, WORKDIR, "--config.data.store=./nowhere/x", "--config.data.split=train"], "only source tfds:NAME"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    status, output = call(argv, capsys)
    assert status == 2
    assert output.err.startswith("error: ") and message in output.err
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err + output.out
    assert not Path("never-made").exists()


def test_debug_keeps_the_traceback():
    with pytest.raises(Exception, match="missing --workdir, --config"):
        cli.run_main(train.main, ["--debug"])


def test_a_config_that_fails_is_one_line(tmp_path, capsys):
    for text, reason in (
        ("def get_config(): return 1 / 0", "division by zero"),
        ("def get_config( 3", "invalid syntax"),
        ("def get_config(): return 3", ""),
    ):
        file = tmp_path / "broken.py"
        file.write_text(text)
        status, output = call([f"--config={file}", WORKDIR], capsys)
        assert status == 2 and output.err.count("\n") == 1 and reason in output.err


def test_training_needs_none_of_the_packages_that_it_is_compared_with():
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'tensorflow', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None  # importing it fails\n"
        "import lpl_jax.tools.train, lpl_jax.training, lpl_jax.tools.quickstart, lpl_jax.tools.prepare"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
