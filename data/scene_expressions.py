"""What is said about the objects of scenes: region phrases, referring expressions, questions.

An expression is a `Description` before it is words. `referent` evaluates descriptions against
all objects of the scene, and only those are worded that mean exactly one of them by a clear
margin: one that nearly fits another object as well is dropped.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import NamedTuple

from data.scene_narrations import BACKDROPS, SIZE_WORDS
from data.scene_worlds import COLOURS, KINDS, Scene, SceneObject, World

MARGIN = 0.08  # what is left of something is so far left, as a share of the image's side
SIZE_MARGIN = 1.2  # the largest object is so many times larger than the next
TRIES = 5  # comparisons looked at for every object
HELD_BACK = 0.15  # share of (kind, relation, kind) that training never says
# Axis and sign along which an object is farther than its anchor, and the words for it
RELATIONS = {
    "left": (0, -1, ("left of", "to the left of")),
    "right": (0, 1, ("right of", "to the right of")),
    "above": (1, -1, ("above",)),
    "below": (1, 1, ("below", "under")),
}
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
LARGEST = {"largest": ("largest", "biggest"), "smallest": ("smallest",)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Description(NamedTuple):
    """What an expression says about the object it means; None where it says nothing.

    Args:
        kind, colour, size: as in `SceneObject`.
        extreme: of the objects that fit so far the one farthest to a side (`SIDES`), the
            largest or the smallest.
        relation, anchor: where it lies seen from another object (`RELATIONS`).
    """

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    extreme: str | None = None
    relation: str | None = None
    anchor: Description | None = None


class Expression(NamedTuple):
    """A referring expression and what evaluation may know about it.

    Args:
        text: lower case, without punctuation.
        object: index in the scene of the one object it means.
        kind: "plain", or "relational" if it compares objects by place or size.
        relation_needed: the words before the comparison fit other objects as well.
        unseen: its (kind, relation, anchor's kind) is one that training never says.
        heldout_pair: it is about an object, or its anchor is one, of a held-out colour-kind pair.
    """

    text: str
    object: int
    kind: str
    relation_needed: bool
    unseen: bool
    heldout_pair: bool


def is_held_back(kind: str, relation: str, anchor_kind: str) -> bool:
    """Whether training never says that the one kind is so related to the other."""
    return zlib.crc32(f"{kind} {relation} {anchor_kind}".encode()) % 1000 < 1000 * HELD_BACK


def referent(scene: Scene, description: Description) -> int | None:
    """The one object that is meant; None where it is none, several, or too close to tell."""
    found = [index for index, thing in enumerate(scene.objects) if _fits(thing, description)]
    if description.relation and description.anchor:
        anchor = referent(scene, description.anchor)
        if anchor is None:
            return None
        axis, sign, _ = RELATIONS[description.relation]
        start = scene.objects[anchor].center[axis]
        far = [sign * (scene.objects[index].center[axis] - start) for index in found]
        if any(0 < distance < MARGIN for distance in far):
            return None  # the anchor itself is at 0
        found = [index for index, distance in zip(found, far, strict=True) if distance > 0]
    if description.extreme:
        return _extreme(scene, found, description.extreme)
    return found[0] if len(found) == 1 else None


def _fits(thing: SceneObject, description: Description) -> bool:
    return (
        description.kind in (None, thing.kind)
        and description.colour in (None, thing.colour)
        and description.size in (None, thing.size)
    )


def _extreme(scene: Scene, found: list[int], extreme: str) -> int | None:
    """The object of several that lies farthest to a side and in that half, or is the largest."""
    things = [scene.objects[index] for index in found]
    if extreme in SIDES:
        axis, sign = SIDES[extreme]
        values, margin = [sign * (thing.center[axis] - 0.5) for thing in things], MARGIN
    else:
        sign = 1 if extreme == "largest" else -1
        values, margin = [sign * math.log(t.side_px) for t in things], math.log(SIZE_MARGIN)
    ranked = sorted(zip(values, found, strict=True), reverse=True)
    if len(ranked) < 2 or ranked[0][0] - ranked[1][0] < margin:
        return None
    return None if extreme in SIDES and ranked[0][0] <= 0 else ranked[0][1]


def region_phrase(thing: SceneObject) -> str:
    """All attributes in a fixed order: "a large red car".

    One word a size: where two share the chance of a size, a third size wins over either.
    """
    return f"a {thing.size} {thing.colour} {thing.kind}"


def parse_region(phrase: str) -> tuple[str, str, str] | None:
    """(size, colour, kind) of a phrase of the form of `region_phrase`; None for other text."""
    words = phrase.lower().strip(" .").split()
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    known = len(words) == 4 and words[1] in sizes and words[2] in COLOURS and words[3] in KINDS
    return (sizes[words[1]], words[2], words[3]) if known else None


def expressions(rng: Random, scene: Scene, for_training: bool) -> list[Expression]:
    """One to three expressions for every object, none of them twice.

    `for_training` leaves out the relations that are held back.
    """
    said = []
    for index, thing in enumerate(scene.objects):
        name, *others = _plain(thing)
        rng.shuffle(others)
        right = (d for d in others if referent(scene, d) == index)
        likely = [name, *islice(right, 2)]
        chosen = rng.sample(likely, rng.choice((1, 1, 2)))
        chosen += _relational(rng, scene, index, for_training)
        said += [_expression(rng, scene, index, description) for description in chosen]
    return said


def _plain(thing: SceneObject) -> list[Description]:
    """By its attributes, or by the side it is on; the first one always says which one it is."""
    sides = [Description(k, extreme=side) for side in SIDES for k in (None, thing.kind)]
    return [
        Description(thing.kind, thing.colour),
        Description(thing.kind, thing.colour, thing.size),
        Description(thing.kind),
        Description(thing.kind, size=thing.size),
        Description(colour=thing.colour),
        *sides,
    ]


def _relational(rng: Random, scene: Scene, index: int, for_training: bool) -> list[Description]:
    """At most one description by comparison; of some tried ones the first that needs it."""
    thing, found = scene.objects[index], []
    others = [other for other in scene.objects if other is not thing]
    for _ in range(TRIES):
        noun = rng.choice((None, thing.kind))
        if not others or rng.random() < 0.15:
            description = Description(noun, extreme=rng.choice(list(LARGEST)))
        else:
            other, relation = rng.choice(others), rng.choice(list(RELATIONS))
            if for_training and is_held_back(thing.kind, relation, other.kind):
                continue
            anchor = Description(other.kind, rng.choice((other.colour, other.colour, None)))
            description = Description(noun, relation=relation, anchor=anchor)
        if referent(scene, description) == index:
            found.append(description)
            if _needs_comparison(scene, description):
                return [description]
    return found[:1]


def _needs_comparison(scene: Scene, description: Description) -> bool:
    """Whether the noun fits several objects besides the anchor, which nobody takes it for."""
    fitting = [index for index, thing in enumerate(scene.objects) if _fits(thing, description)]
    anchor = referent(scene, description.anchor) if description.anchor else None
    return len([index for index in fitting if index != anchor]) > 1


def _expression(rng: Random, scene: Scene, index: int, description: Description) -> Expression:
    thing, anchor = scene.objects[index], None
    if description.anchor:
        anchor = scene.objects[referent(scene, description.anchor)]
    compares = description.relation or description.extreme in LARGEST
    return Expression(
        text=("the " if rng.random() < 0.5 else "") + _worded(rng, description),
        object=index,
        kind="relational" if compares else "plain",
        relation_needed=bool(compares) and _needs_comparison(scene, description),
        unseen=bool(anchor) and is_held_back(thing.kind, description.relation, anchor.kind),
        heldout_pair=thing.held_out or (anchor is not None and anchor.held_out),
    )


def _worded(rng: Random, description: Description) -> str:
    """The expression's words without an article."""
    size = rng.choice(SIZE_WORDS[description.size]) if description.size else None
    noun = description.kind or rng.choice(("object", "object", "thing"))
    words = " ".join(word for word in (size, description.colour, noun) if word)
    extreme = description.extreme
    if extreme in LARGEST:
        words = f"{rng.choice(LARGEST[extreme])} {words}"
    elif extreme:
        at = "on" if extreme in ("left", "right") else "at"
        forms = (f"{extreme} {words}", f"{extreme}most {words}", f"{words} {at} the {extreme}")
        words = rng.choice(forms[::2] if extreme == "bottom" else forms)
    if description.relation and description.anchor:
        relation = rng.choice(RELATIONS[description.relation][2])
        words = f"{words} {relation} the {_worded(rng, description.anchor)}"
    return words


def questions(rng: Random, scene: Scene, world: World, for_training: bool) -> list[tuple[str, str]]:
    """A few questions with their short answers; `for_training` as in `expressions`.

    The last ones make up for what the others ask rarely: counts that are not one, and places.
    """
    things = scene.objects
    kinds = Counter(thing.kind for thing in things)
    thing = rng.choice(things)
    many = [kind for kind, count in kinds.items() if count > 1] or list(kinds)
    asked = rng.choice((None, rng.choice(many)))
    count = kinds[asked] if asked else len(things)
    found = [
        (_how_many(plural(asked or "object")), _number(count)),
        _is_there(rng, scene, world),
        ("What is in the background?", BACKDROPS[scene.background]),
    ]
    if kinds[thing.kind] == 1:
        found.append((f"What color is the {thing.kind}?", thing.colour))
    anchor, relation = rng.choice(scene.objects), rng.choice(list(RELATIONS))
    found += _what_is(rng, scene, anchor, relation, for_training)
    chosen = rng.sample(found, min(len(found), 4))
    chosen += _counted(rng, scene, world, {question for question, _ in chosen})
    places = [(thing, relation) for thing in things for relation in RELATIONS]
    rng.shuffle(places)
    related = (pair for place in places for pair in _what_is(rng, scene, *place, for_training))
    chosen += islice((pair for pair in related if pair not in chosen), 1)
    return chosen


def follow_ups(rng: Random, scene: Scene, for_training: bool) -> list[tuple[str, str]]:
    """A question that is answered by an object, and questions about "it", the last one named.

    Empty where no object is told by a relation; `for_training` as in `expressions`.
    """
    rounds: list[tuple[str, str]] = []
    anchors, told = rng.sample(scene.objects, len(scene.objects)), set()
    while len(rounds) < 6:
        places = [(a, r) for a in anchors for r in rng.sample(list(RELATIONS), len(RELATIONS))]
        pairs = ((a, pair) for a, r in places for pair in _what_is(rng, scene, a, r, for_training))
        named = [t for t in scene.objects if f"{t.colour} {t.kind}" not in told]
        found = ((a, q, t) for a, (q, name) in pairs for t in named
                 if name == f"{t.colour} {t.kind}")  # fmt: skip
        anchor, question, thing = next(found, (None, "", None))
        if thing is None:
            break
        last = f"the {anchor.colour} {anchor.kind}"
        rounds.append((question.replace(last, "it") if rounds else question,
                       f"{thing.colour} {thing.kind}"))  # fmt: skip
        rounds.append(("Which size does it have?", thing.size))
        anchors, told = [thing], told | {last.removeprefix("the "), rounds[-2][1]}
    return rounds


def _how_many(nouns: str) -> str:
    return f"How many {nouns} are there?"


def plural(noun: str) -> str:
    """The noun of several; fish stay fish."""
    return noun if noun == "fish" else noun + ("es" if noun.endswith("h") else "s")


def _counted(rng: Random, scene: Scene, world: World, asked: set[str]) -> Iterator[tuple[str, str]]:
    """How many there are of a kind or colour; every count that occurs is as likely."""
    counts = Counter(plural(thing.kind) for thing in scene.objects)
    counts.update(f"{thing.colour} objects" for thing in scene.objects)
    nouns = [plural(kind) for kind in KINDS[: world.kinds]]
    nouns += [f"{colour} objects" for colour in list(COLOURS)[: world.colours]]
    nouns = [noun for noun in nouns if _how_many(noun) not in asked]
    count = rng.choice(sorted({counts[noun] for noun in nouns}))
    noun = rng.choice([noun for noun in nouns if counts[noun] == count])
    yield _how_many(noun), _number(count)


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _is_there(rng: Random, scene: Scene, world: World) -> tuple[str, str]:
    """Yes for half of them; absent pairs share a colour or a kind with an object if possible."""
    thing = rng.choice(scene.objects)
    colour, kind = thing.colour, thing.kind
    present = {(other.colour, other.kind) for other in scene.objects}
    absent = [pair for pair in world.pairs if pair not in present]
    is_present = rng.random() < 0.5 or not absent
    if not is_present:
        near = [pair for pair in absent if colour in pair or kind in pair]
        colour, kind = rng.choice(near or absent)
    name = f"{colour} {kind}"
    question = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name}?"
    return question, "yes" if is_present else "no"


def _what_is(
    rng: Random, scene: Scene, anchor: SceneObject, relation: str, for_training: bool
) -> Iterator[tuple[str, str]]:
    """The object that alone is so related to another one, if there is such an object."""
    name = Description(anchor.kind, anchor.colour)
    index = referent(scene, Description(relation=relation, anchor=name))
    if index is None:
        return
    thing = scene.objects[index]
    if not (for_training and is_held_back(thing.kind, relation, anchor.kind)):
        where = rng.choice(RELATIONS[relation][2])
        yield (
            f"What is {where} the {anchor.colour} {anchor.kind}?",
            f"{thing.colour} {thing.kind}",
        )
