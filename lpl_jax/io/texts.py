"""Text that users bring: captions, json beside images, lists of prompts. One rule says how its bytes become text.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one. Whatever does not decode, and whatever was decoded
wrongly before it came here, is refused: a guess would put other words into a store without saying so.
"""

import codecs
import re

from lpl_jax.errors import InputError

MARKS = {  # UTF-32's comes first: UTF-16's is its beginning
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NO_TEXT = {
    "\0": "a NUL character (UTF-16 without a byte order mark?)",
    "\ufffd": "U+FFFD, which stands for what somebody could not decode",
}


def decode_text(content: bytes, name: str) -> str:
    """The text of a file: without its byte order mark, each end of a line a newline.

    Raises:
      InputError: another encoding, or no text (see `check_text`); names the file, the line and the byte.
    """
    encoding = next((found for mark, found in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(encoding, "ignore").count("\n") + 1
        place = len(content) - len(error.object) + error.start + 1
        kind = encoding.removesuffix("-sig").upper()
        raise InputError(
            f"{name}: line {line}, byte {place}, is no {kind} ({error.reason}): needed: UTF-8, or UTF-16 or "
            "UTF-32 with a byte order mark"
        ) from None
    return check_text(text.replace("\r\n", "\n").replace("\r", "\n"), name)


def check_text(text: str, name: str) -> str:
    """The text itself.

    Raises:
      InputError: it holds a NUL, a replacement character (U+FFFD) or half of a surrogate pair; names the line.
    """
    if found := re.search("[\0\ufffd\ud800-\udfff]", text):
        what = NO_TEXT.get(found[0], f"half of a surrogate pair (U+{ord(found[0]):04X})")
        line = text.count("\n", 0, found.start()) + 1
        raise InputError(f"{name}: line {line} holds {what}")
    return text


def not_downloaded(head: bytes) -> str | None:
    """What a file is, by its first bytes, that was to be downloaded and was not, in words; None for anything else."""
    head = head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run git lfs pull, or download it again"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself: download it again"
    return None
