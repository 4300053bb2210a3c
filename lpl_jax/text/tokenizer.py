"""CLIP's byte-pair tokeniser: lower-cased text -> words -> bytes -> merged units -> numbers.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), after Sennrich et al.,
"Neural Machine Translation of Rare Words with Subword Units" (2016).
"""

import functools
import gzip
import hashlib
import html
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lpl_jax.errors import InputError
from lpl_jax.io.hub import find
from lpl_jax.io.tensors import read_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CLEANING = ("transformers", "open_clip")
WORD_END = "</w>"
OPEN_CLIP_MERGES = 49152 - 256 - 2  # the published file has more lines than were trained with
CACHED_WORDS = 2**17

# Unicode's White_Space, which is what the reference tokenisers match with \s; str.isspace() knows four more.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
SPACES = re.compile(f"[{WHITESPACE}]+")
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# The special words in other letter case are ordinary text, but cut before and behind.
FIXED = {
    "transformers": re.compile(rf"(<\|)(startoftext|endoftext)(\|>)|({CONTRACTIONS})"),
    "open_clip": re.compile(f"(<start_of_text>|<end_of_text>)|({CONTRACTIONS})", re.IGNORECASE),
}
OPEN_CLIP_SPECIAL = {"<start_of_text>": BOS, "<end_of_text>": EOS}


class WordTokenizer:
    """What all tokenisers share: `encode` gives the numbers of a text, and here they become rows.

    Attributes:
      bos, eos, padding: numbers of the start token, of the end token and of what fills rows behind it.
      vocab_size: numbers are below it.
      fingerprint: hexadecimal digest of all that decides about a text's numbers: equal tokenisers have the same.
    """

    bos: int
    eos: int
    padding: int
    vocab_size: int
    fingerprint: str

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
            if not isinstance(text, str):
                raise InputError(f"text to tokenise is {text!r}: needed: a string")
            numbers = [self.bos, *self.encode(text)[: length - 2], self.eos]
            row[: len(numbers)] = numbers
        return rows

    def encode(self, text: str) -> list[int]:
        """Token numbers of one text of any length, without start and end token."""
        raise NotImplementedError


class Tokenizer(WordTokenizer):
    """Texts -> token numbers, equal to transformers' `CLIPTokenizer` or to open_clip's `SimpleTokenizer`.

    Cleaning rules:
      transformers: Unicode NFC, runs of white space become one space, lower case letter by letter. The special words
        "<|startoftext|>", "<|endoftext|>" and the padding word in a text become their numbers.
      open_clip: mojibake, ligatures, quotation marks and widths repaired by the `ftfy` package, which must be
        installed; HTML entities resolved twice, white space as above, lower case. Its special words are
        "<start_of_text>" and "<end_of_text>".

    Args:
      vocabulary: unit -> number, with the two special words `BOS` and `EOS`.
      merges: pairs of units, in the order in which they were learnt.
      padding: the unit whose number fills rows behind the end token. `EOS` in most models; "!" (number 0) in Stable
        Diffusion 2, in SDXL's second encoder and with open_clip.
      cleaning: one of `CLEANING`.
    Raises:
      InputError: an unknown cleaning rule, a vocabulary without a special word or without the result of a merge.
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
        absent = [unit for unit in (BOS, EOS, padding) if unit not in vocabulary]
        absent += [a + b for a, b in merges if a + b not in vocabulary][:5]
        if absent:
            raise InputError(f"CLIP vocabulary of {len(vocabulary)} units lacks {', '.join(absent)}")
        self.vocabulary, self.cleaning = dict(vocabulary), cleaning
        self.bos, self.eos, self.padding = vocabulary[BOS], vocabulary[EOS], vocabulary[padding]
        self.vocab_size = max(vocabulary.values()) + 1
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._special = re.compile("(" + "|".join(map(re.escape, sorted({BOS, EOS, padding}))) + ")")
        self._cache: dict[str, list[int]] = {}
        if cleaning == "open_clip":
            _ftfy()

    @functools.cached_property
    def fingerprint(self) -> str:
        parts = [sorted(self.vocabulary.items()), list(self._ranks), self.padding, self.cleaning]
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
        if path.is_file():
            vocabulary, merges = _read_open_clip(path)
            return cls(vocabulary, merges, padding="!", cleaning=cleaning or "open_clip")
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            vocabulary = read_json(path / "vocab.json")
            merges = _pairs((path / "merges.txt").read_text(encoding="utf-8").splitlines(), path / "merges.txt")
        elif (path / "tokenizer.json").is_file():
            vocabulary, merges = _read_tokenizer_json(path / "tokenizer.json")
        else:
            raise InputError(
                f"no CLIP vocabulary at {path}: give a folder with vocab.json and merges.txt or with tokenizer.json, "
                "or open_clip's bpe_simple_vocab_16e6.txt.gz"
            )
        return cls(vocabulary, merges, padding=_padding_word(path), cleaning=cleaning or "transformers")

    def encode(self, text: str) -> list[int]:
        """Token numbers of one text of any length, without start and end token."""
        if self.cleaning == "open_clip":
            return [number for word in _words(_clean_open_clip(text), self.cleaning) for number in self._numbers(word)]
        numbers = []
        for part in self._special.split(text):
            if self._special.fullmatch(part):
                numbers.append(self.vocabulary[part])
                continue
            for word in _words(_clean_transformers(part), self.cleaning):
                numbers += self._numbers(word)
        return numbers

    def _numbers(self, word: str) -> list[int]:
        if word in self._cache:
            return self._cache[word]
        if self.cleaning == "open_clip" and word in OPEN_CLIP_SPECIAL:
            numbers = [self.vocabulary[OPEN_CLIP_SPECIAL[word]]]
        else:
            try:
                units = [BYTE_UNITS[byte] for byte in word.encode()]
            except UnicodeEncodeError as error:
                raise InputError(f"text to tokenise has {word!r}, which is no Unicode text ({error.reason})") from None
            units[-1] += WORD_END
            # The end token stands for bytes that a (partial) vocabulary does not have, as in both references.
            numbers = [self.vocabulary.get(unit, self.eos) for unit in self._merge(units)]
        if len(self._cache) < CACHED_WORDS:
            self._cache[word] = numbers
        return numbers

    def _merge(self, units: list[str]) -> list[str]:
        """Apply the earliest learnt merge, everywhere from the left, until none applies."""
        while True:
            ranked = [(self._ranks[pair], pair) for pair in itertools.pairwise(units) if pair in self._ranks]
            if not ranked:
                return units
            _, pair = min(ranked)
            merged, index = [], 0
            while index < len(units):
                if tuple(units[index : index + 2]) == pair:
                    merged.append(units[index] + units[index + 1])
                    index += 2
                else:
                    merged.append(units[index])
                    index += 1
            units = merged


def _byte_units() -> tuple[list[str], list[str]]:
    """The printable character that stands for each byte, and these characters in the order of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    units = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [units[byte] for byte in range(256)], list(units.values())


BYTE_UNITS, VOCABULARY_ORDER = _byte_units()


def _clean_transformers(text: str) -> str:
    text = SPACES.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)  # letter by letter: no final sigma


def cleaned_words(text: str) -> Iterator[str]:
    """The words of a text, cleaned by the rule "transformers"."""
    return _words(_clean_transformers(text), "transformers")


def _clean_open_clip(text: str) -> str:
    text = html.unescape(html.unescape(_ftfy().fix_text(text)))
    return " ".join(text.split()).lower()


def _ftfy():
    try:
        import ftfy
    except ImportError:
        raise InputError(
            "cleaning='open_clip' needs the package ftfy (pip install ftfy); cleaning='transformers' needs nothing and "
            "differs only on texts with HTML entities, typographic quotes, ligatures or broken encodings"
        ) from None
    return ftfy


@functools.cache
def _kind(character: str) -> str:
    if character in WHITESPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def _words(text: str, cleaning: str) -> Iterator[str]:
    """Contractions, runs of letters, single numerals, runs of anything else; white space only separates."""
    position = 0
    while position < len(text):
        if match := FIXED[cleaning].match(text, position):
            yield from filter(None, match.groups())
            position = match.end()
            continue
        kind, end = _kind(text[position]), position + 1
        while kind in ("letter", "other") and end < len(text) and _kind(text[end]) == kind:
            end += 1
        if kind != "space":
            yield text[position:end]
        position = end


def _pairs(lines: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """Merges from lines "first second"; the first line may name a version."""
    lines = lines[1:] if lines and "#version" in lines[0] else lines
    pairs = [tuple(line.split(" ")) for line in lines if line]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise InputError(f"{path}: a merge is two units with a space between; found {' '.join(wrong)!r}")
    return pairs


def _read_open_clip(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is not a gzipped list of merges: {error}") from error
    merges = _pairs(lines[: OPEN_CLIP_MERGES + 1], path)
    units = [*VOCABULARY_ORDER, *(unit + WORD_END for unit in VOCABULARY_ORDER), *(a + b for a, b in merges), BOS, EOS]
    return {unit: number for number, unit in enumerate(units)}, merges


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = read_json(path).get("model") or {}
    if model.get("end_of_word_suffix") != WORD_END or "vocab" not in model or "merges" not in model:
        raise InputError(f"{path} is not a CLIP tokeniser: no byte-pair model with words that end in {WORD_END}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return model["vocab"], merges


def _padding_word(folder: Path) -> str:
    """The padding word that a folder's settings name; the end token where they name none."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        word = read_json(file).get("pad_token") if file.is_file() else None
        if word:
            return word["content"] if isinstance(word, dict) else word
    return EOS
