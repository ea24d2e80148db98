"""BLEU, ROUGE-L and CIDEr-D of captions, with the numbers of COCO caption evaluation.

Same arithmetic as `pycocoevalcap` 1.2, its guards against empty counts included, without Java:
the captions are tokenised by `pixelllm.evaluation.ptb`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

import numpy as np

from pixelllm.evaluation.ptb import tokenize

MAX_ORDER = 4  # n-grams of 1 to 4 words in BLEU and CIDEr
_CORRECT_GUARD, _TOTAL_GUARD = 1e-15, 1e-9  # the reference's, see `bleu`
Tokens = Sequence[str]
_NGrams = list[Counter[tuple[str, ...]]]


def score_captions(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Corpus scores of raw captions.

    An empty hypothesis scores 0; every image id needs at least one reference, else ValueError.

    Returns:
        `bleu_1` ... `bleu_4`, `rouge_l` in [0, 1] and `cider_d` in [0, 10], as fractions.
    """
    check_ids(hypotheses, references)
    candidates, truths = tokenize_pairs(hypotheses, references)
    rouge = float(np.mean(list(map(rouge_l, candidates, truths))))
    candidates = [_split_fractions(tokens) for tokens in candidates]
    truths = [[_split_fractions(tokens) for tokens in texts] for texts in truths]
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(candidates, truths), start=1)}
    return scores | {"rouge_l": rouge, "cider_d": float(np.mean(cider_d(candidates, truths)))}


def tokenize_pairs(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of the candidates, and of their references, in the order of `hypotheses`.

    COCO tokenises all captions of a side as one text, where the next one can matter.
    """

    def in_turn(captions: list[str]) -> list[list[str]]:
        return [tokenize(*pair) for pair in zip(captions, [*captions[1:], ""], strict=True)]

    flat = iter(in_turn([text for texts in references.values() for text in texts]))
    tokens = {key: [next(flat) for _ in texts] for key, texts in references.items()}
    return in_turn(list(hypotheses.values())), [tokens[key] for key in hypotheses]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Corpus BLEU-1 ... BLEU-4 of tokenised captions; not the mean of the images' BLEU.

    The brevity penalty uses the reference whose length is closest to the candidate's, the shorter
    one on ties. The reference adds 1e-15 to every count of hits and 1e-9 to every total, so a
    corpus without any 4-gram in common has a tiny BLEU-4 rather than 0.
    """
    correct, total = np.zeros(MAX_ORDER), np.zeros(MAX_ORDER)
    candidate_length = reference_length = 0
    for candidate, truths in zip(candidates, references, strict=True):
        length = len(candidate)
        candidate_length += length
        reference_length += min((abs(len(truth) - length), len(truth)) for truth in truths)[1]
        truth_counts = [_ngrams(truth) for truth in truths]
        for n, counts in enumerate(_ngrams(candidate)):
            allowed = counts & reduce(or_, [truth[n] for truth in truth_counts])
            correct[n] += allowed.total()
            total[n] += counts.total()
    precisions = (correct + _CORRECT_GUARD) / (total + _TOTAL_GUARD)
    means = np.cumprod(precisions) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (candidate_length + _CORRECT_GUARD) / (reference_length + _TOTAL_GUARD)
    return (means * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)).tolist()


def rouge_l(candidate: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """ROUGE-L of one caption: F-measure of the longest common subsequence.

    The best precision and the best recall may come from different references. An empty caption
    counts as one empty word, which only an empty reference contains.
    """
    candidate = candidate or [""]
    truths = [truth or [""] for truth in references]
    common = [_common_subsequence(candidate, truth) for truth in truths]
    precision = max(common) / len(candidate)
    recall = max(c / len(truth) for c, truth in zip(common, truths, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def cider_d(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0
) -> list[float]:
    """CIDEr-D of every image; the corpus score is the mean.

    An n-gram weighs log(images / images whose references contain it), so scores depend on the
    whole corpus, and with a single image every weight and every score is 0.
    """
    truths = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter()  # of the images, by n-gram
    for texts in truths:
        frequency.update(set().union(*(counts for text in texts for counts in text)))
    log_images = math.log(len(truths)) if truths else 0.0

    def weigh(ngrams: _NGrams) -> list[dict[tuple[str, ...], float]]:
        return [
            {key: count * (log_images - math.log(max(1, frequency[key])))
             for key, count in counts.items()}
            for counts in ngrams
        ]  # fmt: skip

    scores = []
    for candidate, texts in zip(candidates, truths, strict=True):
        ngrams = _ngrams(candidate)
        weights = weigh(ngrams)
        similarities = [
            _cosine(weights, weigh(text))
            # The reference measures length in bigrams.
            * math.exp(-((ngrams[1].total() - text[1].total()) ** 2) / (2 * sigma**2))
            for text in texts
        ]
        scores.append(10 * float(np.mean(similarities)))
    return scores


def _cosine(candidate: list[dict], reference: list[dict]) -> float:
    """Mean over n of the cosine, with the candidate's weights clipped at the reference's."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norms > 0:
            common = ours.keys() & theirs.keys()
            total += sum(min(ours[key], theirs[key]) * theirs[key] for key in common) / norms
    return total / MAX_ORDER


def _ngrams(tokens: Tokens) -> _NGrams:
    return [
        Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, MAX_ORDER + 1)
    ]


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def _split_fractions(tokens: Tokens) -> list[str]:
    """In "3 1/2", one token with a no-break space, the reference's n-grams see two words."""
    return [word for token in tokens for word in token.split()]


def check_ids(hypotheses: Mapping, references: Mapping) -> None:
    """Refuse ids of one side only, no ids at all, and ids without references."""
    if not hypotheses and not references:
        raise ValueError("no captions to score")
    for key, texts in references.items():
        if isinstance(texts, str):
            raise ValueError(f"{key}: its references are one string; expected a list of captions")
    for name, ids in (
        ("a hypothesis", references.keys() - hypotheses.keys()),
        ("a reference", hypotheses.keys() - references.keys()),
        ("a reference", {key for key in references if not references[key]}),
    ):
        if ids:
            shown = ", ".join(sorted(map(str, ids))[:5])
            raise ValueError(f"{len(ids)} ids without {name}: {shown}{' ...' * (len(ids) > 5)}")
