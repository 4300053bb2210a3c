"""Folders from the hub: what is asked for, and one clear line where it is not to be had."""

import hashlib
import time

import pytest

from lpl_jax import autoencoders, denoisers, text
from lpl_jax.errors import InputError
from lpl_jax.io import hub
from lpl_jax.io.hub import HubId, fetch, find, hub_id, is_hub_id, pinned


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub whose repositories hold what its dict says; returns (files, the patterns that were asked for).

    A repository at a revision is another key, "owner/name@REVISION". The cache is laid out as the hub's own.
    """
    files, asked = {}, []

    def snapshot_download(repository, revision=None, allow_patterns=()):
        asked.append(list(allow_patterns))
        key = repository if revision is None else f"{repository}@{revision}"
        root = tmp_path / repository.replace("/", "--") / "snapshots" / commit_of(revision)
        for pattern in allow_patterns:
            for name in files.get(key, ()):
                place = root / name
                if place.relative_to(root).match(pattern) and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text("{}")
        return str(root)

    hub._tell_once.cache_clear()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return files, asked


def commit_of(revision):
    return hashlib.sha1(str(revision).encode()).hexdigest()


def test_only_the_named_files_of_the_subfolder_are_fetched(served, tmp_path):
    files, asked = served
    files["some/one"] = ["part/model.safetensors", "part/config.json", "part/model.bin", "other/model.safetensors"]
    folder = fetch("some/one", ("config.json", "model*.safetensors"), subfolder="part", unless_there=("*.bin",))
    assert folder == tmp_path / "some--one/snapshots" / commit_of(None) / "part"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert asked == [["part/config.json", "part/model*.safetensors"]]


def test_pickles_are_fetched_only_where_there_is_nothing_else(served):
    files, asked = served
    files["some/one"] = ["config.json", "model.bin"]
    folder = fetch("some/one", ("config.json", "model*.safetensors"), unless_there=("*.bin",))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]
    assert asked[1] == ["*.bin"]


def test_what_reads_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "here").mkdir(parents=True)
    assert hub_id("owner/name") == HubId("owner/name", None)
    assert hub_id("owner/name@v1.0") == HubId("owner/name", "v1.0")
    assert hub_id("owner/name@refs/pr/3") == HubId("owner/name", "refs/pr/3")
    for source in (
        "runs/here",
        "./owner/name",
        "/owner/name",
        "~/name",
        "name",
        "a/b/c",
        "a/b@",
        "a/b@c@d",
        "a/b.bin",
        "gs://a/b",
        tmp_path,
    ):
        assert not is_hub_id(source)
    assert find("runs/here", (), "inside") == find("runs", (), "here") / "inside"


@pytest.mark.parametrize("load", [denoisers.load, text.load, text.Tokenizer.load])
def test_hub_ids_without_network_are_one_clear_line(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is neither a folder nor to be had from the hub"):
        load("nobody/nothing")


@pytest.mark.parametrize("load", [denoisers.load, text.load, text.Tokenizer.load])
def test_loaders_ask_for_safetensors_and_json_alone(load, served):
    _, asked = served
    with pytest.raises(InputError):  # the repository is empty
        load("some/one", subfolder="inside")
    assert asked and all(pattern.startswith("inside/") for pattern in asked[0])
    assert not any(pattern.endswith((".bin", "*", ".pth")) and "safetensors" not in pattern for pattern in asked[0])


def test_a_revision_is_pinned_and_said(served, capsys):
    """A line says which commit a revision is, and what was fetched; once more only what is here already."""
    files, _ = served
    files["some/one@v1"] = ["config.json", "model.safetensors"]
    commit = commit_of("v1")
    for _ in range(3):
        folder = fetch("some/one@v1", ("config.json", "model*.safetensors"))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        time.sleep(3 * hub.CLOCK)
    assert pinned("some/one@v1", folder) == f"some/one@{commit}" and pinned(folder, folder) == str(folder)
    assert capsys.readouterr().out.splitlines() == [
        f"hub: some/one@v1 is commit {commit}; fetched 2 files, 0.0 MB",
        f"hub: some/one@v1 is commit {commit}; nothing fetched",
    ]


@pytest.mark.parametrize("load", [autoencoders.load, denoisers.load, text.load, text.Tokenizer.load])
def test_every_loader_takes_a_revision(load, monkeypatch):
    seen = []

    def snapshot_download(repository, **options):
        seen.append((repository, options["revision"]))
        raise OSError("no such revision")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="'some/one@v1' is neither a folder nor to be had from the hub: no such rev"):
        load("some/one@v1")
    assert seen == [("some/one", "v1")]


def test_a_store_says_which_commit_its_autoencoder_is(served, tmp_path, monkeypatch):
    files, _ = served
    bundled = autoencoders.load("bundled")
    autoencoders.save(bundled, tmp_path / "made")
    files["some/vae"] = [path.name for path in (tmp_path / "made").iterdir()]
    root = fetch("some/vae", ("*",))
    for path in (tmp_path / "made").iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    assert autoencoders.load("some/vae").config.name == f"some/vae@{commit_of(None)}"
