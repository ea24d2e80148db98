"""Spoken narrations of scenes, and the hand that points while they are spoken.

The words come first (`describe`), then their times (`speak`), then the trace (`point_at`):
a hand that arrives at an object while its article or size is spoken, circles over it until the
clause is over, and moves on. The result has the irregularities of Localized Narratives:
word groups, pauses, pen-up stretches, points outside the image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from data.scene_images import COLOURS, KINDS, Scene, SceneObject

Order = Literal["left-to-right", "size", "random"]
Verbosity = Literal["short", "long"]

OPENINGS = (
    "In this image I can see", "In this picture I can see", "In this image there is",
    "In this picture there is", "In this image we can see", "Here we can see", "I can see",
    "There is", "This image shows",
)  # fmt: skip
CONNECTORS = (
    ", and", " and", ", and there is", ", then there is", ", then I can see", ", there is also",
    " and then", ". There is also", ". I can also see", ". Then we can see",
)  # fmt: skip
RELATED = (", {} there is", ", and {} there is", ", {} we can see", ", and {}", ". {} there is")
CLOSINGS = (
    ". In the background there is {}.", ". In the background I can see {}.",
    ". The background is {}.", ", and behind there is {}.",
)  # fmt: skip
BACKDROPS = {
    "grass": "grass",
    "sand": "sand",
    "water": "water",
    "bricks": "a brick wall",
    "wood": "a wooden floor",
    "sky": "the sky",
    "stone": "a stone wall",
    "tiles": "a tiled floor",
}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}
FILLERS = ("um", "uh", "okay", "so")
RATE = 60  # points per second while the hand moves

_MENTION = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(KINDS)})\b", re.IGNORECASE)


def object_mentions(caption: str) -> list[tuple[int, int, str, str]]:
    """The objects a caption names: (start, end, colour, kind), characters half open."""
    return [(*m.span(), m[1].lower(), m[2].lower()) for m in _MENTION.finditer(caption)]


@dataclass(frozen=True)
class Word:
    """A spoken word; `target` is an object's index, "background", or None for no place."""

    text: str
    target: int | str | None = None
    start: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Narration:
    """The Localized Narratives fields of a scene, and which object each mention is about.

    Args:
        timed_caption, traces: as published; x and y in [0, 1] of the image, seconds.
        mentions: {"start", "end", "object"}: characters of the caption, index in the scene.
    """

    caption: str
    timed_caption: list[dict[str, Any]]
    traces: list[list[dict[str, float]]]
    mentions: list[dict[str, int]]


def narrate(
    rng: Generator, scene: Scene, boxes: np.ndarray, order: Order, verbosity: Verbosity
) -> Narration:
    """Narrate a scene; `boxes` float[n, 4] are the objects' xyxy in [0, 1] of the image."""
    indices = _ordered(rng, scene.objects, order)
    words = _spoken(rng, _described(rng, scene, indices, verbosity))
    caption = " ".join(word.text for word in words)
    found = object_mentions(caption)
    mentions = [
        {"start": start, "end": end, "object": index}
        for (start, end, _, _), index in zip(found, indices, strict=True)
    ]
    return Narration(caption, _utterances(rng, words), _trace(rng, words, boxes), mentions)


def _ordered(rng: Generator, objects: tuple[SceneObject, ...], order: Order) -> list[int]:
    if order == "random":
        return [int(index) for index in rng.permutation(len(objects))]
    if order == "size":
        return sorted(range(len(objects)), key=lambda index: -objects[index].side_px)
    return sorted(range(len(objects)), key=lambda index: objects[index].center[0])


def _described(
    rng: Generator, scene: Scene, indices: list[int], verbosity: Verbosity
) -> list[Word]:
    """The words of the narration with their targets, punctuation attached, without times."""
    long = verbosity == "long"
    text: list[tuple[str, int | str | None]] = [(_pick(rng, OPENINGS), None)]
    for position, index in enumerate(indices):
        thing = scene.objects[index]
        if position:
            before = scene.objects[indices[position - 1]]
            text.append((_connector(rng, before, thing), None))
        if rng.random() < (0.15 if long else 0.06):
            text.append((_pick(rng, FILLERS), None))
        text.append((_noun_phrase(rng, thing, 0.9 if long else 0.4), index))
        if rng.random() < (0.5 if long else 0.2):
            text.append((_place(thing), index))
    if rng.random() < (0.9 if long else 0.5):
        opening, _, end = _pick(rng, CLOSINGS).partition(" {}")
        text += [(opening, None), (BACKDROPS[scene.background] + end, "background")]
    else:
        text.append((".", None))
    return _attach(text)


def _attach(text: list[tuple[str, int | str | None]]) -> list[Word]:
    """Split into words; punctuation at the start of a part belongs to the word before it."""
    words: list[Word] = []
    for part, target in text:
        for token in part.split():
            mark = token if token in {",", "."} else ""
            if token[0] in ",.":
                words[-1] = Word(words[-1].text + token[0], words[-1].target)
                continue
            words.append(Word(token + mark, target))
    return words


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun_phrase(rng: Generator, thing: SceneObject, with_size: float) -> str:
    words = f"{thing.colour} {thing.kind}"
    if rng.random() < with_size:
        words = f"{_pick(rng, SIZE_WORDS[thing.size])} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _connector(rng: Generator, before: SceneObject, thing: SceneObject) -> str:
    relation = _relation(rng, before, thing)
    if relation is None or rng.random() < 0.5:
        return _pick(rng, CONNECTORS)
    phrase = _pick(rng, RELATED)
    filled = phrase.format(relation.capitalize() if phrase[0] == "." else relation)
    return ". " + filled[2:] if phrase[0] == "." else filled


def _relation(rng: Generator, before: SceneObject, thing: SceneObject) -> str | None:
    """Where `thing` is, seen from `before`; None where no short word for it is true."""
    dx, dy = (thing.center[axis] - before.center[axis] for axis in (0, 1))
    if abs(dy) > 0.2 and abs(dy) > abs(dx):
        return _pick(rng, ("below it", "under it") if dy > 0 else ("above it",))
    if abs(dy) < 0.15 and abs(dx) < 0.5 and rng.random() < 0.5:
        return _pick(rng, ("next to it", "beside it"))
    if abs(dx) > 0.2 and abs(dx) > abs(dy):
        return "to the right of it" if dx > 0 else "to the left of it"
    return None


def _place(thing: SceneObject) -> str:
    """Where the object is in the image, by thirds of its sides."""
    column, row = (min(2, int(value * 3)) for value in thing.center)
    across, down = ("left", "", "right")[column], ("top", "", "bottom")[row]
    if across and down:
        return f"at the {down} {across}"
    if across:
        return f"on the {across}"
    return f"at the {down}" if down else "in the middle"


def _spoken(rng: Generator, words: list[Word]) -> list[Word]:
    """Give the words times: about 0.35 s each, with longer gaps between clauses."""
    pace = rng.uniform(0.85, 1.2)
    clock = rng.uniform(0, 0.5)
    timed = []
    for word in words:
        start = clock + rng.uniform(0, 0.06)
        letters = len(word.text.strip(",."))
        clock = start + pace * (0.14 + 0.05 * letters) * rng.uniform(0.85, 1.15)
        timed.append(Word(word.text, word.target, round(start, 3), round(clock, 3)))
        if word.text[-1] in ",.":
            clock += rng.uniform(0.1, 0.4) if word.text[-1] == "," else rng.uniform(0.3, 0.7)
    return timed


def _utterances(rng: Generator, words: list[Word]) -> list[dict[str, Any]]:
    """Timed words, some of them in groups as where a recogniser gives no finer times."""
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1][-1] if groups else None
        joins = last and last.target is None and word.target is None and last.text[-1] not in ",."
        if joins and len(groups[-1]) < 3 and rng.random() < 0.3:
            groups[-1].append(word)
        else:
            groups.append([word])
    timed = [
        {
            "utterance": " ".join(word.text for word in group),
            "start_time": group[0].start,
            "end_time": group[-1].end,
        }
        for group in groups
    ]
    if rng.random() < 0.05:  # as in the published files: a first utterance without length
        timed[0].update(start_time=0, end_time=0)
    return timed


@dataclass(frozen=True)
class _Visit:
    """The hand stays over `box` from `start` to `end` seconds."""

    start: float
    end: float
    box: np.ndarray  # (4,) xyxy


def _visits(rng: Generator, words: list[Word], boxes: np.ndarray) -> list[_Visit]:
    """One visit for every run of words with the same target, a little behind the voice."""
    visits: list[_Visit] = []
    previous = None
    for word in words:
        delay = rng.uniform(0, 0.25)
        if word.target is not None and word.target == previous:
            visits[-1] = _Visit(visits[-1].start, word.end + delay, visits[-1].box)
        elif word.target is not None:
            whole = np.array([0.08, 0.08, 0.92, 0.92])
            box = whole if word.target == "background" else boxes[word.target]
            visits.append(_Visit(word.start + delay, word.end + delay, box))
        previous = word.target
    return visits


def _trace(rng: Generator, words: list[Word], boxes: np.ndarray) -> list[list[dict[str, float]]]:
    """The pointer's points, one inner list per stretch in the image."""
    visits = _visits(rng, words, boxes)
    begin = max(0.0, visits[0].start - rng.uniform(0.3, 1.0))
    times = np.arange(begin, visits[-1].end + rng.uniform(0, 0.3), 1 / RATE)
    times = times + rng.uniform(-0.003, 0.003, size=len(times))
    path = _carrier(rng, visits, times) + _scribble(rng, visits, times)
    path += rng.normal(0, 0.0015, size=path.shape)
    kept, new_stretch = _lifted(rng, visits, times)
    stretches: list[list[dict[str, float]]] = [[]]
    for t, (x, y), keep, split in zip(times, path, kept, new_stretch, strict=True):
        if split and stretches[-1]:
            stretches.append([])
        if keep:
            stretches[-1].append(
                {"x": round(float(x), 4), "y": round(float(y), 4), "t": round(float(t), 3)}
            )
    return [stretch for stretch in stretches if stretch]


def _carrier(rng: Generator, visits: list[_Visit], times: np.ndarray) -> np.ndarray:
    """Where the hand is without its circling: at a box's centre, or on the way, (T, 2)."""
    first = rng.uniform(-0.06, 1.06, size=2)
    stops = [(times[0], first)]
    for visit in visits:
        center = (visit.box[:2] + visit.box[2:]) / 2 + rng.normal(0, 0.008, size=2)
        leave = max(stops[-1][0], visit.start - rng.uniform(0.3, 0.7))
        stops += [
            (leave, stops[-1][1]),
            (max(visit.start, leave + 0.15), center),
            (visit.end, center),
        ]
    path = np.zeros((len(times), 2))
    for (t0, p0), (t1, p1) in zip(stops[:-1], stops[1:], strict=True):
        share = np.clip((times - t0) / max(t1 - t0, 1e-3), 0, 1)[:, None]
        inside = times >= t0
        bow = rng.normal(0, 0.12) * (p1 - p0)[::-1] * (1, -1)
        moved = p0 + (p1 - p0) * share**2 * (3 - 2 * share) + bow * np.sin(np.pi * share)
        path[inside] = moved[inside]
    return path


def _scribble(rng: Generator, visits: list[_Visit], times: np.ndarray) -> np.ndarray:
    """Loops over each box, drifting, of 0.3 to 0.5 of its half size, (T, 2)."""
    offset = np.zeros((len(times), 2))
    for visit in visits:
        half = (visit.box[2:] - visit.box[:2]) / 2
        wide = half.max() > 0.4
        loops = rng.uniform(0.5, 0.8) if wide else rng.uniform(1.7, 2.3)
        turn = 2 * np.pi * (loops * rng.choice((-1, 1)) * (times - visit.start) + rng.random())
        drift = 2 * np.pi * (rng.uniform(0.15, 0.35, size=2) * times[:, None] + rng.random(2))
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1) * rng.uniform(0.3, 0.5, size=2)
        envelope = np.clip(np.minimum(times - visit.start, visit.end - times) / 0.15 + 1, 0, 1)
        offset += envelope[:, None] * half * (circle + 0.1 * np.sin(drift))
    return offset


def _lifted(
    rng: Generator, visits: list[_Visit], times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which times have a point, and which begin a new stretch, both bool[T]."""
    kept, split = np.ones(len(times), dtype=bool), np.zeros(len(times), dtype=bool)
    for before, after in zip(visits[:-1], visits[1:], strict=True):
        free = after.start - before.end
        action = rng.random()
        if free > 0.3 and action < 0.6:  # between objects the hand rests, or leaves the image
            start = before.end + rng.uniform(0, 0.5) * free
            end = start + rng.uniform(0.3, 0.5) * free
            kept &= (times < start) | (times > end)
            if action < 0.25:
                split[np.searchsorted(times, end).clip(max=len(times) - 1)] = True
    if rng.random() < 0.3:  # a short rest anywhere
        start = rng.uniform(times[0], times[-1])
        kept &= (times < start) | (times > start + rng.uniform(0.08, 0.2))
    return kept, split
