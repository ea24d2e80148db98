"""What an example is: one image with phrases, each with a location prompt and a place per word.

Every task of the project is this one record (paper, section 3): location prompt and context
text in, words out, a point pair per word where it is known, optionally a box and a mask.
Records are stored as Arrow tables (`pixelllm.tables`), one row each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Features, Image, List, Value

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Piece:
    """A stretch of the caption and where it points.

    Args:
        start, end: characters of the caption, half open. Both -1 where only the order of the
            pieces is known (`rank` alignment, see `pixelllm.alignment`).
        center: time-averaged point, or None where the words point nowhere.
        box: xyxy around the piece of trace, or None where the words point nowhere.
    """

    start: int
    end: int
    center: Point | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Phrase:
    """One prompt and the words it asks for.

    Args:
        id: unique in its table, names the phrase in errors and predictions.
        task: "narration", "caption", "grounded", "region", "referring", "question" or "pointed", a
            question whose answer points; selects the source.
        caption: the target words.
        context: text given to the model before it writes, without a template.
        prompt_box: location prompt; None is the whole image.
        pieces: in the order of the caption.
        target_box: the box the phrase refers to.
        mask: COCO run-length encoding of the same, `{"size": [H, W], "counts": str}`.
    """

    id: str
    task: str
    caption: str
    context: str = ""
    prompt_box: Box | None = None
    pieces: tuple[Piece, ...] = ()
    target_box: Box | None = None
    mask: dict[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """An image with its phrases.

    Args:
        id: the image's name in its corpus, e.g. "mscoco_val2017/137576".
        size: (H, W) of the original image after its EXIF rotation.
        phrases: at least one.
        path, data: where the image lies, or its encoded bytes; exactly one is given.
    """

    id: str
    size: tuple[int, int]
    phrases: tuple[Phrase, ...]
    path: str | None = None
    data: bytes | None = None


_FLOATS = List(Value("float32"))  # empty where the value is None
_PIECE = {"start": Value("int32"), "end": Value("int32"), "center": _FLOATS, "box": _FLOATS}
_PHRASE = {
    "id": Value("string"),
    "task": Value("string"),
    "caption": Value("string"),
    "context": Value("string"),
    "prompt_box": _FLOATS,
    "pieces": List(_PIECE),
    "target_box": _FLOATS,
    "mask_size": List(Value("int32")),
    "mask_counts": Value("string"),
}
FEATURES = Features(
    {
        "id": Value("string"),
        "size": List(Value("int32"), length=2),
        "image": Image(decode=False),  # {"path", "bytes"}; decoded by pixelllm.images
        "phrases": List(_PHRASE),
    }
)


def to_row(record: Record) -> dict[str, Any]:
    """The record as a row of `FEATURES`."""
    return {
        "id": record.id,
        "size": list(record.size),
        "image": {"path": record.path, "bytes": record.data},
        "phrases": [_phrase_row(phrase) for phrase in record.phrases],
    }


def from_row(row: dict[str, Any]) -> Record:
    """The inverse of `to_row`."""
    return Record(
        id=row["id"],
        size=tuple(row["size"]),
        phrases=tuple(_phrase_from_row(phrase) for phrase in row["phrases"]),
        path=row["image"]["path"],
        data=row["image"]["bytes"],
    )


def _phrase_row(phrase: Phrase) -> dict[str, Any]:
    row = dict(vars(phrase))  # `asdict` copies deeply, which costs more than the rest
    mask = row.pop("mask")
    row["pieces"] = [
        {**vars(piece), "center": list(piece.center or ()), "box": list(piece.box or ())}
        for piece in phrase.pieces
    ]
    row["prompt_box"] = list(phrase.prompt_box or ())
    row["target_box"] = list(phrase.target_box or ())
    row["mask_size"] = list(mask["size"]) if mask else []
    row["mask_counts"] = mask["counts"] if mask else ""
    return row


def _phrase_from_row(row: dict[str, Any]) -> Phrase:
    pieces = tuple(
        Piece(p["start"], p["end"], tuple(p["center"]) or None, tuple(p["box"]) or None)
        for p in row["pieces"]
    )
    mask = {"size": row["mask_size"], "counts": row["mask_counts"]} if row["mask_size"] else None
    return Phrase(
        id=row["id"],
        task=row["task"],
        caption=row["caption"],
        context=row["context"],
        prompt_box=tuple(row["prompt_box"]) or None,
        pieces=pieces,
        target_box=tuple(row["target_box"]) or None,
        mask=mask,
    )
