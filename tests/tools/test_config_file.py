"""Config files, where they are found, and what a command line changes in them."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from lpl_jax.configs import base, imagenet
from lpl_jax.errors import InputError
from lpl_jax.tools import config_file

TEXTS = {
    int: ("3", 3),
    float: ("0.5", 0.5),
    bool: ("True", True),
    str: ("None of these", "None of these"),
    object: ("rgb", "rgb"),
}
OWN = """
import dataclasses
from lpl_jax.configs import base

@dataclasses.dataclass
class Row:
    steps: int = 5

def get_config(arguments="none"):
    config = base.get_config()
    config.data.source, config.train.steps = arguments, Row().steps
    return config
"""


def fields(config, path=""):
    """Dotted name -> (value or reference, type) of all fields."""
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, config.get_type(name)


FIELDS = {name: (value, kind) for name, value, kind in fields(base.get_config())}
OPTIONAL = [name for name, (value, _) in FIELDS.items() if isinstance(value, FieldReference)]


def changed(field, *texts, config=None):
    """The field's value with --config.FIELD=TEXT for each text."""
    config = config_file.override(config or base.get_config(), [f"--config.{field}={text}" for text in texts])
    for part in field.split("."):
        config = config[part]
    return config


def test_every_type_of_optional_field_is_there():
    assert {FIELDS[name][1] for name in OPTIONAL} == {int, float, bool, str, object}


@pytest.mark.parametrize("field", OPTIONAL)
def test_optional_fields_are_set_and_unset(field):
    text, value = TEXTS[FIELDS[field][1]]
    assert changed(field, text) == value
    for nothing in ("None", ""):
        assert changed(field, nothing) is None
        assert changed(field, text, nothing) is None, "the last one counts"
        assert changed(field, nothing, text) == value


@pytest.mark.parametrize("field", [name for name in FIELDS if name not in OPTIONAL])
def test_other_fields_need_a_value(field):
    for nothing in ("None", ""):
        with pytest.raises(
            InputError, match=rf"^config\.{field}={nothing} is not possible: it needs a value, such as "
        ):
            changed(field, nothing)


def test_a_field_that_a_config_file_sets_can_be_unset():
    config = imagenet.get_config("512,lpl")
    assert config.model.remat == "full" and changed("model.remat", "None", config=config) is None
    config = ConfigDict({"here": {"value": placeholder(float)}})
    config.here.value = 2
    assert changed("here.value", "", config=config) is None


def test_an_optional_field_with_a_default_can_be_unset():
    assert base.get_config().optimizer.clip_norm == 1
    assert changed("optimizer.clip_norm", "None") is None and changed("optimizer.clip_norm", "2") == 2


def test_tuples_and_values_of_several_types():
    assert changed("ema.decays", "(0.5, 0.9)") == changed("ema.decays", "0.5", "0.9") == (0.5, 0.9)
    assert changed("ema.decays", "()") == ()
    assert changed("lpl.taps", "3") == 3 and changed("lpl.taps", "rgb") == "rgb"
    assert changed("loss.lpl_capacity", "8") == "8"
    assert changed("seed", "3") == 3
    assert changed("data.source", "a=b") == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepps=3", "config.train has no field 'stepps' (did you mean steps?)"),
        ("trian.steps=3", "config has no field 'trian' (did you mean train?)"),
        ("train.learning_rate=3", "config.train has no field 'learning_rate' (did you mean config.optimizer.learning_"),
        ("weight_decay=0", "config has no field 'weight_decay' (did you mean config.optimizer.weight_decay?)"),
        ("nothing=0", "config has no field 'nothing'; possible: autoencoder, checkpoint, comparison, data, "),
        ("train=3", "config.train is a section: give config.train.FIELD=VALUE, FIELD one of accumulate, "),
        ("train.steps.x=3", "config.train.steps is a value, it has no field 'x'"),
        ("train.steps=many", "config.train.steps=many is not possible: it must be a whole number"),
        ("lpl.tau=high", "config.lpl.tau=high is not possible: it must be a number"),
        ("data.unfinished=maybe", "config.data.unfinished=maybe is not possible: it must be True or False"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(InputError) as caught:
        config_file.override(base.get_config(), [f"--config.{override}"])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_configs_are_found_here_and_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = config_file.PACKAGE / "imagenet.py"
    names = ("imagenet", "imagenet.py", "configs/imagenet", "configs/imagenet.py")
    assert all(config_file.find(name) == package for name in names)
    own = Path("configs/imagenet.py")
    own.parent.mkdir()
    own.write_text("")
    assert all(config_file.find(name) == own for name in names)
    Path("imagenet.py").write_text("")
    assert config_file.find("imagenet") == Path("imagenet.py") and config_file.find(names[3]) == own
    assert config_file.find(str(tmp_path / "imagenet")) == tmp_path / "imagenet.py"
    with pytest.raises(InputError, match=r"^config file imagenett: no such file \(did you mean imagenet\?\)$"):
        config_file.find("imagenett")


def test_arguments_and_overrides_reach_the_config(tmp_path):
    assert config_file.load("imagenet:512,lpl", ["--config.train.steps=7"]).train.steps == 7
    file = tmp_path / "own.py"
    file.write_text(OWN)
    for arguments, expected in (("", "none"), (":a,b", "a,b"), (":", "")):
        config = config_file.load(f"{file}{arguments}")
        assert (config.data.source, config.train.steps, config.is_locked) == (expected, 5, True)


def test_remote_files_are_refused():
    with pytest.raises(InputError, match="^--config gs://bucket/config.py is remote; it takes local files only$"):
        config_file.load("gs://bucket/config.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("def get_config( 3", "fails: SyntaxError"),
        ("def get_config(): return 3", "get_config returns int, not a ConfigDict"),
        ("config = 3", "has no function get_config"),
        ("import nowhere_to_be_found", "fails: ModuleNotFoundError"),
    ],
)
def test_files_that_are_no_configs(text, message, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(InputError, match=rf"own.py:? {message}"):
        config_file.load(str(tmp_path / "own.py"))


def test_a_hyphen_in_the_name_of_a_field_is_an_underscore():
    config = config_file.override(base.get_config(), ["--config.checkpoint.on-damage=previous"])
    assert config.checkpoint.on_damage == "previous"
