"""Grounded captions of scenes: every object named, groups counted, chains as published."""

from __future__ import annotations

import re
from random import Random
from xml.etree import ElementTree

from data.scene_captions import Part, entity_files, grounded_captions
from data.scene_worlds import Scene, SceneObject


def scene_of(*objects: tuple[str, str, float]) -> Scene:
    return Scene((100, 200), "sand", tuple(
        SceneObject(kind, colour, "medium", (x, 0.5), 30.0) for colour, kind, x in objects
    ))  # fmt: skip


FISHES = scene_of(("red", "fish", 0.8), ("orange", "cup", 0.5), ("blue", "fish", 0.1))
OBJECTS = [{"id": 70 + n, "bbox": [n, 10, 20, 30]} for n in range(3)]


def named(sentence: list[Part]) -> list[tuple[str, tuple[int, ...]]]:
    return [(part.text.lower(), part.objects) for part in sentence if part.objects]


def test_objects_are_named_from_left_to_right_and_then_counted():
    for seed in range(20):
        each, counted = grounded_captions(Random(seed), FISHES)
        assert named(each) == [("a blue fish", (2,)), ("an orange cup", (1,)), ("a red fish", (0,))]
        assert named(counted) == [("two fish", (2, 0)), ("an orange cup", (1,))]
        for sentence in (each, counted):
            assert sentence[0].text[0].isupper() and sentence[-1].text == "."


def test_wordings_vary_and_name_the_background_at_times():
    sentences = [grounded_captions(Random(seed), FISHES)[0] for seed in range(60)]
    assert len({" ".join(part.text for part in s) for s in sentences}) == 8
    scenes = [[part.text for part in s if part.is_scene] for s in sentences]
    assert 15 < sum(found == ["sand"] for found in scenes) < 45


def test_a_lone_object_has_one_sentence():
    (sentence,) = grounded_captions(Random(0), scene_of(("red", "cup", 0.5)))
    assert named(sentence) == [("a red cup", (0,))]


def test_files_have_chains_of_objects_of_groups_and_of_the_scene():
    each = [Part("A blue fish", (2,)), Part("in front of"), Part("sand", (), True), Part(".")]
    files = entity_files([each, [Part("Two fish", (2, 0)), Part(".")]], FISHES, OBJECTS, "07.jpg")
    assert files["Sentences/07.txt"] == (
        "[/EN#72/animals A blue fish] in front of [/EN#73/scene sand] .\n"
        "[/EN#74/animals Two fish] .\n"
    )
    root = ElementTree.fromstring(files["Annotations/07.xml"])
    assert [(size.tag, size.text) for size in root.find("size")] == [
        ("width", "200"), ("height", "100"), ("depth", "3"),
    ]  # fmt: skip
    *boxed, background = root.findall("object")
    chains = [[name.text for name in entry.findall("name")] for entry in boxed]
    assert chains == [["70", "74"], ["71"], ["72", "74"]]
    corners = [[int(corner.text) for corner in entry.find("bndbox")] for entry in boxed]
    assert corners == [[1 + n, 11, 20 + n, 40] for n in range(3)]
    assert background.findtext("name") == "73" and background.find("bndbox") is None


def test_sentences_are_tokens_as_published():
    (sentence, _) = grounded_captions(Random(1), FISHES)
    text = entity_files([sentence], FISHES, OBJECTS, "1.jpg")["Sentences/1.txt"]
    assert re.sub(r"\[/EN#\d+/\w+ |\]", "", text).split() == [
        word for part in sentence for word in part.text.split()
    ]
