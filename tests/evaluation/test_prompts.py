import pytest

from lpl_jax.errors import InputError
from lpl_jax.evaluation.prompts import read_prompts

LINES = ("a café, “open”", "two words  on a page", "a 🐈")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompts_are_lines_whatever_editor_wrote_them(tmp_path, encoding, end):
    path = tmp_path / "prompts.txt"
    for last in (end, ""):
        path.write_bytes((end.join(LINES) + last).encode(encoding))
        assert read_prompts(path).lines == LINES
    path.write_bytes("a photo\u2028of a\x0ccat\x85\n".encode())
    assert read_prompts(path).lines == ("a photo\u2028of a\x0ccat\x85",), "other marks end no line"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is empty"),
        (b"a\n\nb\n", "line 2 is empty: needed: one prompt on each line"),
        ("a\ncafé\n".encode("cp1252"), "prompts.txt: line 2, byte 6, is no UTF-8"),
        ("a\nb\n".encode("utf-16-le"), "line 1 holds a NUL character"),
        ("a\nb\ufffd\n".encode(), r"line 2 holds U\+FFFD"),
    ],
)
def test_what_are_no_prompts_is_refused_by_line(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_a_missing_or_huge_file_of_prompts_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(InputError, match="huge.txt: 4,294,967,296 bytes: at most 67,108,864 are read"):
        read_prompts(tmp_path / "huge.txt")
