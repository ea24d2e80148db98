"""Grounded captions of scenes: sentences whose noun phrases say which objects they mean.

They are written in the layout of Flickr30k Entities: the sentences of an image in a text file,
the boxes of what their phrases mean in an XML file.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import Any, NamedTuple

from data.scene_expressions import NUMBERS, plural
from data.scene_narrations import BACKDROPS
from data.scene_worlds import Scene

TYPES = {"car": "vehicles", "boat": "vehicles", "plane": "vehicles", "fish": "animals"}
OPENINGS = ("", "I can see", "The picture shows", "This is a scene with")


class Part(NamedTuple):
    """A stretch of a sentence.

    Args:
        text: words without punctuation, or one mark of punctuation.
        objects: indices in the scene of what they mean.
        is_scene: they mean the background.
    """

    text: str
    objects: tuple[int, ...] = ()
    is_scene: bool = False


def grounded_captions(rng: Random, scene: Scene) -> list[list[Part]]:
    """A sentence that names every object, from left to right, and where a kind has several
    objects a second one that counts them ("two cars and a red cup")."""
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].center[0])
    found = [[_name(scene, index) for index in order]]
    kinds: dict[str, list[int]] = defaultdict(list)
    for index in order:
        kinds[scene.objects[index].kind].append(index)
    if len(kinds) < len(order):
        found.append([_group(scene, members) for members in kinds.values()])
    return [_sentence(rng, scene, names) for names in found]


def _name(scene: Scene, index: int) -> Part:
    words = f"{scene.objects[index].colour} {scene.objects[index].kind}"
    return Part(f"{'an' if words[0] in 'aeiou' else 'a'} {words}", (index,))


def _group(scene: Scene, members: list[int]) -> Part:
    if len(members) == 1:
        return _name(scene, members[0])
    number = NUMBERS[len(members)] if len(members) < len(NUMBERS) else "many"
    return Part(f"{number} {plural(scene.objects[members[0]].kind)}", tuple(members))


def _sentence(rng: Random, scene: Scene, names: list[Part]) -> list[Part]:
    opening, with_background = rng.choice(OPENINGS), rng.random() < 0.5
    parts = [Part(opening)] if opening else []
    for place, name in enumerate(names):
        if place:
            parts.append(Part("and" if place == len(names) - 1 else ","))
        parts.append(name)
    if with_background:
        parts += [Part("in front of"), Part(BACKDROPS[scene.background], is_scene=True)]
    first = parts[0]
    capital = first._replace(text=first.text[0].upper() + first.text[1:])
    return [capital, *parts[1:], Part(".")]


def entity_files(
    captions: list[list[Part]], scene: Scene, objects: list[dict[str, Any]], file_name: str
) -> dict[str, str]:
    """The two files of an image, by name; `objects` are COCO's annotations of the scene's.

    A chain is what phrases mean: an object, which it shares its number with, several objects, or
    the background, which is the chain of no object and has no box.
    """
    chains: dict[tuple[int, ...], int] = {(i,): thing["id"] for i, thing in enumerate(objects)}
    lines = []
    for sentence in captions:
        tokens = []
        for part in sentence:
            if not part.objects and not part.is_scene:
                tokens.append(part.text)
                continue
            chain = chains.setdefault(part.objects, objects[0]["id"] + len(chains))
            kinds = [scene.objects[index].kind for index in part.objects]
            entity = TYPES.get(kinds[0], "other") if kinds else "scene"
            tokens.append(f"[/EN#{chain}/{entity} {part.text}]")
        lines.append(" ".join(tokens) + "\n")
    name = file_name.removesuffix(".jpg")
    return {
        f"Sentences/{name}.txt": "".join(lines),
        f"Annotations/{name}.xml": _boxes_xml(chains, scene.size, objects, file_name),
    }


def _boxes_xml(
    chains: dict[tuple[int, ...], int],
    size: tuple[int, int],
    objects: list[dict[str, Any]],
    file_name: str,
) -> str:
    """Corners in pixels from 1 on, borders included, as in PASCAL VOC."""
    parts = [
        f"<annotation>\n\t<filename>{file_name}</filename>\n\t<size>"
        f"<width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>\n"
    ]
    for index, thing in enumerate(objects):
        x, y, width, height = thing["bbox"]
        names = [f"<name>{chain}</name>" for means, chain in chains.items() if index in means]
        parts.append(
            f"\t<object>{''.join(names)}<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>\n"
        )
    if () in chains:
        flags = "<scene>1</scene><nobndbox>1</nobndbox>"
        parts.append(f"\t<object><name>{chains[()]}</name>{flags}</object>\n")
    return "".join([*parts, "</annotation>\n"])
