"""What PerceptionGPT writes about a table: answers to questions, and grounded captions.

Reference of PerceptionGPT, section 7. Both are generated, where the release is told the true
answers and reads boxes at their `<vis>`. Boxes are compared on the image, not on its square.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from pixelllm.evaluation.captions import score_captions
from pixelllm.evaluation.narrations import random_captions
from pixelllm.evaluation.overlap import box_iou
from pixelllm.evaluation.report import Evaluation, Limits, Scores
from pixelllm.perceiving import PerceptionGPT
from pixelllm.records import Phrase, Record
from pixelllm.tables import Table
from pixelllm.views import open_record_image
from pixelllm.written import Answer

TASKS = {"vqa": "question", "pointed": "pointed"}  # of the table, by that of the evaluation
Written = tuple[Record, Phrase, Answer]


def write_about(
    model: PerceptionGPT, table: Table, task: str, limits: Limits, in_turn: bool = False
) -> Iterator[Written]:
    """An answer to every phrase of the task, images in order, with a progress bar.

    Args:
        in_turn: the questions about an image are a conversation, answered by the model itself.

    Raises ValueError where the table has none.
    """
    wording = "conversation" if in_turn else task
    rows, left = table.positions(task), limits.limit or 10**9
    if not len(rows):
        raise ValueError(f"{table.path}: no {task!r} phrases to answer")
    for start in tqdm(range(0, len(rows), limits.batch_size), desc=task, unit="batch"):
        records = [table[int(row)] for row in rows[start : start + limits.batch_size]]
        chosen = [(r, [p for p in r.phrases if p.task == task]) for r in records]
        chosen, left = _first(chosen, left)
        if not chosen:
            return
        images = [open_record_image(record) for record, _ in chosen]
        asked = [[model.question(wording, p.context) for p in phrases] for _, phrases in chosen]
        answers = model.ask(images, asked, limits.beams, with_masks=False, in_turn=in_turn)
        for (record, phrases), of_image in zip(chosen, answers, strict=True):
            yield from ((record, *pair) for pair in zip(phrases, of_image, strict=True))


def _first(
    chosen: list[tuple[Record, list[Phrase]]], left: int
) -> tuple[list[tuple[Record, list[Phrase]]], int]:
    """As many phrases as are left, and how many are left then."""
    kept = []
    for record, phrases in chosen:
        if phrases[:left]:
            kept.append((record, phrases[:left]))
            left -= len(phrases[:left])
    return kept, left


def evaluate_answers(
    model: PerceptionGPT, table: Table, limits: Limits, in_turn: bool = False, task: str = "vqa"
) -> Evaluation:
    """The share of questions whose answer is the true one, letter case and a full stop aside.

    Args:
        in_turn: as in `write_about`.
        task: "vqa", or "pointed", where also the objects of the answers count, as those of grounded
            captions do.
    """
    found = list(write_about(model, table, TASKS[task], limits, in_turn))
    truths = [normalised(phrase.caption) for _, phrase, _ in found]
    right = [normalised(a.text) == t for (_, _, a), t in zip(found, truths, strict=True)]
    (_, most), *_ = Counter(truths).most_common(1)
    results = [{"question_id": p.id, "answer": a.text} for _, p, a in found]
    objects: Scores = {}
    if task == "pointed":
        objects = score_phrases([(p, a) for _, p, a in found])
        results = [{"question_id": p.id, **a.to_json()} for _, p, a in found]
    return Evaluation(
        metrics={"exact_answers": sum(right) / len(right), **objects},
        baselines={"exact_answers": most / len(truths)},
        num_examples=len(found),
        trivial="the most frequent answer to all questions",
        predictions={f"{task}_results.json": json.dumps(results)},
    )


def normalised(text: str) -> str:
    return text.strip().rstrip(".").lower()


def evaluate_grounded(
    model: PerceptionGPT, table: Table, limits: Limits, captions: Sequence[str]
) -> Evaluation:
    """Captions as text, and their objects: a phrase is right where a true one of its words is.

    `phrase_precision` is the share of written objects that overlap by more than a half an object
    that the true caption gives the same phrase; `phrase_recall` that of true ones found so.
    """
    found = list(write_about(model, table, "grounded", limits))
    references = {phrase.id: [phrase.caption] for _, phrase, _ in found}
    captions = captions or [phrase.caption for _, phrase, _ in found]
    drawn = dict(zip(references, random_captions(len(references), captions), strict=True))
    results = [{"id": p.id, "caption": a.text, **a.to_json()} for _, p, a in found]
    return Evaluation(
        metrics=score_phrases([(p, a) for _, p, a in found])
        | score_captions({p.id: a.text for _, p, a in found}, references),
        baselines=score_captions(drawn, references),
        num_examples=len(found),
        trivial="a random training caption",
        predictions={"grounded_results.json": json.dumps(results)},
    )


def score_phrases(found: Sequence[tuple[Phrase, Answer]]) -> Scores:
    """Precision and recall of the objects of all captions together; 0 where there are none."""
    right, written, found_true, true = 0, 0, 0, 0
    for phrase, answer in found:
        truth = [
            (phrase.caption[piece.start : piece.end].lower(), piece.box)
            for piece in phrase.pieces
            if piece.box is not None
        ]
        said = [
            (answer.text[m.start : m.end].lower(), answer.objects[n].box)
            for m in answer.mentions
            for n in m.objects
        ]
        fits = [
            [words == others and box_iou(box, other) > 0.5 for others, other in truth]
            for words, box in said
        ]
        right += sum(map(any, fits))
        found_true += sum(map(any, zip(*fits, strict=True)))
        written += len(answer.objects)
        true += len(truth)
    return {
        "phrase_precision": right / max(written, 1),
        "phrase_recall": found_true / max(true, 1),
    }
