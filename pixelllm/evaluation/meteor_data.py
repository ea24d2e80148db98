"""What METEOR 1.5 knows of English words: the files of the Java program, read without Java.

The package `pycocoevalcap` carries them: function words, abbreviations and WordNet's synonyms in
the jar, and beside it a table of 5.3 million paraphrases. The table is brought into a form that
opens in a fraction of a second once, in the user's cache folder.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import mmap
import os
import tempfile
import zipfile
from array import array
from functools import cache, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

# Endings that a plural, a verb form or a comparison adds, and what stood there before, in the
# order in which they are tried (WordNet's rules of detachment for nouns, verbs, adjectives).
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"),
    ("ed", ""), ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


class MeteorUnavailable(RuntimeError):
    """A package that METEOR needs is absent; the message says what to do."""


class Word(NamedTuple):
    """A lower-case token and all that single words are matched by."""

    text: str
    key: int  # words and stems are compared by these, see `java_hash`
    stem: int
    synsets: frozenset[str]  # of the word as it stands and of its base forms
    is_function: bool


class Tables:
    """The word lists; `word` looks everything up once for every word."""

    def __init__(self):
        folder = data_folder()
        with zipfile.ZipFile(folder / "meteor-1.5.jar") as jar:

            def lines(name: str) -> list[str]:
                return jar.read(name).decode().splitlines()

            self._function_words = frozenset(lines("function/english.words"))
            self.abbreviations = _read_abbreviations(lines("nonbreaking/english.prefixes"))
            synsets, exceptions = (
                lines("synonym/english.synsets"),
                lines("synonym/english.exceptions"),
            )
        # Alternating lines: a word, its synsets; a base form, its irregular forms.
        self._synsets = dict(zip(synsets[::2], synsets[1::2], strict=True))
        self._bases: dict[str, list[str]] = {}
        for base, forms in zip(exceptions[::2], exceptions[1::2], strict=True):
            for form in forms.split():
                self._bases.setdefault(form, []).append(base)
        # An optional dependency. The class itself: the package's own choice would be PyStemmer,
        # of whatever version.
        from snowballstemmer.english_stemmer import EnglishStemmer

        self._stem = EnglishStemmer().stemWord
        self.paraphrases = Paraphrases(folder / "data" / "paraphrase-en.gz")
        self.word = cache(self._look_up)

    def _look_up(self, text: str) -> Word:
        bases = self._bases.get(text) or [self._base(text)]
        synsets = " ".join(self._synsets.get(form, "") for form in [text, *bases]).split()
        stem = java_hash(self._stem(text))
        is_function = text in self._function_words
        return Word(text, java_hash(text), stem, frozenset(synsets), is_function)

    def _base(self, text: str) -> str:
        if len(text) > 2 and not text.endswith("ss"):
            for ending, former in _ENDINGS:
                if text.endswith(ending):
                    base = text.removesuffix(ending) + former
                    if base in self._synsets:
                        return base
        return text


class Paraphrases:
    """The paraphrase table: phrases of 1 to 7 words, words joined by blanks.

    The cache file holds the length of its index; the index: phrases, a line each, then where each
    one's paraphrases begin and where the last ones end, as 64-bit integers; the paraphrases, a line
    each.
    """

    def __init__(self, source: Path):
        file = _cache_file(source)
        if not file.exists():
            _write_cache(source, file)
        with file.open("rb") as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._bytes[:8], "little")
        phrases = self._bytes[8 : 8 + length].decode().splitlines()
        starts = array("q", self._bytes[8 + length : 16 + length + 8 * len(phrases)])
        self._places = dict(zip(phrases, zip(starts, starts[1:], strict=False), strict=True))
        self._of = lru_cache(1 << 15)(self._read)

    def among(self, phrases: set[str]) -> dict[str, frozenset[str]]:
        """The paraphrases of every one of `phrases` that are in `phrases` too, if there are any."""
        found = {phrase: self._of(phrase) & phrases for phrase in self._places.keys() & phrases}
        return {phrase: paraphrases for phrase, paraphrases in found.items() if paraphrases}

    def _read(self, phrase: str) -> frozenset[str]:
        start, end = self._places[phrase]
        return frozenset(self._bytes[start:end].decode().splitlines())


def java_hash(text: str) -> int:
    """The number by which the program knows a word; "bowl" and "boy." share theirs, and match."""
    value = 0
    for character in text:
        value = (31 * value + ord(character)) & 0xFFFFFFFF
    return value


def data_folder() -> Path:
    """The folder of the METEOR jar. Raises MeteorUnavailable where a package is absent."""
    for package in ("pycocoevalcap", "snowballstemmer"):
        if importlib.util.find_spec(package) is None:
            raise MeteorUnavailable(f"METEOR needs {package}: pip install 'pixelllm[meteor]'")
    package = importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0]
    folder = Path(package) / "meteor"
    for name in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
        if not (folder / name).exists():
            raise MeteorUnavailable(f"{folder / name} is missing: reinstall pycocoevalcap")
    return folder


def _read_abbreviations(lines: list[str]) -> dict[str, bool]:
    """Words whose period stays, and whether it does so before a number only."""
    entries = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {fields[0]: fields[1:2] == ["#NUMERIC_ONLY#"] for fields in entries}


def _cache_file(source: Path) -> Path:
    """Named after the table's checksum and length, the last 8 bytes of a gzip file."""
    with source.open("rb") as opened:
        opened.seek(-8, os.SEEK_END)
        checksum = opened.read().hex()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pixelllm" / f"meteor-paraphrases-{checksum}"


def _write_cache(source: Path, file: Path) -> None:
    """Write the cache of a table: lines of a probability, a phrase, and its paraphrase, sorted."""
    with io.BufferedReader(gzip.open(source)) as lines:
        entries = zip(lines, lines, lines, strict=True)
        groups = {phrase: b"".join(map(itemgetter(2), group))
                  for phrase, group in groupby(entries, itemgetter(1))}  # fmt: skip
    index = b"".join(groups)
    starts = array("q", [16 + len(index) + 8 * len(groups)])
    for paraphrases in groups.values():
        starts.append(starts[-1] + len(paraphrases))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            with part.open("wb") as opened:
                opened.write(len(index).to_bytes(8, "little") + index + starts.tobytes())
                opened.writelines(groups.values())
            part.replace(file)  # all at once: another process may read or write it
    except OSError as error:
        remedy = "METEOR keeps 100 MB there; set XDG_CACHE_HOME to a folder that can be written"
        raise OSError(f"{file.parent}: {error.strerror}; {remedy}") from error
