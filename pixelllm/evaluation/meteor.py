"""METEOR 1.5 (Denkowski & Lavie 2014) for English, as the Java program scores with `-l en -norm`.

COCO caption evaluation runs that program on PTB tokens, dense captioning on raw captions. Ours
needs no Java, only the tables that `pycocoevalcap` carries; `benchmarks/meteor.py` compares both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from pixelllm.evaluation.captions import check_ids, tokenize_pairs
from pixelllm.evaluation.meteor_align import Caption, align
from pixelllm.evaluation.meteor_data import MeteorUnavailable, Tables, data_folder

# The program's parameters of English: the weight of recall, the form and the weight of the
# fragmentation penalty, the weight of content words, and that of each kind of match.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase

_LETTERS = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ӿԀ-ԧꙀ-ꙮ꙾-ꚗᴀ-ᵿ"
_SIGNS = re.compile(rf"([^0-9{_LETTERS}\s.'`,\-‘’])", re.ASCII)
# Applied in this order, each to the whole line.
_SPLITS = tuple(
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"(\.{2,})", r" \1 "),
        (r"(\D),(\D)", r"\1 , \2"),
        (r"(\d),(\D)", r"\1 , \2"),
        (r"(\D),(\d)", r"\1 , \2"),
        (r"[`‘’]", "'"),
        (r"[“”]|''", ' " '),
        (r"–", "-"),
        (r"--", "-"),
        (rf"([0-9{_LETTERS}.])-([0-9{_LETTERS}])", r"\1 \2"),
        (rf"([^{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
        (rf"([^{_LETTERS}\d])'([{_LETTERS}])", r"\1 ' \2"),
        (rf"([{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
        (rf"([{_LETTERS}])'([{_LETTERS}])", r"\1 '\2"),
        (r"(\d)'(s)", r"\1 '\2"),
    )
)
_PLAIN = re.compile(r"[A-Za-z0-9 ]*")  # nothing to split
_LETTER = re.compile(f"[{_LETTERS}]")
_BLANKS = re.compile(r"[ \t\n\r\f]+")


class Statistics(NamedTuple):
    """What METEOR counts; sums of it give the score of a corpus.

    Weighted counts are those of matched words by kind of match, and of all words, with content
    words and function words weighed.
    """

    matched: float  # weighted, of the caption
    matched_reference: float
    size: float  # weighted, of the caption
    size_reference: float
    num_matched: int
    num_matched_reference: int
    num_words: int
    num_words_reference: int
    chunks: int

    @property
    def is_perfect(self) -> bool:
        """All words of both match in one run."""
        return (
            self.chunks == 1
            and self.num_matched == self.num_words
            and self.num_matched_reference == self.num_words_reference
        )

    def score(self) -> float:
        if not self.matched or not self.matched_reference:
            return 0.0
        precision = self.matched / self.size
        recall = self.matched_reference / self.size_reference
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = 2 * self.chunks / (self.num_matched + self.num_matched_reference)
        return mean * (1 - _GAMMA * (0.0 if self.is_perfect else fragmentation) ** _BETA)


def meteor_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Corpus METEOR, of the pooled statistics, and METEOR of every caption, in [0, 1].

    A caption is scored with the reference that is best for it; an empty one scores 0. The tables
    are read in the first call (half a second; some seconds once, to bring the paraphrases into the
    cache folder) and stay in memory, so many small calls cost little more than a large one.

    Args:
        hypotheses: captions, raw or as tokens joined by blanks.
        references: as many lists, one caption at least in each.

    Raises:
        ValueError: no captions, lists of unequal length, or a caption without references.
        MeteorUnavailable: `pycocoevalcap` or `snowballstemmer` is not installed.
    """
    _check(hypotheses, references)
    captions = _prepare({*hypotheses, *(text for texts in references for text in texts)})
    best = [
        _best(captions[caption], [captions[text] for text in texts])
        for caption, texts in zip(hypotheses, references, strict=True)
    ]
    # The program leaves the chunk of a perfect caption out of the sum.
    pooled = [item._replace(chunks=0) if item.is_perfect else item for item in best]
    corpus = Statistics(*map(sum, zip(*pooled, strict=True)))
    return corpus.score(), [item.score() for item in best]


def score_meteor(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """Corpus METEOR of raw captions in [0, 1], tokenised as COCO does; see `score_captions`."""
    check_ids(hypotheses, references)
    candidates, truths = tokenize_pairs(hypotheses, references)
    joined = [[" ".join(tokens) for tokens in texts] for texts in truths]
    return meteor_scores([" ".join(tokens) for tokens in candidates], joined)[0]


def unavailable_reason() -> str | None:
    """Why METEOR cannot run here, with the remedy; None where it can."""
    try:
        data_folder()
        _tables()
    except (MeteorUnavailable, OSError) as error:  # the latter where no cache can be written
        return str(error)
    return None


def normalize(line: str, abbreviations: Mapping[str, bool]) -> list[str]:
    """Lower-case tokens, punctuation among them; dots and hyphens inside words are dropped."""
    line = " ".join(line.splitlines()).replace("|||", "")  # COCO drops this separator
    if not _PLAIN.fullmatch(line):
        line = _SIGNS.sub(r" \1 ", f" {line} ")
        for pattern, replacement in _SPLITS:
            line = pattern.sub(replacement, line)
        words = _BLANKS.split(line.strip(" \t\n\r\f"))
        following = [*words[1:], ""]
        line = " ".join(
            _split_period(word, next_word, abbreviations)
            for word, next_word in zip(words, following, strict=True)
        )
    return line.lower().split()


def _split_period(word: str, following: str, abbreviations: Mapping[str, bool]) -> str:
    stem = word.removesuffix(".")
    if stem == word or not stem.strip("."):
        return word
    if "." in stem and _LETTER.search(stem):
        return word.replace(".", "")  # U.S. as US
    numeric_only = abbreviations.get(stem)
    if numeric_only is False or "a" <= following[:1] <= "z":
        return word
    if numeric_only and "0" <= following[:1] <= "9":
        return word
    return f"{stem} ."


@cache
def _tables() -> Tables:
    return Tables()


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not hypotheses or len(hypotheses) != len(references):
        counts = f"{len(hypotheses)} hypotheses and {len(references)} lists of references"
        raise ValueError(f"{counts}: expected as many of each, and one at least")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"item {index}: expected a list of references, got {texts!r}")


def _prepare(texts: set[str]) -> dict[str, Caption]:
    tables = _tables()
    captions = {
        text: Caption([tables.word(word) for word in normalize(text, tables.abbreviations)])
        for text in texts
    }
    phrases = {phrase for caption in captions.values() for _, _, phrase in caption.phrases()}
    paraphrases = tables.paraphrases.among(phrases)
    targets = frozenset().union(*paraphrases.values())
    for caption in captions.values():
        caption.relate(paraphrases, targets)
    return captions


def _best(caption: Caption, references: Sequence[Caption]) -> Statistics:
    return max((_count(caption, reference) for reference in references), key=Statistics.score)


def _count(caption: Caption, reference: Caption) -> Statistics:
    matches, chunks = align(caption, reference)
    ours, theirs = _word_weights(caption), _word_weights(reference)
    matched = matched_reference = num_matched = num_matched_reference = 0
    for start, length, caption_start, caption_length, kind in matches:
        matched += _WEIGHTS[kind] * sum(ours[caption_start : caption_start + caption_length])
        matched_reference += _WEIGHTS[kind] * sum(theirs[start : start + length])
        num_matched += caption_length
        num_matched_reference += length
    return Statistics(
        matched, matched_reference, sum(ours), sum(theirs),
        num_matched, num_matched_reference, len(ours), len(theirs), chunks,
    )  # fmt: skip


def _word_weights(caption: Caption) -> list[float]:
    return [1 - _DELTA if word.is_function else _DELTA for word in caption.words]
