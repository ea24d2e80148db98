"""Questions about scenes with answers in sentences, which point at the objects they mention.

They are written in the layout of Shikra-RD: JSON lines with marked phrases and lists of boxes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from random import Random
from typing import Any

from data.scene_captions import Part
from data.scene_expressions import (
    NUMBERS,
    RELATIONS,
    Description,
    is_held_back,
    plural,
    referent,
)
from data.scene_worlds import Scene

Answered = tuple[str, list[Part]]  # a question and the parts of its answer


def pointing_answers(rng: Random, scene: Scene, for_training: bool) -> list[Answered]:
    """How many of a kind there are, which color one has, and what is related to another.

    `for_training` leaves out the relations that are held back.
    """
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, thing in enumerate(scene.objects):
        kinds[thing.kind].append(index)
    found = [_counted(*rng.choice(list(kinds.items())))]
    alone = [members[0] for members in kinds.values() if len(members) == 1]
    if alone:
        index = rng.choice(alone)
        thing = scene.objects[index]
        answer = [Part(f"The {thing.kind}", (index,)), Part(f"is {thing.colour}.")]
        found.append((f"What color is the {thing.kind}?", answer))
    return found + _related(rng, scene, for_training)


def _counted(kind: str, members: list[int]) -> Answered:
    if len(members) == 1:
        said = [Part("There is"), Part(f"one {kind}", tuple(members)), Part(".")]
    else:
        words = f"{NUMBERS[len(members)]} {plural(kind)}"
        said = [Part("There are"), Part(words, tuple(members)), Part(".")]
    return f"How many {plural(kind)} are there?", said


def _related(rng: Random, scene: Scene, for_training: bool) -> list[Answered]:
    """One question whose answer is the only object so related to another, if there is one."""
    pairs = [(a, r) for a in range(len(scene.objects)) for r in RELATIONS]
    for index, relation in rng.sample(pairs, len(pairs)):
        anchor = scene.objects[index]
        name = Description(anchor.kind, anchor.colour)
        found = referent(scene, Description(relation=relation, anchor=name))
        if found is None:
            continue
        thing = scene.objects[found]
        if for_training and is_held_back(thing.kind, relation, anchor.kind):
            continue
        where, other = rng.choice(RELATIONS[relation][2]), f"the {anchor.colour} {anchor.kind}"
        said = Part(f"The {thing.colour} {thing.kind}", (found,))
        answer = [said, Part(f"is {where}"), Part(other, (index,)), Part(".")]
        return [(f"What is {where} {other}?", answer)]
    return []


def shikra_line(question: str, answer: list[Part], boxes: list[list[int]], image: str) -> str:
    """An entry; `boxes` are corners in pixels of all objects, in the scene's order."""
    words = [f"<ph_st>{p.text}<ph_ed>" if p.objects else p.text for p in answer]
    told = " ".join(words).replace(" .", ".")
    entry: dict[str, Any] = {
        "img_path": image,
        "question": question,
        "question_boxes_seq": [],
        "answer": told.replace("<ph_st>", "").replace("<ph_ed>", ""),
        "cot_with_ans": told,
        "answer_boxes_seq": [list(part.objects) for part in answer if part.objects],
        "boxes": boxes,
    }
    return json.dumps(entry)
