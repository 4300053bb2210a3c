"""A mistake is said before anything is made: afterwards every folder is as it was, and the corrected call works."""

import json
import os

import pytest

from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.tools import cli, sweep, verbs

CONFIG = """
import json
from ml_collections import ConfigDict
from lpl_jax.configs import base

def get_config():
    config = base.get_config()
    with config.ignore_type():
        config.update(ConfigDict(json.loads({text!r})))
    return config
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_config, write_run, stores, image_folder):
    """A folder with a config, a run of two checkpoints and one without any, and links to images and their store."""
    root, config = tmp_path_factory.mktemp("here"), tiny_config()
    (root / "config.py").write_text(CONFIG.format(text=json.dumps(config.to_dict())))
    write_run(root / "run", build(config), (2, 4))
    (root / "begun").mkdir()
    (root / "begun" / "config.json").write_text((root / "run" / "config.json").read_text())
    (root / "images").symlink_to(image_folder)
    (root / "store").symlink_to(stores[32])
    return root


def contents(folder):
    """Path -> bytes of all files; of folders None."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


TRAIN = "train --config config.py --workdir new "
EVERY = TRAIN + "--config.evaluation.every=2 "
WITHOUT_STORE = TRAIN + "--config.data.store= --config.data.source=images "
EVAL = "eval --workdir run --features classifier "
SAMPLE = "sample --label 0 --out new --workdir "
PREPARE = "prepare --source photos --out new "
QUICKSTART = "quickstart --workdir new "
ANALYZE = "analyze {} --images photos --out new "
MISTAKES = [
    ("parity --resolution 7 --out new", "a positive multiple of 32 is needed"),
    ("compile-check --config config.py --topology cpu:99999999", "possible are 1 to 1,024 emulated devices"),
    (TRAIN + "--config.sampling.steps=2000", "sampling: steps must be an integer between 1 and 1000, got 2000"),
    (TRAIN + "--config.sampling.sampler=euler", "sampling.sampler='euler' with paradigm 'eps'; possible: ddim"),
    (TRAIN + "--config.mesh.fsdp=3", "mesh data=-1, fsdp=3, tensor=1 does not fit"),
    (TRAIN + "--config.train.init_from=nowhere", "train.init_from=nowhere: not the folder of a run"),
    (TRAIN + "--config.train.init_from=run --config.train.init_step=3", "run has no checkpoint of step 3"),
    (TRAIN + "--config.lpl.preset=paper --config.train.weight_from=nowhere", "train.weight_from=nowhere: no run"),
    (TRAIN + "--config.model.hidden=16384 --config.model.depth=100", "the parameters, their moments and averages take"),
    (EVERY + "--config.evaluation.reference=nowhere", "image set nowhere does not exist"),
    (EVERY + "--config.evaluation.reference=config.py", "image set config.py is not one"),
    (EVERY + "--config.data.source=nowhere", "nowhere"),
    (WITHOUT_STORE + "--config.model.num_classes=3", "model.num_classes=3, but data.source=images has 2 classes"),
    (WITHOUT_STORE + "--config.data.caption_key=txt --config.text.source=bundled", "model.num_classes=2 is not"),
    ("train --config config.py --workdir config.py", "--workdir config.py: config.py is a file: give a folder"),
    ("train --config config.py --workdir config.py/run", "--workdir config.py/run: config.py is a file"),
    (EVAL + "--reference nowhere", "image set nowhere does not exist"),
    (EVAL + "--out config.py", "--out config.py: config.py is a file: give a folder"),
    (EVAL + "--checkpoint 3", "run has no checkpoint of step 3; there are 2, 4"),
    (EVAL + "--steps 10,2000", "sampling: steps must be an integer between 1 and 1000, got 2000"),
    (EVAL + "--config.sampling.weights=0.7", "sampling.weights='0.7' with ema.decays=(0.5, 0.9)"),
    (EVAL + "--config.evaluation.clip=nowhere", "evaluation.clip is given without evaluation.prompts"),
    ("eval --workdir run --config.evaluation.inception=nowhere", "the FID network's weights are not at nowhere"),
    ("eval --images images --reference images --out config.py", "--out config.py: config.py is a file"),
    ("eval --images images --statistics config.py/x.npz", "--statistics config.py: config.py is a file"),
    (SAMPLE + "run --steps 2000", "sampling: steps must be an integer between 1 and 1000, got 2000"),
    (SAMPLE + "run --spacing middle", "sampling.spacing='middle' is not possible"),
    (SAMPLE + "run --weights 0.7", "weights '0.7' are not in run"),
    (SAMPLE + "run begun", "begun has no checkpoint yet"),
    ("sample --workdir run --label 0 --out config.py", "--out config.py: config.py is a file: give a folder"),
    (PREPARE + "--resolution 60", "resolution=60: autoencoder"),
    (PREPARE + "--resolution 16384", "resolution=16384: the attention of autoencoder"),
    (PREPARE + "--resolution 64 --max-skipped some", "max"),
    (PREPARE + "--resolution 64 --crops 1 --caption-key txt", "captions=txt with source photos"),
    ("prepare --source photos --resolution 64 --out config.py", "--out config.py: config.py is a file"),
    (QUICKSTART + "--config.model.num_classes=3", "model.num_classes=3, but data.source=photos has 8 classes"),
    (
        QUICKSTART + "--config.data.source=images",
        "lpl quickstart learns classes of photographs: text",
    ),
    (QUICKSTART + "--config.sampling.steps=2000", "sampling: steps must be an integer between 1 and 1000"),
    (QUICKSTART + "--config.train.batch_size=63", "train.batch_size=63 is not divisible by the 8 parts"),
    (QUICKSTART + "--config.model.patch_size=3", "latents of 8 x 8 given, possible are"),
    ("quickstart --workdir config.py", "--workdir config.py: config.py is a file: give a folder"),
    ("sweep --rows pretrain_eps --workdir config.py", "--workdir config.py: config.py is a file: give a folder"),
    ("export --workdir run --out config.py", "config.py exists: nothing is overwritten"),
    ("export --workdir run --out config.py/x", "config.py is a file"),
    ("export --workdir run --out new", "takes every configuration"),
    ("export --workdir run --out new --layout lpl_jax --checkpoint 3", "run has no checkpoint of step 3"),
    ("import nowhere --config config.py --workdir new", "nowhere"),
    (ANALYZE.format("interp") + "--resolution 8000", "--resolution=8000: the attention of autoencoder"),
    (ANALYZE.format("interp") + "--factors 0.5", "--factors 0.5: must be numbers of 1 or more"),
    (ANALYZE.format("outliers") + "--channels x", "--channels 'x': needed: numbers with commas between them"),
    ("analyze interp --images photos --out config.py", "--out config.py: config.py is a file: give a folder"),
    ("profile --config config.py --out config.py", "--out config.py: config.py is a file: give a folder"),
    ("compile-check --config config.py --topology cpu:8 --json config.py/x", "--json config.py: config.py is a file"),
    ("compare run run --out config.py", "--out config.py: config.py is a file: give a folder"),
    ("store show store --out config.py/x.png", "--out config.py: config.py is a file"),
    ("config quickstart:lpl", "unrecognized arguments: quickstart:lpl (did you mean --config quickstart:lpl?)"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[argv for argv, _ in MISTAKES])
def test_a_mistake_leaves_everything_as_it_was(argv, message, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    before = contents(here)
    with pytest.raises(SystemExit) as end:
        cli.run_main(verbs.main, argv.split())
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and said.startswith("error: ") and message in said
    assert contents(here) == before


def test_most_verbs_are_tried():
    tried = {argv.split()[0] for argv, _ in MISTAKES}
    assert set(verbs.VERBS) == tried


def test_what_the_evaluations_of_a_sweep_need_is_looked_for_first(here, monkeypatch):
    monkeypatch.chdir(here)
    row = type("Row", (), {"name": "a"})

    def check(**fields):
        evaluation = EvaluationConfig(features="classifier", **fields)
        sweep.check_evaluations([row], {"a": type("Its", (), {"evaluation": evaluation, "resolution": 32})})

    check(reference="images")
    for fields, message in (
        (dict(reference="nowhere"), "^a: image set nowhere does not exist"),
        (dict(clip="nowhere"), "^a: evaluation.clip=nowhere: no such folder"),
        (dict(prompts="nowhere"), "^a: prompts nowhere cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            check(**fields)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(here)
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        cli.run_main(verbs.main, ["sample", "--workdir", "run", "--label", "0", "--out", str(tmp_path / "new")])
    assert f"{tmp_path} may not be written into" in capsys.readouterr().err
