"""Named experiments: commands, what was done already, and tables of what came out."""

import csv
from pathlib import Path

import pytest

from configs import paper
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards
from lpl_jax.evaluation.cards import Card, Metric
from lpl_jax.tools import sweep

ROOT = Path(paper.__file__).parents[1]
FILE = ROOT / "configs" / "paper.py"


def names(*patterns):
    return [row.name for row in sweep.choose(paper.ROWS, patterns)]


def test_rows_come_behind_what_they_start_from():
    assert names("table4_50k_lpl") == ["pretrain_eps", "table4_50k_init", "table4_50k_lpl"]
    assert names("table3_v_*", "table3_flow_lpl") == [
        "pretrain_v", "table3_v_base", "table3_v_lpl", "pretrain_flow", "table3_flow_lpl"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"no row is named 'table12_\*'; possible: pretrain_eps"):
        names("table12_*")


def test_printed_commands_are_those_that_a_sweep_runs(capsys, monkeypatch, tmp_path):
    rest = ["--workdir", str(tmp_path), "--stores", "/s", "--", "--config.train.steps=3", "--config.evaluation.k=5"]
    monkeypatch.chdir(ROOT)
    assert sweep.main(["--rows", "figure8_base", "--print", *rest]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    run, start = tmp_path / "figure8_base", tmp_path / "pretrain_eps"
    assert lines[2:] == [
        f"python train.py --config=configs/paper.py:figure8_base --workdir={run} --config.train.init_from={start} "
        "--config.data.store=/s/512_sdxl-vae --config.train.steps=3",
        f"python eval.py --workdir={run} --steps=5,10,15,25,50,100,200 --config.evaluation.k=5",
    ]
    called = []

    def fake(command):
        called.append(command)
        Path(tmp_path / "pretrain_eps").mkdir(exist_ok=True)
        run.mkdir(exist_ok=True)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(sweep.subprocess, "run", fake)
    assert sweep.main(["--rows", "figure8_base", *rest]) == 0
    assert [" ".join(["python", *command[1:]]) for command in called] == lines
    called.clear()
    assert sweep.main(["--rows", "figure8_base", *rest]) == 0  # training says itself that it is done
    assert [command[1] for command in called] == ["train.py", "train.py"]


def test_rows_of_two_data_sets_in_one_sweep(capsys, monkeypatch, tmp_path):
    """Each has its own stores, and flags of one data set are for its rows alone."""
    monkeypatch.chdir(ROOT)
    rest = ["--workdir", str(tmp_path), "--stores", "/s", "--", "--config.evaluation.k=5"]
    rest += ["cc12m:--config.evaluation.reference=/c", "imagenet:--config.evaluation.reference=/i"]
    rest += ["cc12m:--config.text.dtype=float32"]
    assert sweep.main(["--rows", "table2_*256_lpl", "--print", *rest]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "table2" in line and not line.startswith("#")]
    asymmetric = "asymmetric-autoencoder-kl-x-1-5"
    (train, evaluate), (train_text, evaluate_text) = lines[:2], lines[2:]
    assert train.endswith(f"--config.data.store=/s/256_{asymmetric}")
    assert evaluate.endswith("--config.evaluation.k=5 --config.evaluation.reference=/i")
    assert train_text.endswith(f"--config.data.store=/s/cc12m_256_{asymmetric} --config.text.dtype=float32")
    assert evaluate_text.endswith("--config.evaluation.k=5 --config.evaluation.reference=/c")
    with pytest.raises(InputError, match="is of data set 's320m'"):
        sweep.main(["--rows", "table2_*", "--print", "--", "s320m:--config.evaluation.k=5"])


def test_a_sweep_stops_where_a_run_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep.subprocess, "run", lambda command: type("Done", (), {"returncode": 130}))
    arguments = ["--rows", "pretrain_v", "--file", str(FILE), "--workdir", str(tmp_path)]
    assert sweep.main(arguments) == 130
    assert "pretrain_v ended with status 130; call again to go on" in capsys.readouterr().err


def write(run, name, fid, step=10):
    card = Card({"fid": Metric(fid)}, {}, {"checkpoint.step": step}, cards.context(["python"]))
    cards.write_card(card, run / "evaluation" / name)


def test_results_stand_beside_the_printed_ones(tmp_path, capsys):
    for tau, fid in ((1, 5.0), (2, 4.0), (3, 3.5)):
        write(tmp_path / f"figure6_tau{tau}", "step10", fid)
    write(tmp_path / "depth_uniform", "step10", 4.4)
    arguments = ["--rows", "figure6_*", "depth_uniform", "--file", str(FILE), "--workdir", str(tmp_path)]
    assert sweep.main([*arguments, "--collect"]) == 0
    shown = capsys.readouterr().out
    assert "| Fig. 6, tau = 2 (`figure6_tau2`) | - / 4 | step10 |" in shown
    assert "| Sec. 4.3, equal depth weights (`depth_uniform`) | 4.38 / 4.4 | step10 |" in shown
    assert "(`figure6_tau20`) | - / - | not run |" in shown
    with (tmp_path / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["depth_uniform"]["paper_fid"] == "4.38" and rows["depth_uniform"]["fid"] == "4.4"
    assert (tmp_path / "figure6_tau.png").stat().st_size > 1000


def test_documented_list_is_the_list(capsys):
    assert sweep.main(["--list", "--file", str(FILE)]) == 0
    listed = capsys.readouterr().out
    assert listed in (ROOT / "docs/paper.md").read_text()
    assert all(f"`{name}`" in listed for name in paper.ROWS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no experiments given"),
        (["--rows", "x", "--file", "none.py"], "none.py: no such file"),
        (["--rows", "x", "--", "steps=3"], "behind -- stand flags"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        sweep.main(arguments if "--file" in arguments else [*arguments[:2], "--file", str(FILE), *arguments[2:]])
