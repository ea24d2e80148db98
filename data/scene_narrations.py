"""Spoken narrations of scenes, and the hand that points while they are spoken.

The words come first (`describe`), then their times (`speak`), then the trace (`point_at`):
a hand that arrives at an object while its article or size is spoken, circles over it until the
clause is over, and moves on. The result has the irregularities of Localized Narratives:
word groups, pauses, pen-up stretches, points outside the image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from data.scene_worlds import COLOURS, KINDS, Scene, SceneObject

Order = Literal["left-to-right", "size", "random"]
Verbosity = Literal["short", "long"]
Target = int | Literal["background"] | None  # an object's index, the background, no place

OPENINGS = (
    "In this image I can see", "In this picture I can see", "In this image there is",
    "In this picture there is", "In this image we can see", "Here we can see", "Here I see",
    "I can see", "There is", "This image shows", "This picture shows", "This is an image of",
)  # fmt: skip
CONNECTORS = (
    ", and", " and", " and also", ", and there is", ", then there is", ", then I can see",
    ", there is also", " and then", ". There is also", ". I can also see", ". Then we can see",
    ". I also see",
)  # fmt: skip
RELATED = (", {} there is", ", and {} there is", ", {} we can see", ", and {}", ". {} there is")
CLOSINGS = (
    ". In the background there is {}.", ". In the background I can see {}.",
    ". The background is {}.", ". Behind there is {}.", ", in front of {}.",
)  # fmt: skip
BACKDROPS = {
    "grass": "grass", "sand": "sand", "water": "water", "bricks": "a brick wall",
    "wood": "a wooden floor", "sky": "the sky", "stone": "a stone wall", "tiles": "a tiled floor",
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}
FILLERS = ("um", "uh", "well", "maybe")
# Chances of a filler, a size, a place, the background
CHANCES = {"short": (0.06, 0.35, 0.12, 0.3), "long": (0.15, 0.9, 0.5, 0.9)}
RATE = 60  # points per second while the hand moves
WHOLE = np.array([0.08, 0.08, 0.92, 0.92])  # where it sweeps for the background

_MENTION = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(KINDS)})\b", re.IGNORECASE)


def object_mentions(caption: str) -> list[tuple[int, int, str, str]]:
    """The objects a caption names: (start, end, colour, kind), characters half open."""
    return [(*m.span(), m[1].lower(), m[2].lower()) for m in _MENTION.finditer(caption)]


@dataclass(frozen=True)
class Word:
    """A spoken word, what it is about, and its seconds."""

    text: str
    target: Target = None
    start: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Narration:
    """The published Localized Narratives fields, and which object each mention is about."""

    caption: str
    timed_caption: list[dict[str, Any]]
    traces: list[list[dict[str, float]]]  # x and y in [0, 1] of the image, t in seconds
    mentions: list[dict[str, int]]  # start and end in the caption, object in the scene


def narrate(
    rng: Generator, scene: Scene, boxes: np.ndarray, order: Order, verbosity: Verbosity
) -> Narration:
    """Narrate a scene; `boxes` float[n, 4] are the objects' xyxy in [0, 1] of the image."""
    indices = _ordered(rng, scene.objects, order)
    words = _spoken(rng, _described(rng, scene, indices, verbosity))
    caption = " ".join(word.text for word in words)
    found = zip(object_mentions(caption), indices, strict=True)
    mentions = [{"start": m[0], "end": m[1], "object": index} for m, index in found]
    return Narration(caption, _utterances(rng, words), _trace(rng, words, boxes), mentions)


def _ordered(rng: Generator, objects: tuple[SceneObject, ...], order: Order) -> list[int]:
    if order == "random":
        return rng.permutation(len(objects)).tolist()
    keys = {"size": lambda i: -objects[i].side_px, "left-to-right": lambda i: objects[i].center[0]}
    return sorted(range(len(objects)), key=keys[order])


def _described(
    rng: Generator, scene: Scene, indices: list[int], verbosity: Verbosity
) -> list[Word]:
    """The words of the narration with their targets, punctuation attached, without times."""
    filler, size, place, background = CHANCES[verbosity]
    text: list[tuple[str, Target]] = [(_pick(rng, OPENINGS), None)]
    for position, index in enumerate(indices):
        thing = scene.objects[index]
        if position:
            before = scene.objects[indices[position - 1]]
            text.append((_connector(rng, scene, before, thing), None))
        if position and rng.random() < filler:
            text.append((_pick(rng, FILLERS), None))
        text.append((_noun_phrase(rng, thing, size), index))
        if rng.random() < place:
            text.append((_place(thing), index))
    if rng.random() < background:
        opening, _, end = _pick(rng, CLOSINGS).partition(" {}")
        text += [(opening, None), (BACKDROPS[scene.background] + end, "background")]
    else:
        text.append((".", None))
    return _attach(text)


def _attach(text: list[tuple[str, Target]]) -> list[Word]:
    """Split into words; a mark that opens a part belongs to the word before it."""
    words: list[Word] = []
    for part, target in text:
        if part[0] in ",.":
            words[-1] = replace(words[-1], text=words[-1].text + part[0])
        for token in part.lstrip(",.").split():
            opens = not words or words[-1].text[-1] == "."
            words.append(Word(token[0].upper() + token[1:] if opens else token, target))
    return words


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun_phrase(rng: Generator, thing: SceneObject, with_size: float) -> str:
    words = f"{thing.colour} {thing.kind}"
    if rng.random() < with_size:
        words = f"{_pick(rng, SIZE_WORDS[thing.size])} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _connector(rng: Generator, scene: Scene, before: SceneObject, thing: SceneObject) -> str:
    relation = _relation(rng, scene, before, thing)
    if relation is None or rng.random() < 0.6:
        return _pick(rng, CONNECTORS)
    return _pick(rng, RELATED).format(relation)


def _relation(rng: Generator, scene: Scene, before: SceneObject, thing: SceneObject) -> str | None:
    """Where `thing` is, seen from `before`; None where no short word for it is true."""
    dx, dy = (thing.center[axis] - before.center[axis] for axis in (0, 1))
    if abs(dy) > 0.2 and abs(dy) > abs(dx):
        return _pick(rng, ("below it", "under it") if dy > 0 else ("above it",))
    between = abs(dx) - (thing.side_px + before.side_px) / 2 / scene.size[1]
    if abs(dy) < 0.15 and between < 0.15 and rng.random() < 0.5:
        return _pick(rng, ("next to it", "beside it"))
    if abs(dx) > 0.2 and abs(dx) > abs(dy):
        return "to the right of it" if dx > 0 else "to the left of it"
    return None


def _place(thing: SceneObject) -> str:
    """Where the object is in the image, by thirds of its sides."""
    column, row = (min(2, int(value * 3)) for value in thing.center)
    across, down = ("left", "", "right")[column], ("top", "", "bottom")[row]
    if down:
        return f"at the {down} {across}".strip()
    return f"on the {across}" if across else "in the middle"


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
        {"utterance": " ".join(w.text for w in g), "start_time": g[0].start, "end_time": g[-1].end}
        for g in groups
    ]
    if rng.random() < 0.05:  # as in the published files: a first utterance without length
        timed[0].update(start_time=0, end_time=0)
    return timed


@dataclass(frozen=True)
class _Visit:
    """The hand circles over `box`, xyxy, so many times a second, from `start` to `end` seconds."""

    start: float
    end: float
    box: np.ndarray
    loops: float


def _visits(rng: Generator, words: list[Word], boxes: np.ndarray) -> list[_Visit]:
    """One visit for every run of words with the same target, a little behind the voice."""
    visits: list[_Visit] = []
    previous = None
    for word in words:
        late = word.end + rng.uniform(0, 0.25)
        if word.target is not None and word.target == previous:
            visits[-1] = replace(visits[-1], end=late)
        elif word.target == "background":
            visits.append(_Visit(word.start, late, WHOLE, rng.uniform(0.5, 0.8)))
        elif word.target is not None:
            begin = word.start + rng.uniform(0, 0.25)
            visits.append(_Visit(begin, late, boxes[word.target], rng.uniform(1.7, 2.3)))
        previous = word.target
    return visits


def _trace(rng: Generator, words: list[Word], boxes: np.ndarray) -> list[list[dict[str, float]]]:
    """The pointer's points, one inner list per stretch without lifting."""
    visits = _visits(rng, words, boxes)
    begin = max(0.0, visits[0].start - rng.uniform(0.3, 1.0))
    times = np.arange(begin, visits[-1].end + rng.uniform(0, 0.3), 1 / RATE)
    times += rng.uniform(-0.003, 0.003, size=len(times))
    path = _carrier(rng, visits, times) + _scribble(rng, visits, times)
    path += rng.normal(0, 0.0015, size=path.shape)
    kept, lifts = _rests(rng, visits, times)
    stretches = np.searchsorted(lifts, times)[kept]
    values = np.column_stack([path.round(4), times.round(3)])[kept]
    points = [{"x": x, "y": y, "t": t} for x, y, t in values.tolist()]
    edges = [0, *np.flatnonzero(np.diff(stretches)) + 1, len(points)]
    return [points[start:end] for start, end in pairwise(edges)]


def _carrier(rng: Generator, visits: list[_Visit], times: np.ndarray) -> np.ndarray:
    """Where the hand is but for its circling: near a box's centre, or on the way; float[n, 2]."""
    stops = [(times[0], rng.uniform(-0.06, 1.06, size=2))]
    for visit in visits:
        center = (visit.box[:2] + visit.box[2:]) / 2 + rng.normal(0, 0.012, size=2)
        leave = max(stops[-1][0], visit.start - rng.uniform(0.3, 0.7))
        arrive = max(visit.start, leave + 0.15)
        stops += [(leave, stops[-1][1]), (arrive, center), (max(arrive, visit.end), center)]
    path = np.tile(stops[-1][1], (len(times), 1))
    edges = np.searchsorted(times, [moment for moment, _ in stops])
    for number, ((start, source), (end, target)) in enumerate(pairwise(stops)):
        first, last = edges[number], edges[number + 1]
        if source is target:
            path[first:last] = source
            continue
        share = ((times[first:last] - start) / max(end - start, 1e-6))[:, None]
        bow = rng.normal(0, 0.12) * (target - source)[::-1] * (1, -1)
        eased = share**2 * (3 - 2 * share)
        path[first:last] = source + (target - source) * eased + bow * np.sin(np.pi * share)
    return path


def _scribble(rng: Generator, visits: list[_Visit], times: np.ndarray) -> np.ndarray:
    """Drifting loops over every visited box, of 0.3 to 0.5 of its half size; float[n, 2]."""
    offset = np.zeros((len(times), 2))
    for visit in visits:
        first, last = np.searchsorted(times, (visit.start - 0.15, visit.end + 0.15))
        clock = times[first:last, None]
        fade = np.minimum(clock - visit.start, visit.end - clock) / 0.15 + 1
        loops = visit.loops * rng.choice((-1, 1)) * clock + rng.random() + (0, 0.25)
        drift = rng.uniform(0.15, 0.35, size=2) * clock + rng.random(2)
        circle = rng.uniform(0.3, 0.5, size=2) * np.sin(2 * np.pi * loops)
        half = (visit.box[2:] - visit.box[:2]) / 2
        wander = 0.15 * np.sin(2 * np.pi * drift)
        offset[first:last] += fade.clip(0, 1) * half * (circle + wander)
    return offset


def _rests(
    rng: Generator, visits: list[_Visit], times: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """Which times have a point, bool[n], and when the pointer comes back after it was lifted."""
    kept, lifts = np.ones(len(times), dtype=bool), []
    for before, after in pairwise(visits):
        free, chance = after.start - before.end, rng.random()
        if free > 0.3 and chance < 0.6:
            start = before.end + rng.uniform(0, 0.5) * free
            end = start + rng.uniform(0.3, 0.5) * free
            kept &= (times < start) | (times > end)
            if chance < 0.25:
                lifts.append(end)
    if rng.random() < 0.3:  # a short rest anywhere
        start = rng.uniform(times[0], times[-1])
        kept &= (times < start) | (times > start + rng.uniform(0.08, 0.2))
    return kept, lifts
