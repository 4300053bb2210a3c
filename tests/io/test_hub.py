"""Folders from the hub: what is asked for, and one clear line where it is not to be had."""

import pytest

from lpl_jax import denoisers, text
from lpl_jax.errors import InputError
from lpl_jax.io.hub import fetch, find, is_hub_id


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories hold what its dict says; returns (files, the patterns that were asked for)."""
    files, asked = {}, []

    def snapshot_download(hub_id, allow_patterns):
        asked.append(list(allow_patterns))
        for pattern in allow_patterns:
            for name in files.get(hub_id, ()):
                place = tmp_path / name
                if place.relative_to(tmp_path).match(pattern):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return files, asked


def test_only_the_named_files_of_the_subfolder_are_fetched(hub, tmp_path):
    files, asked = hub
    files["some/one"] = ["part/model.safetensors", "part/config.json", "part/model.bin", "other/model.safetensors"]
    folder = fetch("some/one", ("config.json", "model*.safetensors"), subfolder="part", unless_there=("*.bin",))
    assert folder == tmp_path / "part"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert asked == [["part/config.json", "part/model*.safetensors"]]


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub):
    files, asked = hub
    files["some/one"] = ["config.json", "model.bin"]
    folder = fetch("some/one", ("config.json", "model*.safetensors"), unless_there=("*.bin",))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]
    assert asked[1] == ["*.bin"]


def test_what_reads_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "here").mkdir(parents=True)
    assert is_hub_id("owner/name")
    for source in ("runs/here", "./owner/name", "/owner/name", "~/name", "name", "a/b/c", tmp_path):
        assert not is_hub_id(source)
    assert find("runs/here", (), "inside") == find("runs", (), "here") / "inside"


@pytest.mark.parametrize("load", [denoisers.load, text.load, text.Tokenizer.load])
def test_hub_ids_without_network_are_one_clear_line(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is neither a folder nor to be had from the hub"):
        load("nobody/nothing")


@pytest.mark.parametrize("load", [denoisers.load, text.load, text.Tokenizer.load])
def test_loaders_ask_for_safetensors_and_json_alone(load, hub):
    _, asked = hub
    with pytest.raises(InputError):  # the repository is empty
        load("some/one", subfolder="inside")
    assert asked and all(pattern.startswith("inside/") for pattern in asked[0])
    assert not any(pattern.endswith((".bin", "*", ".pth")) and "safetensors" not in pattern for pattern in asked[0])
