"""Captions from all sources: what is decoded, what is refused, and how much memory that takes."""

import json
import types

import pytest
from image_kinds import encoded, smooth
from peak_memory import peak_growth

from lpl_jax.data import FolderSource, WebDatasetSource, tfds
from lpl_jax.data.examples import Skipped, work_units
from lpl_jax.errors import InputError

TEXT = "a café, “open” 🐈"
READ = {
    "clean": "utf-8",
    "bom": "utf-8-sig",
    "utf16": "utf-16",
    "utf32": "utf-32",
}
REFUSED = {
    "cp1252": ("a café".encode("cp1252"), "is no UTF-8"),
    "utf16-unmarked": ("a cat".encode("utf-16-le"), "NUL"),
    "nul": (b"a\0cat", "NUL"),
    "undecoded": ("a caf\ufffd".encode(), r"U\+FFFD"),
}


class Examples(list):
    dataset_info = types.SimpleNamespace(features={"image": None, "text": None}, full_name="examples")


def captions(source):
    """Caption or reason by name."""
    found = {}
    for item in (item for unit in work_units(source, 100) for item in unit.items()):
        if isinstance(item, Skipped):
            found[item.key.split("/")[-1]] = InputError(item.reason)
            continue
        try:
            (found[item.key.split("/")[-1].removesuffix(".png")],) = item.load().captions
        except InputError as error:
            found[item.key.split("/")[-1].removesuffix(".png")] = error
    return found


@pytest.fixture
def everywhere(tmp_path, tars, monkeypatch):
    """function(name -> bytes of a txt) -> way -> name -> caption or InputError: as txt and as a field of a json, beside
    the image, in a tar, and as a feature of TFDS."""

    def read(texts, jsons):
        members = []
        for folder in ("images", "tars"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name in jsons:
            parts = {"png": encoded(smooth()), "txt": texts.get(name, b"a cat"), "json": jsons[name]}
            for ending, content in parts.items():
                (tmp_path / "images" / f"{name}.{ending}").write_bytes(content)
                members.append((f"{name}.{ending}", content))
        (tmp_path / "tars/a.tar").write_bytes(tars.of(members))
        found = {}
        for column in ("txt", "caption"):
            found[f"folder {column}"] = captions(FolderSource(tmp_path / "images", 8, captions=(column,)))
            found[f"tar {column}"] = captions(WebDatasetSource(str(tmp_path / "tars"), 8, captions=(column,)))
        if texts:
            examples = Examples({"image": encoded(smooth()), "text": text} for text in texts.values())
            monkeypatch.setattr(tfds, "_open", lambda *_: examples)
            of_tfds = captions(tfds.TFDSSource("a", 8, captions=("text",)))
            found["tfds"] = dict(zip(texts, of_tfds.values(), strict=True))
        return found

    return read


def test_captions_are_read_whatever_editor_wrote_them(everywhere):
    texts = {name: TEXT.encode(encoding) for name, encoding in READ.items()} | {"crlf": f"{TEXT}\r\n".encode()}
    fields = json.dumps({"caption": TEXT}, ensure_ascii=False)
    jsons = {name: fields.encode(encoding) for name, encoding in READ.items()} | {"crlf": f"{fields}\r\n".encode()}
    for way, found in everywhere(texts, jsons).items():
        assert found == dict.fromkeys(texts, TEXT), way


def test_what_is_no_text_is_a_skip_with_its_reason_everywhere(everywhere):
    texts = {name: content for name, (content, _) in REFUSED.items()}
    jsons = {
        "cp1252": '{"caption": "a café"}'.encode("cp1252"),
        "utf16-unmarked": '{"caption": "a cat"}'.encode("utf-16-le"),
        "nul": json.dumps({"caption": "a\0cat"}).encode(),
        "undecoded": json.dumps({"caption": "a caf\ufffd"}).encode(),
    }
    for way, found in everywhere(texts, jsons).items():
        for name, (_, reason) in REFUSED.items():
            assert isinstance(found[name], InputError), way
            assert found[name].args[0].count("\n") == 0
            with pytest.raises(InputError, match=f"{name if way != 'tfds' else 'a/train/'}.*{reason}"):
                raise found[name]


def test_a_json_that_would_fill_memory_or_stack_is_a_skip(everywhere):
    jsons = {
        "deep": b"[" * 1_000_000,
        "deep-object": b'{"caption":' * 100_000,
        "long-number": b'{"caption": ' + b"9" * 5000 + b"}",
        "half-pair": b'{"caption": "a cat \\ud83d"}',
        "large": b'{"caption": "' + b"a" * 2**22 + b'"}',
    }
    for found in (everywhere({}, jsons)[way] for way in ("folder caption", "tar caption")):
        for name in ("deep", "deep-object", "long-number"):
            assert f"{name}" in str(found[name]) and "its json cannot be read" in str(found[name])
        assert "half of a surrogate pair (U+D83D)" in str(found["half-pair"])
        assert "4,194,304" in str(found["large"])


@pytest.mark.parametrize(("column", "ending"), [("txt", "txt"), ("caption", "json"), ("txt", "png")])
def test_huge_files_beside_small_ones_are_skips_that_take_no_memory(tmp_path, column, ending):
    """Sparse files of a gigabyte."""
    for name, content in {"a.png": encoded(smooth()), "a.txt": b"a cat", "a.json": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / f"a.{ending}").open("ab") as file:
        file.truncate(2**30)
    source, found = FolderSource(tmp_path, 8, captions=(column,)), {}
    growth = peak_growth(lambda: found.update(captions(source)))
    assert growth < 2**24 and f"a.{ending}: 1,073,741,824 bytes: at most" in str(found["a"])
