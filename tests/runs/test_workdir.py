"""The folder of a run: what is written into it, and what is refused when it is resumed."""

import json
import os

import pytest

from lpl_jax.data.store import StoreIdentity
from lpl_jax.errors import InputError
from lpl_jax.experiment import build
from lpl_jax.runs.workdir import Inputs, check_same_inputs, check_same_run, read_experiment, run_folder, write_config


def test_a_config_is_written_once(tmp_path, tiny_config):
    experiment = build(tiny_config())
    write_config(experiment, tmp_path)
    path = tmp_path / "config.json"
    os.utime(path, ns=(1, 1))
    write_config(experiment, tmp_path)
    assert path.stat().st_mtime_ns == 1
    assert read_experiment(tmp_path) == experiment
    write_config(build(tiny_config(train__steps=7)), tmp_path)
    assert json.loads(path.read_text())["train"]["steps"] == 7


@pytest.mark.parametrize("name", ["config.json", "given.json", "inputs.json"])
def test_what_stands_in_place_of_a_file_is_replaced_whatever_its_bytes(name, tmp_path, tiny_config):
    config = tiny_config()

    def write():
        write_config(build(config), tmp_path, config.to_dict(), BEGUN)
        return (tmp_path / name).read_bytes()

    content = write()
    (tmp_path / name).write_bytes(content.decode().encode("utf-16") + bytes(range(256)))
    assert write() == content


def test_s3_is_no_place_for_a_run():
    with pytest.raises(InputError, match="--workdir=s3://bucket/run: possible are local paths, gs://BUCKET/...$"):
        run_folder("s3://bucket/run")


def test_a_changed_config_is_said_in_the_words_that_the_user_changed(tmp_path, tiny_config, with_lpl):
    """A preset stands for a dozen fields."""
    before, now = tiny_config(**with_lpl), tiny_config(**with_lpl | {"lpl__preset": "reference"})
    write_config(build(before), tmp_path, before.to_dict())
    with pytest.raises(InputError) as caught:
        check_same_run(build(now), tmp_path, now.to_dict())
    assert str(caught.value) == (
        f"{tmp_path} holds a run with another config: lpl.preset: was 'paper', now 'reference'; give another --workdir"
    )
    now.lpl.preset, now.train.steps = "paper", 99
    check_same_run(build(now), tmp_path, now.to_dict())


def test_a_changed_config_of_a_run_that_has_not_kept_what_was_given_is_named_by_its_fields(
    tmp_path, tiny_config, with_lpl
):
    before, now = tiny_config(**with_lpl), tiny_config(**with_lpl | {"lpl__preset": "reference"})
    write_config(build(before), tmp_path)
    with pytest.raises(InputError, match=r"another config: lpl\.\w+: was .* and \d+ more; give another --workdir$"):
        check_same_run(build(now), tmp_path, now.to_dict())


def identity(records="r", images="i", finished=True, source="folder a"):
    return StoreIdentity(records, images, finished, source)


BEGUN = Inputs(identity(), autoencoder="a", text="t", comparison="c")


@pytest.mark.parametrize(
    "now",
    [
        BEGUN,
        BEGUN._replace(store=identity(source="folder b")),
        BEGUN._replace(store=identity(records="encoded again")),
        BEGUN._replace(store=identity(images=None)),
        BEGUN._replace(comparison=None),
    ],
)
def test_a_run_is_resumed_on_the_same_images_wherever_they_are(tmp_path, tiny_config, now):
    write_config(build(tiny_config()), tmp_path, inputs=BEGUN)
    check_same_inputs(now, tmp_path)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            BEGUN._replace(store=identity("x", "y", source="folder b")),
            "was made of folder a, .* made of folder b; give",
        ),
        (BEGUN._replace(store=identity("x", "y")), "made of folder a, this one is made of folder a, as it is now;"),
        (BEGUN._replace(store=identity("x", None)), "begun on other images"),
        (BEGUN._replace(autoencoder="b"), "begun with another autoencoder \\(weights a, now b\\)"),
        (BEGUN._replace(text="u"), "begun with another text tower"),
        (BEGUN._replace(comparison="d"), "begun with another network of the comparison"),
    ],
)
def test_a_run_is_not_resumed_on_other_images_or_networks(tmp_path, tiny_config, now, message):
    write_config(build(tiny_config()), tmp_path, inputs=BEGUN)
    with pytest.raises(InputError, match=message):
        check_same_inputs(now, tmp_path)


def test_a_store_may_grow_while_a_run_learns_from_it(tmp_path, tiny_config):
    write_config(build(tiny_config()), tmp_path, inputs=BEGUN._replace(store=identity("few", "i", False)))
    check_same_inputs(BEGUN, tmp_path)
    older = BEGUN._replace(store=identity("few", None, False))
    write_config(build(tiny_config()), tmp_path, inputs=older)
    check_same_inputs(BEGUN, tmp_path)
