"""Captions -> token ids: CLIP's byte-pair tokeniser, on the `tokenizers` library.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), after Sennrich et al.,
"Neural Machine Translation of Rare Words with Subword Units" (2016).
"""

import functools
import gzip
import hashlib
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Chain
from typing_extensions import override

from lpl_jax.errors import InputError, some
from lpl_jax.io.hub import find
from lpl_jax.io.jsons import MAX_BYTES as MAX_VOCABULARY
from lpl_jax.io.jsons import parse, read_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CLEANING = ("transformers", "open_clip")
WORD_END = "</w>"
BYTE_UNITS = sorted(ByteLevel.alphabet())  # a printable character for each byte, in the order of the vocabulary
OPEN_CLIP_MERGES = 49152 - 256 - 2  # the published file has more lines than were trained with
OPEN_CLIP_SPECIAL = {BOS: "<start_of_text>", EOS: "<end_of_text>"}

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
RUNS = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # letters, one numeral, anything else; white space only separates


def _find_words(*patterns: str) -> PreTokenizer:
    return Split(Regex("|".join(patterns)), "removed", invert=True)


NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
# The special words in other letter case are ordinary text, but cut before and after.
WORDS = Chain([_find_words(r"<\|startoftext\|>|<\|endoftext\|>", CONTRACTIONS, RUNS), _find_words(CONTRACTIONS, RUNS)])
OPEN_CLIP_WORDS = _find_words(*OPEN_CLIP_SPECIAL.values(), f"(?i:{CONTRACTIONS})", RUNS)


class WordTokenizer:
    """What all tokenisers share: `encode` gives the ids of a text, and here they become rows.

    Attributes:
      bos, eos, padding: numbers of the start token, of the end token and of padding.
      vocab_size: numbers are below it.
    """

    bos: int
    eos: int
    padding: int
    vocab_size: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of all that decides about a text's numbers: equal tokenisers have the same."""
        raise NotImplementedError

    def __call__(self, texts: str | Sequence[str], length: int = 77) -> np.ndarray:
        """Texts -> int32 (B, length): start token, text, end token, padding. A text that is too long loses its end.

        Raises:
          InputError: a length below 2, or something that is not text (a lone surrogate included).
        """
        if length < 2:
            raise InputError(f"length={length}: at least 2, for the start and the end token")
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.full((len(texts), length), self.padding, np.int32)
        for row, text in zip(rows, texts, strict=True):
            numbers = [self.bos, *self.encode(_checked(text))[: length - 2], self.eos]
            row[: len(numbers)] = numbers
        return rows

    def encode(self, text: str) -> list[int]:
        """Token ids of one text of any length, without start and end token."""
        raise NotImplementedError


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"text to tokenise is {text!r}: needed: a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text to tokenise is {text!r}, which is no Unicode text ({error.reason})") from None
    return text


class Tokenizer(WordTokenizer):
    """Texts -> token ids, equal to transformers' `CLIPTokenizer` or to open_clip's `SimpleTokenizer`.

    Cleaning rules:
      transformers: Unicode NFC, runs of white space become one space, lower case letter by letter. The special words
        "<|startoftext|>", "<|endoftext|>" and the padding word in a text become their numbers.
      open_clip: mojibake, ligatures, quotation marks and widths repaired by the `ftfy` package, which must be
        installed; HTML entities resolved twice, white space as above, lower case. Its special words are
        "<start_of_text>" and "<end_of_text>".

    Args:
      vocabulary: unit -> number, with the two special words `BOS` and `EOS`.
      merges: pairs of units, in the order in which they were learnt.
      padding: the unit whose number pads rows after the end token. `EOS` in most models; "!" (number 0) in Stable
        Diffusion 2, in SDXL's second encoder and with open_clip.
      cleaning: one of `CLEANING`.

    Raises:
      InputError: an unknown cleaning rule, a vocabulary without a special word or without a unit of the merges.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        padding: str = EOS,
        cleaning: str = "transformers",
    ):
        if cleaning not in CLEANING:
            raise InputError(f"cleaning={cleaning!r}: possible: {', '.join(CLEANING)}")
        needed = dict.fromkeys((BOS, EOS, padding, *(unit for a, b in merges for unit in (a + b, a, b))))
        if absent := [unit for unit in needed if unit not in vocabulary]:
            names = some([unit if unit.isprintable() else ascii(unit) for unit in absent])
            raise InputError(f"CLIP vocabulary of {len(vocabulary)} units lacks {names[:200]}")
        self.vocabulary, self.merges, self.cleaning = dict(vocabulary), list(merges), cleaning
        self.bos, self.eos, self.padding = vocabulary[BOS], vocabulary[EOS], vocabulary[padding]
        self.vocab_size = max(vocabulary.values()) + 1
        if cleaning == "open_clip":
            _ftfy()
            special = OPEN_CLIP_SPECIAL
            vocabulary = {special.get(unit, unit): number for unit, number in vocabulary.items()}
        else:
            special = {unit: unit for unit in (BOS, EOS, padding)}
        # The end token stands for bytes that a (partial) vocabulary does not have, as in both references.
        self._core = tokenizers.Tokenizer(
            models.BPE(
                dict(vocabulary),
                self.merges,
                unk_token=special[EOS],
                continuing_subword_prefix="",
                end_of_word_suffix=WORD_END,
            )
        )
        self._core.add_special_tokens(list(special.values()))
        bytewise = ByteLevel(add_prefix_space=False, use_regex=False)
        if cleaning == "open_clip":
            self._core.pre_tokenizer = bytewise
        else:
            self._core.normalizer, self._core.pre_tokenizer = NORMALIZER, Chain([WORDS, bytewise])

    @functools.cached_property
    @override
    def fingerprint(self) -> str:
        parts = [sorted(self.vocabulary.items()), self.merges, self.padding, self.cleaning]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @classmethod
    def load(cls, source: str | Path, *, subfolder: str | None = None, cleaning: str | None = None) -> "Tokenizer":
        """Read a vocabulary.

        Args:
          source: a folder with vocab.json and merges.txt or with tokenizer.json (transformers' layouts), open_clip's
            bpe_simple_vocab_16e6.txt.gz, or a hub id such as "openai/clip-vit-large-patch14".
          subfolder: the tokeniser's folder inside a pipeline's, such as "tokenizer".
          cleaning: one of `CLEANING`; None takes the rule of the layout.

        Raises:
          InputError: nothing there, or files that cannot be read.
        """
        path = find(source, FILES, subfolder, field="text.tokenizer")
        try:
            return cls._read(path, cleaning)
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    @classmethod
    def _read(cls, path: Path, cleaning: str | None) -> "Tokenizer":
        if path.is_file():
            vocabulary, merges = _read_open_clip(path)
            return cls(vocabulary, merges, padding="!", cleaning=cleaning or "open_clip")
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            vocabulary, merges = _read(models.BPE.read_file, path / "vocab.json", path / "merges.txt")
        elif (path / "tokenizer.json").is_file():
            vocabulary, merges = _read_tokenizer_json(path / "tokenizer.json")
        else:
            raise InputError(
                f"no CLIP vocabulary at {path}: give a folder with vocab.json and merges.txt or with tokenizer.json, "
                "or open_clip's bpe_simple_vocab_16e6.txt.gz"
            )
        return cls(vocabulary, merges, padding=_padding_word(path), cleaning=cleaning or "transformers")

    def encode(self, text: str) -> list[int]:
        """Token ids of one text of any length, without start and end token."""
        if self.cleaning == "transformers":
            return self._core.encode(text, add_special_tokens=False).ids
        # Cut before the library looks for special words: to open_clip they are words, and none begins inside another.
        words = [word for word, _ in OPEN_CLIP_WORDS.pre_tokenize_str(_clean_open_clip(text))]
        return self._core.encode(words, is_pretokenized=True, add_special_tokens=False).ids


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Unit -> number in CLIP's order: bytes, bytes that end a word, results of the merges, special words."""
    units = [*BYTE_UNITS, *(unit + WORD_END for unit in BYTE_UNITS), *map("".join, merges), BOS, EOS]
    return {unit: number for number, unit in enumerate(units)}


def cleaned_words(text: str) -> list[str]:
    """The words of a text, cleaned by the rule "transformers"."""
    return [word for word, _ in WORDS.pre_tokenize_str(NORMALIZER.normalize_str(text))]


def _clean_open_clip(text: str) -> str:
    text = html.unescape(html.unescape(_ftfy().fix_text(text)))
    return " ".join(text.split()).lower()


def _ftfy():
    try:
        import ftfy  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        raise InputError(
            "cleaning='open_clip' needs the package ftfy (pip install ftfy); cleaning='transformers' needs nothing and "
            "differs only on texts with HTML entities, typographic quotes, ligatures or broken encodings"
        ) from None
    return ftfy


def _read(reader, *paths: Path):
    """What a reader of the library makes of files. Its errors have no type of their own."""
    try:
        return reader(*map(str, paths))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = " ".join(str(error).split())[:200]  # a fault inside of the library is no Exception
        raise InputError(f"{' and '.join(map(str, paths))} cannot be read: {reason}") from error


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    core = _read(tokenizers.Tokenizer.from_file, path)
    if getattr(core.model, "end_of_word_suffix", None) != WORD_END:
        raise InputError(f"{path} is not a CLIP tokeniser: no byte-pair model with words that end in {WORD_END}")
    merges = parse(core.to_str(), str(path))["model"]["merges"]
    return core.get_vocab(with_added_tokens=False), [tuple(pair) for pair in merges]


def _read_open_clip(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_VOCABULARY + 1)
        if len(content) > MAX_VOCABULARY:
            raise ValueError(f"more than {MAX_VOCABULARY:,} bytes inside")
        _version, *lines = content.decode("utf-8").split("\n")
        merges = [(a, b) for a, b in (line.split(" ") for line in lines[:OPEN_CLIP_MERGES] if line)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is not a gzipped list of merges: {error}") from error
    return vocabulary_of(merges), merges


def _padding_word(folder: Path) -> str:
    """The padding word that a folder's settings name; the end token where they name none."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        word = read_json(file).get("pad_token") if file.is_file() else None
        word = word.get("content") if isinstance(word, dict) else word
        if word is not None and not (isinstance(word, str) and word):
            raise InputError(
                f"{file}: pad_token={str(word)[:80]!r} is not possible: it must be a word of the vocabulary"
            )
        if word:
            return word
    return EOS
