"""What is said about scenes: true, of one object only, and held back where it is promised."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from data.scene_expressions import (
    MARGIN,
    Description,
    expressions,
    follow_ups,
    is_held_back,
    parse_region,
    questions,
    referent,
    region_phrase,
)
from data.scene_narrations import BACKDROPS, SIZE_WORDS
from data.scene_worlds import COLOURS, KINDS, Scene, SceneObject, World
from data.scenes import Options, make_example

SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
NOUN = re.compile(
    rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(KINDS)}|object|thing)"
)
# words -> key by which one object is ahead of the others, and its least lead
PICKS = {
    "left": (lambda t: -t.center[0], MARGIN), "right": (lambda t: t.center[0], MARGIN),
    "top": (lambda t: -t.center[1], MARGIN), "bottom": (lambda t: t.center[1], MARGIN),
}  # fmt: skip
RELATION = re.compile(r" (?:to the )?(left of|right of|above|below|under) the ")


def meant(text: str, scene: Scene) -> list[int]:
    """An interpreter of its own: which objects the words of an expression could mean."""
    text = text.removeprefix("the ")
    head, *tail = RELATION.split(text)
    found = list(range(len(scene.objects)))
    pick = re.match(r"(largest|biggest|smallest|(?:left|right|top)(?:most)?|bottom) ", head)
    side = re.search(r" (?:on|at) the (left|right|top|bottom)$", head)
    noun = head.removeprefix(pick[0] if pick else "").removesuffix(side[0] if side else "")
    size, colour, kind = NOUN.fullmatch(noun).groups()
    found = [
        i for i, thing in enumerate(scene.objects)
        if (size is None or SIZES[size] == thing.size) and colour in (None, thing.colour)
        and kind in ("object", "thing", thing.kind)
    ]  # fmt: skip
    if tail:
        (anchor,) = meant(tail[1], scene)
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1)}.get(tail[0], (1, 1))
        start = scene.objects[anchor].center[axis]
        lead = {i: sign * (scene.objects[i].center[axis] - start) for i in found if i != anchor}
        assert not any(0 < value < MARGIN for value in lead.values()), text
        return [i for i, value in lead.items() if value >= MARGIN]
    if pick or side:
        word = (side or pick)[1].removesuffix("most")
        things = [scene.objects[i] for i in found]
        if word in PICKS:
            key, lead = PICKS[word]
            values = sorted(map(key, things))
            assert len(values) > 1 and values[-1] - values[-2] >= lead, text
            assert values[-1] > (0.5 if word in ("right", "bottom") else -0.5), text
        else:
            key = (lambda t: -t.side_px) if word == "smallest" else (lambda t: t.side_px)
            values = sorted((abs(key(t)) for t in things), reverse=word != "smallest")
            assert max(values[:2]) / min(values[:2]) >= 1.2, text
        return [found[things.index(max(things, key=key))]]
    return found


@pytest.fixture(scope="module")
def examples() -> list:
    crowded = World(objects=(5, 8), min_size=0.13, max_size=0.3, kinds=6)
    options = Options(Path("unused"))
    busy = Options(Path("unused"), world=crowded)
    return [make_example(o, "val", n) for o in (options, busy) for n in range(100)]


def test_every_expression_means_its_object_and_no_other(examples):
    for example in examples:
        for said in example.expressions:
            assert meant(said.text, example.scene) == [said.object], said.text


def test_every_object_has_one_to_three_different_expressions(examples):
    for example in examples:
        counts = Counter(said.object for said in example.expressions)
        assert set(counts) == set(range(len(example.scene.objects)))
        assert max(counts.values()) <= 3
        assert len({said.text for said in example.expressions}) == len(example.expressions)


def test_expressions_are_varied_and_marked(examples):
    every = [said for example in examples for said in example.expressions]
    relational = [said for said in every if said.kind == "relational"]
    assert 0.2 < len(relational) / len(every) < 0.6
    for said in every:
        compares = RELATION.search(said.text) or re.search("largest|biggest|smallest", said.text)
        assert (said.kind == "relational") == bool(compares), said.text
        assert said.kind == "relational" or not (said.relation_needed or said.unseen)
    needed = [said.relation_needed for said in relational]
    assert 0.2 < sum(needed) / len(needed) < 0.95
    words = {word for said in every for word in said.text.split()}
    assert {"left", "leftmost", "under", "largest", "smallest", "object", "large"} <= words
    assert len({said.text.split()[0] for said in every}) > 15


def test_a_needed_relation_is_one_without_which_several_objects_fit(examples):
    for example in examples:
        for said in example.expressions:
            if said.kind == "relational":
                head, *tail = RELATION.split(said.text)
                noun = re.sub(r"^(the )?(largest|biggest|smallest) ", "", head)
                fitting = set(meant(noun, example.scene))
                if tail:
                    fitting -= set(meant(tail[1], example.scene))
                assert said.relation_needed == (len(fitting) > 1), said.text


def triples(text: str, thing: SceneObject) -> list[tuple[str, str, str]]:
    """(kind, relation, anchor's kind) that a text about an object says."""
    found = RELATION.search(text)
    relation = {"left of": "left", "right of": "right", "under": "below"}
    return [(thing.kind, relation.get(found[1], found[1]), text.split()[-1])] if found else []


def test_training_never_says_what_is_held_back_and_validation_does(examples):
    options = Options(Path("unused"))
    training = [make_example(options, "train", index) for index in range(150)]
    for example in training:
        objects = {f"{thing.colour} {thing.kind}": thing for thing in example.scene.objects}
        for said in example.expressions:
            assert not said.unseen and not said.heldout_pair
            for triple in triples(said.text, example.scene.objects[said.object]):
                assert not is_held_back(*triple)
        for question, answer in example.questions:
            if answer in objects:
                for triple in triples(question.rstrip("?"), objects[answer]):
                    assert not is_held_back(*triple)
    every = [(example, said) for example in examples for said in example.expressions]
    for example, said in every:
        found = triples(said.text, example.scene.objects[said.object])
        assert said.unseen == any(is_held_back(*triple) for triple in found)
    assert 0.08 < sum(said.unseen for _, said in every) / sum(
        said.kind == "relational" for _, said in every
    ) < 0.25  # fmt: skip
    share = [is_held_back(a, r, b) for a in KINDS for r in ("left", "right") for b in KINDS]
    assert 0.1 < sum(share) / len(share) < 0.2


def test_expressions_about_held_out_pairs_are_marked(examples):
    marked = 0
    for example in examples:
        things = example.scene.objects
        for said in example.expressions:
            tail = RELATION.split(said.text)[1:]
            about = [said.object, *(meant(tail[1], example.scene) if tail else [])]
            assert said.heldout_pair == any(things[index].held_out for index in about)
            marked += said.heldout_pair
    assert marked > 5


def scene_of(*objects: tuple[str, str, float, float, float]) -> Scene:
    return Scene((100, 100), "sand", tuple(
        SceneObject(kind, colour, "medium", (x, y), side) for kind, colour, x, y, side in objects
    ))  # fmt: skip


def test_what_is_too_close_to_tell_has_no_referent():
    scene = scene_of(
        ("car", "red", 0.2, 0.5, 30), ("cup", "blue", 0.26, 0.2, 40), ("key", "pink", 0.8, 0.9, 34)
    )
    red, blue = Description("car", "red"), Description("cup", "blue")
    assert referent(scene, red) == 0 and referent(scene, Description()) is None
    assert referent(scene, Description(extreme="left")) is None  # 0.06 apart
    assert referent(scene, Description(extreme="right")) == 2
    assert referent(scene, Description(relation="right", anchor=red)) is None
    assert referent(scene, Description("key", relation="right", anchor=red)) == 2
    assert referent(scene, Description(relation="above", anchor=red)) == 1
    assert referent(scene, Description(extreme="largest")) is None  # 40 against 34
    assert referent(scene, Description("moon")) is None
    assert referent(scene, Description(relation="below", anchor=blue)) is None  # two of them
    assert referent(scene, Description(relation="left", anchor=Description())) is None
    assert referent(scene, Description("car", extreme="left")) is None  # the only car


def test_region_phrases_say_all_attributes_and_are_parsed_back(examples):
    seen = set()
    for example in examples:
        for thing, phrase in zip(example.scene.objects, example.phrases, strict=True):
            assert parse_region(phrase) == (thing.size, thing.colour, thing.kind)
            seen.add(phrase.split()[1])
    assert seen == set(SIZES.values())
    assert parse_region("A Big red car.") == ("large", "red", "car")
    for other in ("", "a red car", "a large red car in front of grass", "a huge red car",
                  "a large white building", "a large tree trunk"):  # fmt: skip
        assert parse_region(other) is None


def test_answers_are_true(examples):
    asked: Counter[str] = Counter()
    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
    for example in examples:
        things = example.scene.objects
        names = [f"{thing.colour} {thing.kind}" for thing in things]
        assert 3 <= len(example.questions) == len(dict(example.questions)) <= 6
        for question, answer in example.questions:
            asked[question.split()[0] + " " + question.split()[1]] += 1
            if found := re.fullmatch(r"How many (\w+)( objects)? are there\?", question):
                noun = found[1]
                right = len(things) if noun == "objects" else sum(
                    noun in (t.colour if found[2] else t.kind, t.kind + "s", t.kind + "es")
                    for t in things
                )  # fmt: skip
                assert numbers[right] == answer
                asked[answer] += 1
            elif found := re.fullmatch(r"What color is the (\w+)\?", question):
                assert [t.colour for t in things if t.kind == found[1]] == [answer]
            elif found := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
                assert answer == ("yes" if found[1] in names else "no")
                asked[answer] += 1
            elif question == "What is in the background?":
                assert answer == BACKDROPS[example.scene.background]
            else:
                text = "object " + question.removeprefix("What is ").rstrip("?")
                assert meant(text, example.scene) == [names.index(answer)]
                asked["relation"] += 1
    assert set(asked) >= {
        "How many", "What color", "Is there", "What is", "yes", "no", "relation",
        "zero", "one", "two", "three", "five", "six", "seven",
    }  # fmt: skip
    assert 0.35 < asked["yes"] / (asked["yes"] + asked["no"]) < 0.65
    assert asked["relation"] > len(examples) / 2


def test_follow_up_questions_are_about_the_object_named_last(examples):
    """Read by the interpreter of expressions: "it" is what the last answer but the size names."""
    lengths = Counter()
    for example in examples:
        things, said = example.scene.objects, ""
        names = [f"{thing.colour} {thing.kind}" for thing in things]
        lengths[len(example.talk)] += 1
        for question, answer in example.talk:
            if question == "Which size does it have?":
                assert answer == things[names.index(said)].size
                continue
            assert (" it?" in question) == bool(said)
            text = "object " + question.removeprefix("What is ").rstrip("?")
            assert meant(text.replace(" it", f" the {said}"), example.scene) == [
                names.index(answer)
            ]
            said = answer
    assert set(lengths) >= {2, 4} and lengths[0] < len(examples) / 10


def test_no_answer_to_a_kind_of_question_is_common(examples):
    """Catches questions that are answered by guessing: half the counts of kinds were "one"."""
    answers: dict[str, Counter[str]] = {}
    for example in examples[:100]:  # of two or three objects
        for question, answer in example.questions:
            answers.setdefault(" ".join(question.split()[:2]), Counter())[answer] += 1
    shares = {start: max(found.values()) / sum(found.values()) for start, found in answers.items()}
    assert shares["How many"] < 0.55 and shares["Is there"] < 0.6
    assert shares["What color"] < 0.3 and shares["What is"] < 0.2
    every = sum((found for found in answers.values()), Counter())
    assert max(every.values()) / sum(every.values()) < 0.25


def test_the_first_questions_of_a_scene_stay_as_they_were():
    """Catches draws before those that tables on disk were made with."""
    example = make_example(Options(Path("unused")), "train", 0)
    assert [said.text for said in example.expressions[1:5]] == [
        "moon above the white car", "left thing", "topmost object", "the white car"
    ]  # fmt: skip
    assert example.questions[:4] == [
        ("What is in the background?", "sand"),
        ("How many objects are there?", "three"),
        ("What is above the white moon?", "blue flower"),
        ("Is there a white moon?", "yes"),
    ]


def test_a_lone_object_can_be_described():
    scene = scene_of(("fish", "orange", 0.5, 0.5, 40))
    for seed in range(20):
        said = expressions(Random(seed), scene, for_training=True)
        assert all(expression.object == 0 and expression.kind == "plain" for expression in said)
        assert questions(Random(seed), scene, World(), for_training=False)
        assert follow_ups(Random(seed), scene, for_training=False) == []
    assert region_phrase(scene.objects[0]) == "a medium orange fish"
