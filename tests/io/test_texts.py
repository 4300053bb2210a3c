import pytest

from lpl_jax.errors import InputError
from lpl_jax.io.texts import decode_text

TEXT = "a café, “open” 🐈\nsecond line"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
MARKED = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff", "utf-16-le": b"\xff\xfe"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", [*ENCODINGS, *MARKED])
def test_text_is_read_whatever_editor_wrote_it(encoding, end):
    content = MARKED.get(encoding, b"") + TEXT.replace("\n", end).encode(encoding)
    assert decode_text(content, "a.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\ncafé".encode("cp1252"), r"a.txt: line 2, byte 6, is no UTF-8 .*needed: UTF-8, or UTF-16"),
        ("\ufeffa\n".encode() + b"\xe9", r"line 2, byte 6, is no UTF-8"),
        ("a\nb".encode("utf-16") + b"\0", r"line 2, byte 9, is no UTF-16"),
        ("ab".encode("utf-16-le"), r"line 1 holds a NUL character \(UTF-16 without a byte order mark\?\)"),
        (b"a\nb\0", r"line 2 holds a NUL"),
        ("a caf\ufffd".encode(), r"line 1 holds U\+FFFD, which stands for what somebody could not decode"),
        (b"\xed\xa0\x80", r"byte 1, is no UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_by_name_line_and_byte(content, message):
    with pytest.raises(InputError, match=message):
        decode_text(content, "a.txt")
