import os
from pathlib import Path

import pytest
from etils import epath

from lpl_jax.errors import InputError
from lpl_jax.io.atomic import write_text
from lpl_jax.io.copies import local_copy
from lpl_jax.io.paths import files_below, is_remote, size_of, to_path


def test_local_paths_are_pathlibs(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in (("a/b", "a/b"), ("/a", "/a"), ("~/a", "/home/me/a"), (".", "."), ("tfds:x", "tfds:x")):
        assert to_path(text) == to_path(Path(text)) == Path(expected)
        assert type(to_path(text)) is type(Path())
    with pytest.raises(InputError, match="--out=~nobody-here/x: "):
        to_path("~nobody-here/x", "--out")


def test_remote_paths_are_epaths(bucket):
    for text in ("gs://bucket/run", "s3://bucket/run", "GS://bucket/run"):
        path = to_path(text, remote=True)
        assert isinstance(path, epath.Path) and str(path) == text.replace("GS", "gs") and is_remote(path)
        assert str(path / "config.json") == f"{path}/config.json"
        assert to_path(path, remote=True) == path


def test_a_remote_path_that_was_a_pathlib_path_is_the_same(bucket):
    assert to_path(Path("gs://bucket/run"), remote=True) == to_path("gs://bucket/run", remote=True)


@pytest.mark.parametrize("make", [str, Path])
def test_where_remote_paths_are_not_possible_they_are_refused(make):
    with pytest.raises(InputError, match="gs://bucket/x is remote; data.data_dir takes local paths only"):
        to_path(make("gs://bucket/x"), "data.data_dir")


def test_other_kinds_are_refused(bucket):
    for text in ("memory://x", "https://host/x", "gs://", "gs:/", "file:///x"):
        with pytest.raises(InputError, match="--out=.*: possible are local paths, gs://BUCKET/... and s3://BUCKET"):
            to_path(text, "--out", remote=True)


def test_a_package_that_is_missing_is_named(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    with pytest.raises(InputError, match=r"gs://b/x: Please install gcsfs.*pip install 'lpl_jax\[remote\]'"):
        to_path("gs://b/x", remote=True)


def test_files_and_sizes_are_alike_here_and_there(bucket, tmp_path):
    for folder in (tmp_path / "here", to_path("gs://bucket/there", remote=True)):
        for name in ("b", "a/x", "a/c/y"):
            write_text(folder / name, name)
        assert [path.relative_to(folder).as_posix() for path in files_below(folder)] == ["a/c/y", "a/x", "b"]
        assert [size_of(path) for path in files_below(folder)] == [5, 3, 1]


def test_a_remote_file_is_copied_once_and_again_when_it_has_changed(bucket):
    path = to_path("s3://bucket/a.npz", remote=True)
    with pytest.raises(FileNotFoundError):
        local_copy(path)
    write_text(path, "first")
    copy = local_copy(path)
    assert copy.name == "a.npz" and copy.read_text() == "first"
    made = copy.stat().st_mtime_ns
    assert local_copy(path) == copy and copy.stat().st_mtime_ns == made
    write_text(path, "second")
    assert local_copy(path).read_text() == "second" and copy.read_text() == "first"
    assert local_copy(copy) == copy
    assert not [name for _, _, names in os.walk(copy.parents[1]) for name in names if name.endswith(".partial")]
