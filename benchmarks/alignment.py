"""How close `text` and `rank` alignment come to the truth, and how fast they are.

    python -m benchmarks.alignment scenes/annotations/scenes_val_localized_narratives.jsonl \\
        --truth scenes/annotations/scenes_val_truth.jsonl
    python -m benchmarks.alignment narratives_with_an_utterance_per_word.jsonl

With a truth file of `data.scenes`, every word that names an object is compared with the object's
box. Without, narratives whose utterances are single words are compared with themselves: the time
average of a word's own utterance is its true place, so `text` is exact by construction and the
question is how far the order alone leads `rank` astray. `rank` depends on the tokens: they are
words, or words and punctuation marks, the coarsest that a real tokenizer gives (BERT's splits so
before it looks at its vocabulary; every split word leads `rank` further off).
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pixelllm.alignment import assign_tokens, rank_pieces, text_pieces, token_centers, words_of

Narrative = dict[str, Any]
Spans = list[tuple[int, int]]


def words_and_marks(caption: str) -> Spans:
    """Characters [start, end) of words and of single punctuation marks."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", caption)]


ALIGN = {"text": text_pieces, "rank": rank_pieces}
TOKENS = {"words": words_of, "words and marks": words_and_marks}


def object_words(
    narratives: list[Narrative], truth: dict[str, Any], mode: str, tokens: str
) -> dict[str, float]:
    """Where the words that name objects point, against the objects' boxes."""
    inside, distance = [], []
    for narrative in narratives:
        scene = truth[narrative["image_id"]]
        spans = TOKENS[tokens](narrative["caption"])
        centers = token_centers(ALIGN[mode](narrative), spans)
        for mention in scene["mentions"]:
            x0, y0, x1, y1 = scene["objects"][mention["object"]]["box"]
            for (start, end), (x, y) in zip(spans, centers, strict=True):
                is_mark = not narrative["caption"][start].isalnum()
                if start >= mention["end"] or end <= mention["start"] or is_mark:
                    continue
                inside.append(x0 <= x <= x1 and y0 <= y <= y1)  # False where it has no place
                distance.append(np.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2))
    return {
        "object words": len(inside),
        "centre in the object's box": float(np.mean(inside)),
        "mean distance to the box's centre": float(np.nanmean(distance)),
        "words without a place": int(np.isnan(distance).sum()),
    }


def rank_error(narratives: list[Narrative], tokens: str) -> dict[str, float]:
    """How far `rank` is from each word's own utterance, over words with a true place.

    Words far from the trace have none; the official extrapolation gives them one, counted apart.
    """
    offset, characters, distance, away = [], [], [], []
    for narrative in narratives:
        words = words_of(narrative["caption"])
        pieces = rank_pieces(narrative)
        if len(pieces) != len(words):
            raise ValueError(
                f"{narrative['image_id']}: {len(pieces)} utterances for {len(words)} words; "
                "without --truth every utterance must be one word"
            )
        spans = TOKENS[tokens](narrative["caption"])
        first = np.searchsorted([start for start, _ in spans], [start for start, _ in words])
        exact = token_centers(text_pieces(narrative), words)
        ranked, taken = token_centers(pieces, spans)[first], assign_tokens(pieces, spans)[first]
        for index in np.flatnonzero(~np.isnan(exact[:, 0]) & (taken >= 0)):
            other = taken[index]
            offset.append(abs(other - index))
            characters.append(abs(words[other][0] - words[index][0]))
            distance.append(np.hypot(*(ranked[index] - exact[index])))
        away += [pieces[index].center for index in np.flatnonzero(np.isnan(exact[:, 0]))]
    return {
        "words with a true place": len(offset),
        "words that take another word's piece": float(np.mean(np.array(offset) > 0)),
        "mean offset in words": float(np.mean(offset)),
        "mean offset in characters": float(np.mean(characters)),
        "mean distance to the true place": float(np.mean(distance)),
        "90th percentile of that distance": float(np.quantile(distance, 0.9)),
        "words far from the trace": len(away),
        "of these, extrapolated out of the image": sum(min(p) < 0 or max(p) > 1 for p in away),
    }


def speed(narratives: list[Narrative]) -> dict[str, float]:
    """Narratives aligned per second by one process."""
    rates = {}
    for mode, align in ALIGN.items():
        start = time.perf_counter()
        for narrative in narratives:
            align(narrative)
        rates[mode] = len(narratives) / (time.perf_counter() - start)
    return rates


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional], truth: Path | None = None
) -> None:
    """Compare the two alignments of narratives in the Localized Narratives format.

    Args:
        annotations: JSON Lines files.
        truth: the truth file that data.scenes writes beside them.
    """
    narratives = [json.loads(line) for file in annotations for line in open(file)]
    if truth:
        scenes = {scene["image_id"]: scene for scene in map(json.loads, open(truth))}
        for mode, tokens in (("text", "words"), ("rank", "words"), ("rank", "words and marks")):
            print_scores(f"{mode}, {tokens}", object_words(narratives, scenes, mode, tokens))
    else:
        for tokens in TOKENS:
            print_scores(f"rank, {tokens}", rank_error(narratives, tokens))
    points = sum(len(segment) for narrative in narratives for segment in narrative["traces"])
    print_scores(
        f"narratives aligned per second, {points / len(narratives):.0f} points each",
        speed(narratives),
    )


def print_scores(title: str, scores: dict[str, float]) -> None:
    print(title)
    for name, value in scores.items():
        print(f"  {name:50}{value:10.4g}" if isinstance(value, float) else f"  {name:50}{value:10}")


if __name__ == "__main__":
    tyro.cli(main)
