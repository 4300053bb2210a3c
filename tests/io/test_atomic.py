import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import lpl_jax
from lpl_jax.errors import InputError
from lpl_jax.io.atomic import (
    atomic_open,
    atomic_path,
    check_free,
    write_csv,
    write_json,
    write_text,
)
from lpl_jax.io.npy import write_npz
from lpl_jax.io.paths import to_path


def make_folder(path):
    path.mkdir()
    (path / "inside").write_text("x")


def test_a_path_gets_its_name_at_the_end(tmp_path):
    for path, make in ((tmp_path / "a/file", lambda path: path.write_text("x")), (tmp_path / "folder", make_folder)):
        with atomic_path(path) as partial:
            make(partial)
            assert partial.parent == path.parent and not path.exists()
            assert partial.name.startswith(f".{path.name}.{os.getpid()}-") and partial.suffix == ".partial"
        assert path.exists() and not partial.exists()


def test_what_fails_leaves_nothing(tmp_path):
    for make in (make_folder, lambda path: path.write_text("x"), lambda path: None):
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "path") as partial:
            make(partial)
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next_that_writes_there(tmp_path):
    begin = "import os, sys; from pathlib import Path; from lpl_jax.io.atomic import atomic_path\n"
    begin += "with atomic_path(Path(sys.argv[1])) as partial:\n    partial.write_text('half'); os._exit(9)"
    root = Path(lpl_jax.__file__).parents[1]
    for name in ("it", "another"):
        subprocess.run([sys.executable, "-c", begin, str(tmp_path / name)], cwd=root, check=False)
    (left,) = tmp_path.iterdir()  # the second has removed what the first has left
    others = tmp_path / re.sub(r"\.\d+-[0-9a-f]{8}", ".1-00000000", left.name)  # of another host, which may be at it
    old = tmp_path / f".x{others.name}"
    for path in (others, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    with atomic_path(tmp_path / "mine") as partial:
        partial.write_text("x")
        write_text(tmp_path / "other", "y")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "other", others.name}


def test_what_appears_in_the_meantime_is_kept(tmp_path):
    with pytest.raises(InputError, match="path exists"), atomic_path(tmp_path / "path") as partial:
        partial.write_text("mine")
        (tmp_path / "path").write_text("theirs")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    check_free(tmp_path / "empty")
    for name in ("link", ""):
        with pytest.raises(InputError, match="exists: nothing is overwritten"):
            check_free(tmp_path / name)
    with atomic_path(tmp_path / "empty") as partial:
        make_folder(partial)
    assert (tmp_path / "empty/inside").exists()


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    if request.param == "local":
        return tmp_path / "here"
    request.getfixturevalue("bucket")
    return to_path("gs://bucket/there", remote=True)


def test_an_old_file_stays_until_the_new_one_is_complete(folder):
    path = folder / "deep" / "notes.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_open(path, "w") as file:
        file.write("half of the n")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    write_text(path, "new, ä")
    assert path.read_text(encoding="utf-8") == "new, ä"
    assert [file.name for file in path.parent.iterdir()] == ["notes.txt"]


def test_what_is_written_is_read_back(folder):
    write_json(folder / "a.json", {"b": [1, 2]})
    assert json.loads((folder / "a.json").read_text()) == {"b": [1, 2]}
    write_csv(folder / "a.csv", [{"x": 1, "y": "a,b"}, {"x": 2, "z": ""}])
    assert (folder / "a.csv").read_text() == 'x,y,z\n1,"a,b",\n2,,\n'
    for compressed in (False, True):
        write_npz(folder / "a.npz", {"x": np.arange(3)}, compressed=compressed)
        with (folder / "a.npz").open("rb") as file:
            np.testing.assert_array_equal(np.load(file)["x"], np.arange(3))


def test_a_folder_is_made_here_and_there(folder):
    with atomic_path(folder / "made") as partial:
        make_folder(partial)
    assert (folder / "made" / "inside").read_text() == "x"
    with pytest.raises(InputError, match="made exists"), atomic_path(folder / "made"):
        pass


def test_threads_do_not_take_each_others_names(tmp_path):
    def write(text):
        for _ in range(20):
            write_text(tmp_path / "file", text)

    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in {letter * 1000 for letter in "abcd"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_is_written_to_not_replaced():
    write_text("/dev/null", "x")
    assert Path("/dev/null").is_char_device()
