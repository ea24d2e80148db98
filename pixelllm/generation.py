"""From finished tokens to captions whose words have points, and words one by one as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pixelllm.detection import rescore
from pixelllm.records import Box
from pixelllm.tokenizer import Word, words_of_tokens

Row = TypeVar("Row")


def check_search(
    max_new_tokens: int, has_rules: bool = False, **search: int | float | bool
) -> None:
    """Raise ValueError for what no search takes; official rules are greedy or beam search."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected 1 or more")
    if search.get("num_beams", 1) < 1:
        raise ValueError(f"num_beams {search['num_beams']}: expected 1 (greedy) or more")
    if has_rules and (unknown := sorted(search.keys() - {"num_beams"})):
        raise ValueError(f"{', '.join(unknown)}: the official rules are greedy or beam search")


@dataclass(frozen=True)
class PlacedWord:
    """A word, the point it is about, the box around that, and the word's log-probability.

    Coordinates are in [0, 1] of the original image.
    """

    text: str
    point: tuple[float, float]
    box: tuple[float, float, float, float]
    log_prob: float


@dataclass(frozen=True)
class Caption:
    """A generated caption; `log_prob` is the sum over its tokens, the end token included."""

    text: str
    words: tuple[PlacedWord, ...]
    log_prob: float

    def to_json(self) -> dict[str, Any]:
        """The caption as plain lists, strings and numbers."""
        words = [{**asdict(w), "point": list(w.point), "box": list(w.box)} for w in self.words]
        return {"caption": self.text, "words": words, "log_prob": self.log_prob}


@dataclass(frozen=True)
class CaptionedBox:
    """An object found in an image: xyxy in [0, 1], what it is, and how sure the model is.

    `score` combines the detection's with the caption's probability.
    """

    box: Box
    caption: Caption
    score: float
    detection_score: float

    def to_json(self) -> dict[str, Any]:
        """The object as plain lists, strings and numbers."""
        scores = {"score": self.score, "detection_score": self.detection_score}
        return {"box": list(self.box), **self.caption.to_json(), **scores}


def rank(boxes: Tensor, scores: Tensor, captions: Sequence[Caption]) -> list[CaptionedBox]:
    """Captioned detections by falling confidence (reference, section 10).

    The caption's part is its probability per word, the end counted as one.

    Args:
        boxes: float32[M, 4]; scores: float32[M], of the detector.
    """
    log_probs = torch.tensor([c.log_prob / (len(c.words) + 1) for c in captions])
    combined = rescore(scores.cpu(), log_probs).tolist()
    rows = zip(boxes.tolist(), captions, combined, scores.tolist(), strict=True)
    found = [CaptionedBox(tuple(box), *rest) for box, *rest in rows]
    return sorted(found, key=lambda item: -item.score)


def join_chunks(chunks: Sequence[Sequence[Row]], num_images: int) -> list[Row]:
    """Rows image after image from chunks that each hold the same few prompts of every image."""
    rows: list[Row] = []
    for image in range(num_images):
        for chunk in chunks:
            step = len(chunk) // num_images
            rows += chunk[image * step : (image + 1) * step]
    return rows


def place_words(
    tokenizer: PreTrainedTokenizerFast, token_ids: Tensor, log_probs: Tensor, points: Tensor
) -> Caption:
    """One generated row as a caption.

    Args:
        token_ids: int64[T], from begin to end token, padding allowed.
        log_probs: float32[T].
        points: float32[T, 2, 2], corners in [0, 1] of the image, not clamped.
    """
    ids = token_ids.tolist()
    words = words_of_tokens(tokenizer, ids)
    scores = log_probs.tolist()
    placed = [
        place_word(
            word, [scores[i] for i in word.tokens], points[pointing_token(word, ids, tokenizer)]
        )
        for word in words
    ]
    return Caption(" ".join(word.text for word in words), tuple(placed), sum(scores))


def place_word(word: Word, log_probs: Sequence[float], corners: Tensor) -> PlacedWord:
    """Put the word at the middle of its two predicted corners, float32[2, 2]."""
    corners = corners.float().clamp(0, 1)
    x0, y0 = corners.amin(0).tolist()
    x1, y1 = corners.amax(0).tolist()
    return PlacedWord(word.text, ((x0 + x1) / 2, (y0 + y1) / 2), (x0, y0, x1, y1), sum(log_probs))


def pointing_token(word: Word, ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> int:
    """The last token of the word that is not punctuation: the one that has read all of it."""
    lexical = [i for i in word.tokens if any(map(str.isalnum, tokenizer.decode([ids[i]])))]
    return (lexical or word.tokens)[-1]


def stream_words(
    tokenizer: PreTrainedTokenizerFast, tokens: Iterable[tuple[int, Tensor, float]]
) -> Iterator[tuple[str, tuple[float, float], float]]:
    """Words as soon as the token after them shows that they are finished.

    Args:
        tokens: id, points float32[2, 2] and log-probability of every token, in order.

    Yields:
        (word, (x, y), log-probability of the word).
    """
    ids: list[int] = []
    corners: list[Tensor] = []
    scores: list[float] = []
    num_finished = 0

    def place(word: Word) -> tuple[str, tuple[float, float], float]:
        point = corners[pointing_token(word, ids, tokenizer)]
        placed = place_word(word, [scores[i] for i in word.tokens], point)
        return placed.text, placed.point, placed.log_prob

    for token, points, log_prob in tokens:
        ids.append(token)
        corners.append(points)
        scores.append(log_prob)
        for word in words_of_tokens(tokenizer, ids)[num_finished:-1]:
            num_finished += 1
            yield place(word)
    for word in words_of_tokens(tokenizer, ids)[num_finished:]:
        yield place(word)
