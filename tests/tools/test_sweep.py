"""Named experiments: commands, what was done already, and tables of what came out."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpl_jax.configs import paper
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards
from lpl_jax.evaluation import collect as collect_results
from lpl_jax.evaluation.cards import Card, Metric
from lpl_jax.tools import sweep

ROOT = Path(paper.__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def rows_are_resolved_once():
    """All rows, for each set of flags: most of what a call of the program takes."""
    found, share = {}, sweep.share

    def shared(module, extra=()):
        key = module, tuple(extra)
        if key not in found:
            found[key] = share(module, extra)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "share", shared)
        patch.setattr(sweep, "check_evaluations", lambda rows, experiments: None)  # the network of FID is not here
        yield


def names(*patterns):
    return [row.name for row in sweep.choose(paper.ROWS, patterns)]


def test_rows_come_behind_what_they_start_from():
    assert names("table4_50k_base") == ["pretrain_eps", "table4_50k_init", "table4_50k_base"]
    assert names("table3_v_*", "table3_flow_lpl") == [
        "pretrain_v", "table3_v_base", "table3_v_lpl", "pretrain_flow", "table3_flow_lpl"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"no row is named 'tabel3_flow_lpl'; near to it: table3_flow_lpl, "):
        names("tabel3_flow_lpl")


def shared_of(*extra):
    return sweep.share(paper, list(extra)).shared


def test_rows_that_train_the_same_share_a_run():
    """They differ in sampling and evaluation alone, whatever way they say it."""
    shared = shared_of()
    assert set(shared) == set(paper.ROWS)
    runs, evaluations = ({name: getattr(each, kind) for name, each in shared.items()} for kind in ("run", "evaluation"))
    assert all(found[first] == first for found in (runs, evaluations) for first in found.values())
    base = ("table5_l2", "table6_base", "figure7_taps0", "figure9_weight0")
    assert {shared[name][:2] for name in base} == {("table3_eps_base", "table3_eps_base")}
    assert shared["figure8_base"][:2] == ("table3_eps_base", "figure8_base")  # evaluated with lists
    assert shared["figure19"][:2] == ("table3_eps_base", "figure19")
    # The default of a sweep is the run whose weight the others hold.
    full = ("table5_lpl", "figure6_tau3", "figure7_taps5", "depth_inverse", "recalibrated_figure6_tau3")
    assert {shared[name][:3] for name in full} == {("table3_eps_lpl", "table3_eps_lpl", None)}
    assert shared["table9_eps"][:2] == ("table3_eps_base", "table9_eps")
    assert shared["throughput_lpl"].run == "table2_imagenet512_lpl"
    for name in ("table3_v_lpl", "figure6_tau2", "table7_base", "figure10_lpl", "table5_latent_lpips", "pretrain_eps"):
        assert runs[name] == name


def test_a_weight_that_is_given_is_not_taken_from_another_run():
    name = "figure6_tau2"
    assert shared_of()[name].weight == "table3_eps_lpl"
    assert shared_of("--config.lpl.weight=3")[name].weight is None
    assert shared_of(f"{name}:--config.train.weight_from=None")[name] == (name, name, None, "0.99975")
    assert shared_of("--config.lpl.weight=3")["figure6_tau3"].run == "table3_eps_lpl"


def test_flags_of_its_own_give_a_row_a_run_of_its_own():
    shared = shared_of("table6_base:--config.loss.weighting=min_snr", "figure8_*:--steps=5,10")
    assert shared["table6_base"].run == "table6_base" and shared["table5_l2"].run == "table3_eps_base"
    assert shared["figure8_lpl"][:2] == ("table3_eps_lpl", "figure8_lpl")


def test_a_shared_run_is_trained_once_and_evaluated_for_each(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    rows = ["--rows", "table3_flow_base", "table9_flow", "--workdir", str(tmp_path), "--print"]
    assert sweep.main(rows) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    run, own = tmp_path / "table3_flow_base", tmp_path / "table9_flow"
    assert [line.split()[1] for line in lines if not line.startswith("#")] == ["train", "eval", "eval"]
    assert lines[-2].endswith("the run of table3_flow_base")
    assert lines[-1] == (
        f"lpl eval --workdir={run} --out={own}/evaluation --config.evaluation.cache={run}/evaluation/features "
        "--config.sampling.sampler=rk4 --config.sampling.steps=250 --weights=all"
    )
    assert sweep.main(["--rows", "table6_base", "table5_l2", "--workdir", str(tmp_path), "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[1] for line in lines if not line.startswith("#")] == ["train", "eval"]


def test_a_row_of_a_sweep_takes_the_weight_of_the_default_row(capsys, monkeypatch, tmp_path):
    """Which is trained before it; its variant calibrates its own."""
    monkeypatch.chdir(ROOT)
    assert names("figure20_tau1") == ["pretrain_eps", "figure15_lpl", "figure20_tau1"]
    rows = ["--rows", "figure6_tau1", "recalibrated_figure6_tau1", "--workdir", str(tmp_path), "--print"]
    assert sweep.main(rows) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lpl train")]
    assert [line.split()[2].rpartition(":")[2] for line in trained] == [
        "pretrain_eps", "table3_eps_lpl", "figure6_tau1", "recalibrated_figure6_tau1"
    ]  # fmt: skip
    held = f" --config.train.weight_from={tmp_path / 'table3_eps_lpl'}"
    assert [held in line for line in trained] == [False, False, True, False]


def test_a_checkpoint_that_will_not_be_kept_is_noticed_before_its_run_is_trained(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = ["--rows", "figure21_base", "--print"]
    assert sweep.main(rows) == 0
    assert "paper:figure21_base" in capsys.readouterr().out
    message = "figure21_base: train.init_step=200000, but pretrain_eps keeps its checkpoints of steps 4"
    with pytest.raises(InputError, match=message):
        sweep.main([*rows, "--", "--config.train.steps=4"])
    assert sweep.main([*rows, "--", "--config.train.steps=4", "figure21*:--config.train.init_step=4"]) == 0


def test_what_makes_numbers_other_ones_than_the_papers_is_said(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=r"pretrain_cc12m: evaluation.num_images=auto .* give evaluation.reference"):
        sweep.main(["--rows", "table2_cc12m256_base", "--print"])
    flag = "cc12m:--config.evaluation.reference=/val"
    assert sweep.main(["--rows", "table2_*256_base", "--print", "--", flag]) == 0
    said = capsys.readouterr().err
    assert "1 rows (table2_imagenet256_base, ...) are compared with the images that they learn from" in said
    assert "1 rows (table2_cc12m256_base, ...) print a CLIPScore" in said


def test_rows_against_the_training_set_take_no_other_reference(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    flag = "--config.evaluation.reference=/val"
    for given, expected in ((flag, False), (f"imagenet:{flag}", False), (f"table9_*:{flag}", True)):
        assert sweep.main(["--rows", "table9_eps", "--print", "--", given]) == 0
        assert (flag in capsys.readouterr().out.splitlines()[-1]) == expected


def test_where_flags_go(capsys, monkeypatch):
    """Lists in place of the row's own; settings of evaluations to training where it makes some."""
    monkeypatch.chdir(ROOT)
    given = [
        "figure8_*:--steps=5,10",
        "--config.evaluation.every=50",
        "--config.evaluation.k=5",
        "--config.train.steps=9",
    ]
    assert sweep.main(["--rows", "figure8_base", "--print", "--", *given]) == 0
    train, evaluate = capsys.readouterr().out.splitlines()[-2:]
    assert train.endswith("--config.evaluation.every=50 --config.evaluation.k=5 --config.train.steps=9")
    lists = "--steps=5,10,15,25,50,100,200 --steps=5,10"  # the last of a flag counts
    assert evaluate.endswith(" ".join([lists, *given[1:3]]))
    assert sweep.main(["--rows", "figure8_base", "--print", "--", *given[2:]]) == 0
    assert "evaluation" not in capsys.readouterr().out.splitlines()[-2]


def test_printed_commands_are_those_that_a_sweep_runs(capsys, monkeypatch, tmp_path):
    rest = ["--workdir", str(tmp_path), "--stores", "/s", "--", "--config.train.steps=3", "--config.evaluation.k=5"]
    monkeypatch.chdir(ROOT)
    assert sweep.main(["--rows", "figure10_base", "--print", *rest]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    run, start = tmp_path / "figure10_base", tmp_path / "pretrain_eps"
    assert lines[2:] == [
        f"lpl train --config=paper:figure10_base --workdir={run} --config.train.init_from={start} "
        "--config.data.store=/s/512_sdxl-vae --config.train.steps=3",
        f"lpl eval --workdir={run} --weights=0.999,0.9995,0.99975,0.9999,0.99995 --config.evaluation.k=5",
    ]
    called = []

    def fake(command):
        called.append(command)
        Path(tmp_path / "pretrain_eps").mkdir(exist_ok=True)
        run.mkdir(exist_ok=True)
        return 0

    monkeypatch.setattr(sweep.stopping, "call", fake)
    assert sweep.main(["--rows", "figure10_base", *rest]) == 0
    assert [" ".join(["lpl", *command[3:]]) for command in called] == lines
    called.clear()
    assert sweep.main(["--rows", "figure10_base", *rest]) == 0  # training says itself that it is done
    assert [command[3] for command in called] == ["train", "train"]
    called.clear()
    rest[-1] = "--config.evaluation.kk=5"
    with pytest.raises(InputError, match="pretrain_eps: config.evaluation has no field 'kk'"):
        sweep.main(["--rows", "figure10_base", *rest])
    assert not called


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
    assert " --weights=all " in evaluate
    assert evaluate.endswith("--config.evaluation.k=5 --config.evaluation.reference=/i")
    assert train_text.endswith(f"--config.data.store=/s/cc12m_256_{asymmetric} --config.text.dtype=float32")
    assert evaluate_text.endswith("--config.evaluation.k=5 --config.evaluation.reference=/c")
    with pytest.raises(InputError, match="is of data set 'cc3m' or has such a name"):
        sweep.main(["--rows", "table2_*", "--print", "--", "cc3m:--config.evaluation.k=5"])


def test_flags_for_rows_by_name(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    flag = "table5_latent_lpips*:--config.comparison.network=FILE"
    assert sweep.main(["--rows", "table5_*", "--workdir", str(tmp_path), "--print", "--", flag]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lpl train")]
    given = [line for line in lines if line.endswith("--config.comparison.network=FILE")]
    assert len(lines) == 8 and [line.split()[3].rsplit("/", 1)[1] for line in given] == [
        "table5_latent_lpips", "table5_latent_lpips_gated"
    ]  # fmt: skip


def test_a_sweep_stops_where_a_run_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep.stopping, "call", lambda command: 130)
    arguments = ["--rows", "pretrain_v", "--config", "paper", "--workdir", str(tmp_path)]
    assert sweep.main(arguments) == 130
    found = capsys.readouterr()
    assert "pretrain_v was stopped; call again to resume (status 130)" in found.err
    assert "(`pretrain_v`) |  | - | not run |" in found.out  # the tables are made all the same
    monkeypatch.setattr(sweep.stopping, "call", lambda command: 2)
    assert sweep.main(arguments) == 2
    assert "pretrain_v failed; what is done is kept (status 2)" in capsys.readouterr().out


def write(run, fid, name="step10", **made):
    made = {"checkpoint.step": 10, "resolution": 16} | made
    card = Card({"fid": Metric(fid)}, {}, made, cards.context(["python"]))
    cards.write_card(card, run / "evaluation" / name)
    images = np.full((3, 16, 16, 3), (int(10 * fid), 0, 99), np.uint8)  # a colour that no letter has
    np.save(run / "evaluation" / name / cards.SAMPLES, images)


def collect(tmp_path, *names):
    rows = ["--rows", *names] if names else []
    assert sweep.main([*rows, "--config", "paper", "--workdir", str(tmp_path), "--collect"]) == 0
    with (tmp_path / "results.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_results_stand_beside_the_printed_ones(tmp_path, capsys):
    write(tmp_path / "depth_uniform", 4.4)
    write(tmp_path / "table3_eps_base", 5.0)  # the run of table5_l2, which the row is compared with
    write(tmp_path / "table4_50k_base", 4.0)
    write(tmp_path / "table4_50k_lpl", 3.5)
    rows = collect(tmp_path, "depth_uniform", "table4_50k_*", "figure6_tau20")
    shown = capsys.readouterr().out
    assert "| Sec. 4.3, equal depth weights (`depth_uniform`) | 4.38 / 4.4 (-0.6) |" in shown
    assert "| Table 4, after 50k steps, with LPL (`table4_50k_lpl`) | (-0.78) / 3.5 (-0.5) |" in shown
    assert "(`figure6_tau20`) | - / - | - / - | - / - | - / - | - / - | - | not run |" in shown
    assert "(`table6_base`) | 4.88 / 5 |" in shown  # what else is there
    assert rows["depth_uniform"]["paper_fid"] == "4.38" and rows["depth_uniform"]["fid"] == "4.4"
    assert float(rows["table4_50k_lpl"]["change_fid"]) == -0.5
    assert rows["table4_50k_lpl"]["paper_change_coverage"] == "0.0351"


def test_what_was_made_in_another_way_is_no_baseline(tmp_path, capsys):
    write(tmp_path / "table4_50k_base", 4.0, "a", num_images=8)
    write(tmp_path / "table4_50k_base", 5.0, "b", num_images=16)
    write(tmp_path / "table4_50k_base", 6.0, "c", num_images=16, **{"reference.images": "other"})
    write(tmp_path / "table4_50k_lpl", 3.5, num_images=16)
    assert float(collect(tmp_path)["table4_50k_lpl"]["change_fid"]) == -1.5
    write(tmp_path / "table4_50k_lpl", 3.5, num_images=32)
    assert not collect(tmp_path)["table4_50k_lpl"].get("change_fid")


def test_the_table_names_the_average_and_compares_each_row_at_its_own(tmp_path, capsys):
    """LPL's own average with the baseline's; any other with the same."""
    for row, values in (
        ("table5_l2", {"0.9999": 5.0, "0.99975": 5.5}),
        ("depth_uniform", {"0.9999": 4.5, "0.99975": 4}),
    ):
        for weights, fid in values.items():
            write(tmp_path / row, fid, weights, **{"checkpoint.weights": weights})
    collect(tmp_path, "depth_uniform")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "(`depth_uniform`)" in line]
    assert [(line[1], line[-2]) for line in lines] == [("4.38 / 4 (-1)", "0.99975 *"), ("4.38 / 4.5 (-0.5)", "0.9999")]


def test_fluctuation_between_checkpoints_is_tabled(tmp_path, capsys):
    """The zigzag of one row, and the straight line of the other."""
    for row, values in (("figure15_base", (9, 5, 7, 3)), ("figure15_lpl", (8, 6, 4, 2))):
        for step, fid in enumerate(values, 1):
            made = {"checkpoint.step": step, "checkpoint.weights": "0.9999"}
            write(tmp_path / row, fid, f"{row}{step}", **made)
    collect(tmp_path, "figure15_*")
    shown = capsys.readouterr().out
    assert "| figure15_base | 0.9999 | fid | 4 | 3.33 (" in shown
    with (tmp_path / "fluctuation.csv").open() as file:
        base, lpl = csv.DictReader(file)
    assert (float(base["deviation"]), float(lpl["change"]), float(lpl["deviation"])) == (3, 2, 0)


def drawn(monkeypatch):
    """What is drawn: name of the picture -> (points, axis, dashed lines)."""
    calls = {}

    def record(points, path, axis, *, levels):
        calls[path.stem] = [(*settings.values(), card.metrics["fid"].value) for settings, card in points], axis, levels
        sweep_draw(points, path, axis, levels=levels)

    sweep_draw = collect_results.draw
    monkeypatch.setattr(collect_results, "draw", record)
    return calls


def test_rows_at_places_are_a_figure(tmp_path, monkeypatch):
    calls = drawn(monkeypatch)
    for tau, fid in (("1", 5.0), ("4.5", 4.0), ("inf", 3.5)):
        write(tmp_path / f"figure6_tau{tau}", fid)
    write(tmp_path / "table5_l2", 4.9)
    write(tmp_path / "figure6_tau4.5", 7.0, "step10_few", num_images=8)
    write(tmp_path / "figure6_tau6", 7.0, "step10_few", num_images=8)
    collect(tmp_path, "figure6_*")
    points, axis, levels = calls["figure6"]
    assert points == [("1", 5.0), ("4.5", 4.0), ("inf", 3.5)] and axis == "tau at 512 px"
    assert {name: card.metrics["fid"].value for name, card in levels.items()} == {"table5_l2": 4.9}
    assert (tmp_path / "figure6.png").stat().st_size > 1000
    with Image.open(tmp_path / "figure6_samples.png") as picture:
        pixels = np.asarray(picture)
    found = [value for value in (50, 40, 35) if (pixels == (value, 0, 99)).all(-1).sum() == 3 * 16 * 16]
    assert found == [50, 40, 35]


def test_evaluations_of_lists_are_a_figure(tmp_path, monkeypatch):
    """A line for each row, and for each average where these are listed too."""
    calls = drawn(monkeypatch)
    for step in (9, 10, 100):
        for weights in ("0.9999", "params"):
            made = {"checkpoint.step": step, "checkpoint.weights": weights}
            write(tmp_path / "figure18_lpl", step / 10, f"{step}{weights}", **made)
    write(tmp_path / "figure18_base", 2.0, "0", **{"checkpoint.weights": "params"})
    collect(tmp_path, "figure18_*")
    points, axis, levels = calls["figure18"]
    assert axis == "checkpoint" and not levels
    assert points[0] == ("figure18_base", 10, "params", 2.0)
    assert [point[1:3] for point in points[1:]] == [
        (9, "params"), (9, "0.9999"), (10, "params"), (10, "0.9999"), (100, "params"), (100, "0.9999")
    ]  # fmt: skip


def test_values_of_a_list_are_compared_with_their_counterparts(tmp_path, capsys):
    for guidance, fid in ((1.0, 5.0), (1.25, 4.0), (10.0, 3.5)):
        name = f"g{guidance:g}"
        write(tmp_path / "figure19", fid, name, **{"sampling.guidance": guidance})
    for steps, fid in ((5, 5.0), (25, 4.0), (100, 3.0)):
        write(tmp_path / "figure8_base", fid, f"s{steps}", **{"sampling.steps": steps})
        write(tmp_path / "figure8_lpl", fid - 0.5, f"s{steps}", **{"sampling.steps": steps})
    collect(tmp_path, "figure19", "figure8_*")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "Fig." in line]
    assert [line[-1].rstrip(" |") for line in lines] == [*2 * ["s5", "s25", "s100"], "g1", "g1.25", "g10"]
    assert [line[1] for line in lines[3:6]] == ["- / 4.5 (-0.5)", "- / 3.5 (-0.5)", "- / 2.5 (-0.5)"]


def test_documented_list_is_the_list(capsys):
    assert sweep.main(["--list", "--config", "paper"]) == 0
    listed = capsys.readouterr().out
    assert listed in (ROOT / "docs/paper.md").read_text()
    assert all(f"`{name}`" in listed for name in paper.ROWS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no experiments given"),
        (["--rows", "x", "--config", "none.py"], "none.py: no such file"),
        (["--rows", "x", "--", "steps=3"], "after -- come flags"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        sweep.main(arguments if "--config" in arguments else [*arguments[:2], "--config", "paper", *arguments[2:]])
