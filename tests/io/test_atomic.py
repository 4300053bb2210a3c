import pytest

from lpl_jax.errors import InputError
from lpl_jax.io.atomic import check_free, written_whole


def test_a_place_gets_its_name_at_the_end(tmp_path):
    for place, make in ((tmp_path / "a/file", lambda path: path.write_text("x")), (tmp_path / "folder", mkdir)):
        with written_whole(place) as partial:
            make(partial)
            assert partial.parent == place.parent and not place.exists()
        assert place.exists() and not partial.exists()


def mkdir(path):
    path.mkdir()
    (path / "inside").write_text("x")


def test_what_fails_leaves_nothing(tmp_path):
    for make in (mkdir, lambda path: path.write_text("x"), lambda path: None):
        with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "place") as partial:
            make(partial)
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []


def test_what_appears_in_the_meantime_is_kept(tmp_path):
    with pytest.raises(InputError, match="place exists"), written_whole(tmp_path / "place") as partial:
        partial.write_text("mine")
        (tmp_path / "place").write_text("theirs")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    check_free(tmp_path / "empty")
    for name in ("link", ""):
        with pytest.raises(InputError, match="exists: nothing is written over"):
            check_free(tmp_path / name)
    with written_whole(tmp_path / "empty") as partial:
        mkdir(partial)
    assert (tmp_path / "empty/inside").exists()
