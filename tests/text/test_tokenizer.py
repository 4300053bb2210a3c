"""The tokeniser against transformers' and open_clip's, on a vocabulary learnt here and on the published one."""

import collections
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import sys
import unicodedata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

import numpy as np
import pytest
import tokenizers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lpl_jax.errors import InputError
from lpl_jax.text import Tokenizer
from lpl_jax.text.tokenizer import EOS, WORD_END, vocabulary_of

HARD = [
    "",
    "   \t\n ",
    "a photo of a cat",
    "A PHOTO of  a\tCat\n\nand a dog ",
    "it's they'LL we've I'm don't he'd you're o'clock rock'n'roll 'quoted' ''s !'s",
    "12345 3.14 1,000 x² ½ Ⅷ 一二三 ٣٤ 2nd",
    '!!! ... #$%&*()[]{}<>?/\\|@^~`_-+=:;"',
    "snake_case and a_b __init__",
    "naïve café cafe\u0301 n\u0303 Å K ß ſ İstanbul ΣΑΣ ǅ ﬁne",
    "日本語 한국어 ไทย हिन्दी עברית العربية ﷺ 𝓐𝓑 𐐀",
    "😀 👩‍👩‍👧‍👦🇩🇪 ❤️ ಠ_ಠ",
    "zero\u200bwidth soft\u00adhyphen nbsp\u00a0nel\x85em\u2003wide\u3000line\u2028 \ufeff",
    "control \x00\x07\x1b sep\x1c\x1d\x1e\x1f end",
    "<b>bold</b> &amp; &lt;i&gt; &amp;lt; &eacute; &#233; fish&chips",
    "“curly” ‘quotes’ – dash … it’s",
    "before <|endoftext|> behind<|startoftext|>x <|ENDOFTEXT|>'s !<|endoftext|>",
    "<start_of_text> a <END_OF_TEXT> b",
    "word " * 120,
    "supercalifragilisticexpialidocious" * 5,
]


@pytest.fixture(scope="module")
def vocabulary():
    """Byte-pair merges learnt from a few sentences: number of the units, and the merges."""
    corpus = "the cat and the other cat sat on a photo of the naïve photographer it's they'll 's 've 😀 ... !! 2nd"
    corpus += " it's bold and quoted, a photo in the café, word for word of expialidocious superwords; the end of text"
    words = collections.Counter()
    units = bytes_to_unicode()
    for word in corpus.split():
        letters = [units[byte] for byte in word.encode()]
        words[(*letters[:-1], letters[-1] + WORD_END)] += 1
    merges = []
    while pairs := collections.Counter(pair for word in words.elements() for pair in itertools.pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = collections.Counter({_merged(word, best): count for word, count in words.items()})
    return vocabulary_of(merges), merges


def _merged(word, pair):
    out = []
    for unit in word:
        if out and (out[-1], unit) == pair:
            out[-1] += unit
        else:
            out.append(unit)
    return tuple(out)


@pytest.fixture(scope="module")
def folder(vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "vocab.json").write_text(json.dumps(vocabulary[0]))
    lines = ["#version: 0.2", *map(" ".join, vocabulary[1])]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def theirs_of(tokenizer, texts, length=77):
    out = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    return np.array(out["input_ids"])


def random_texts(count, seed=0):
    """Pieces of the hard texts and characters of all planes that this Python's Unicode tables know."""
    rng = random.Random(seed)
    pieces = [piece for text in HARD[:-2] for piece in text.split(" ")]

    def character():
        first, last = rng.choice([(32, 0x250), (0x250, 0xD800), (0xE000, 0x1FFFF)])
        drawn = chr(rng.randrange(first, last))
        return " " if unicodedata.category(drawn) == "Cn" else drawn

    return [
        "".join(rng.choice([" ", ""]) + (rng.choice(pieces) if rng.random() < 0.7 else character()) for _ in range(8))
        for _ in range(count)
    ]


@pytest.mark.parametrize("padding", [EOS, "!"])
def test_equal_to_transformers(vocabulary, padding):
    theirs = CLIPTokenizer(vocab=vocabulary[0], merges=vocabulary[1], pad_token=padding)
    ours = Tokenizer(*vocabulary, padding=padding)
    texts = HARD + random_texts(500)
    for length in (77, 6):
        for text, mine, reference in zip(texts, ours(texts, length), theirs_of(theirs, texts, length), strict=True):
            np.testing.assert_array_equal(mine, reference, err_msg=repr(text))


def test_numbers_and_fingerprint_are_those_that_stores_hold(vocabulary):
    """Both as of version 0.1, whose byte-pair merging was written out: transformers shares a library with ours."""
    ours = Tokenizer(*vocabulary)
    numbers = hashlib.sha256(ours(HARD).tobytes()).hexdigest()
    assert numbers == "109398da813f6c97e0c56cabd9de0166ced0b475e7da051e9b17fb0331dacee1"
    assert ours.fingerprint == "0e6e894a90cba8d9bb545e98e6a0db1950d361dd3b44457fd3aaa3651e8f43d2"


def test_merges_are_used(vocabulary):
    """The comparison above would say little if every text fell into bytes."""
    numbers = vocabulary[0]
    assert Tokenizer(*vocabulary).encode("The cat's photo") == [
        numbers["the</w>"],
        numbers["cat</w>"],
        numbers["'s</w>"],
        numbers["photo</w>"],
    ]


def test_shape_and_truncation(vocabulary):
    tokenizer = Tokenizer(*vocabulary)
    tokens = tokenizer(["", HARD[-2]], 10)
    assert tokens.dtype == np.int32
    assert tokens[0].tolist() == [tokenizer.bos] + [tokenizer.eos] * 9
    assert tokens[1].tolist() == [tokenizer.bos] + [vocabulary[0]["word</w>"]] * 8 + [tokenizer.eos]
    assert tokenizer("one text").shape == (1, 77)
    assert tokenizer([]).shape == (0, 77)


def test_all_layouts_are_read(vocabulary, folder, tmp_path):
    ours = Tokenizer(*vocabulary)
    assert ours.cleaning == "transformers"
    texts = random_texts(50, seed=1)
    expected = ours(texts)
    np.testing.assert_array_equal(Tokenizer.load(folder)(texts), expected)

    CLIPTokenizer.from_pretrained(folder, pad_token="!").save_pretrained(tmp_path / "pipeline" / "tokenizer")
    read = Tokenizer.load(tmp_path / "pipeline", subfolder="tokenizer")  # transformers 5 writes tokenizer.json only
    assert not (tmp_path / "pipeline" / "tokenizer" / "vocab.json").exists()
    np.testing.assert_array_equal(read(texts), Tokenizer(*vocabulary, padding="!")(texts))

    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *map(" ".join, vocabulary[1])]
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    read = Tokenizer.load(tmp_path / "merges.txt.gz", cleaning="transformers")
    assert read.vocabulary == ours.vocabulary and read.padding == 0
    assert [read.encode(text) for text in HARD if "!" not in text] == [ours.encode(t) for t in HARD if "!" not in t]


def test_padding_word_of_older_folders(vocabulary, folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "lstrip": false}}')
    assert Tokenizer.load(tmp_path).padding == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": EOS}))
    assert Tokenizer.load(tmp_path).padding == vocabulary[0][EOS]


def test_units_that_a_vocabulary_lacks_are_the_end_token(vocabulary):
    """Tiny test pipelines come with a few dozen units."""
    kept = {unit: number for unit, number in vocabulary[0].items() if "z" not in unit}
    theirs = CLIPTokenizer(vocab=kept, merges=vocabulary[1])
    texts = ["a zebra and jazz", "z"]
    np.testing.assert_array_equal(Tokenizer(kept, vocabulary[1])(texts), theirs_of(theirs, texts))


def test_what_cannot_be_used_is_refused(vocabulary, tmp_path):
    tokenizer = Tokenizer(*vocabulary)
    with pytest.raises(InputError, match="length=1"):
        tokenizer("a", 1)
    with pytest.raises(InputError, match="None: needed: a string"):
        tokenizer(["a", None])
    with pytest.raises(InputError, match="no Unicode text"):
        tokenizer("half \ud83d")
    with pytest.raises(InputError, match="cleaning='none'.*transformers, open_clip"):
        Tokenizer(*vocabulary, cleaning="none")
    with pytest.raises(InputError, match="lacks xyz"):
        Tokenizer(vocabulary[0], [("x", "yz")])
    with pytest.raises(InputError, match="lacks <|startoftext|>"):
        Tokenizer({EOS: 0}, [])
    with pytest.raises(InputError, match="no CLIP vocabulary at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="vocab.json and .*merges.txt cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(InputError, match="Merges text file invalid at line 1"):
        Tokenizer.load(tmp_path)
    (tmp_path / "words.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="not a gzipped list"):
        Tokenizer.load(tmp_path / "words.gz")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not a CLIP tokeniser"):
        Tokenizer.load(tmp_path)


def test_open_clip_cleaning_says_what_it_needs(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(InputError, match="needs the package ftfy"):
        Tokenizer(*vocabulary, cleaning="open_clip")


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's tokeniser module, without the rest of that package, and its vocabulary."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or importlib.util.find_spec("ftfy") is None:
        pytest.skip("needs the packages open_clip_torch and ftfy, for the published vocabulary")
    package = Path(spec.origin).parent
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", package / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(), package / "bpe_simple_vocab_16e6.txt.gz"


def test_published_vocabulary_equal_to_open_clip(open_clip):
    theirs, file = open_clip
    ours = Tokenizer.load(file)
    assert (ours.bos, ours.eos, len(ours.vocabulary)) == (49406, 49407, 49408)
    for text in HARD + random_texts(2000):
        if "\u0345" in text:  # their case-insensitive pattern takes this combining mark for a letter
            continue
        np.testing.assert_array_equal(ours(text)[0], theirs(text)[0].numpy(), err_msg=repr(text))


def test_published_vocabulary_equal_to_transformers(open_clip):
    ours = Tokenizer.load(open_clip[1], cleaning="transformers")
    theirs = CLIPTokenizer(vocab=ours.vocabulary, merges=ours.merges, pad_token="!")
    texts = HARD + random_texts(2000)
    for text, mine, reference in zip(texts, ours(texts), theirs_of(theirs, texts), strict=True):
        np.testing.assert_array_equal(mine, reference, err_msg=repr(text))


def test_fingerprint_is_of_all_that_decides_about_numbers(vocabulary):
    units, merges = vocabulary
    prints = {
        "as it is": Tokenizer(units, merges).fingerprint,
        "less merges": Tokenizer(units, merges[:-1]).fingerprint,
        "another order": Tokenizer(units, [*merges[1:], merges[0]]).fingerprint,
        "another padding": Tokenizer(units, merges, padding="!").fingerprint,
        "another number": Tokenizer(units | {"!": len(units)}, merges).fingerprint,
    }
    assert len(set(prints.values())) == len(prints)
    assert Tokenizer(dict(reversed(units.items())), merges).fingerprint == prints["as it is"]
    assert Tokenizer(units, merges).vocab_size == len(units)
