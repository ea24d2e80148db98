"""Published layouts of scenes: narratives, COCO, refer, MDETR, SeqTR, VG, LLaVA, Flickr30k.

Everything a scene adds to every file is made in one place (`entries_of`), as text, and put
together in another (`write_annotations`). A scene's annotations, regions and expressions are
numbered from `Example.first_id` on, so that ids are unique over splits and depend on the scene
alone; an object's region, annotation and ref share their number.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from pycocotools import mask as coco_mask

from data.scene_answers import Answered, shikra_line
from data.scene_captions import Part, entity_files
from data.scene_expressions import Expression
from data.scene_narrations import BACKDROPS, Narration
from data.scene_worlds import COLOURS, KINDS, Scene

REFS_FILE = "refer/refs(unc).p"
ENTITIES_FILE = "flickr30k/annotations.zip"
INFO = {"description": "procedural scenes", "version": "2.0"}
WHOLE = ""  # name of a list that is a whole file


@dataclass(frozen=True)
class Example:
    """A scene with all that is written about it."""

    split: str
    image_id: int
    first_id: int  # of its annotations, regions and expressions
    scene: Scene
    image: np.ndarray  # uint8[H, W, 3]
    masks: np.ndarray  # bool[n, H, W], visible parts
    boxes: np.ndarray  # float[n, 4], xyxy in [0, 1], of the visible parts
    narration: Narration
    annotator: int
    phrases: list[str]  # a region phrase per object
    expressions: list[Expression]
    questions: list[tuple[str, str]]  # with answers
    talk: list[tuple[str, str]]  # rounds, where what is said depends on what was; or nothing
    captions: list[list[Part]]  # grounded sentences
    answered: list[Answered]  # questions with pointing answers

    @property
    def file_name(self) -> str:
        return f"{self.image_id:012d}.jpg"


class Entries(NamedTuple):
    """What a scene adds to the annotation files, by file name; all but refs as JSON text."""

    lines: dict[str, str]  # files of lines
    lists: dict[str, dict[str, list[str]]]  # JSON files: entries by the name of their list
    refs: list[dict[str, Any]]  # of the one pickled file
    members: dict[str, str]  # of the one archive


def entries_of(example: Example) -> Entries:
    """Everything that is written about a scene but its picture."""
    split, objects = example.split, instances(example)
    caption = {"id": example.first_id, "image_id": example.image_id,
               "caption": short_caption(example)}  # fmt: skip
    images, annotations = _texts([_image(example)]), _texts(objects)
    mdetr_images, mdetr_annotations = _mdetr(example, objects)
    lists = {
        f"instances_{split}.json": {"images": images, "annotations": annotations},
        f"captions_{split}.json": {"images": images, "annotations": _texts([caption])},
        "refer/instances.json": {"images": images, "annotations": annotations},
        f"mdetr/finetune_scenes_{split}.json": {
            "images": _texts(mdetr_images), "annotations": _texts(mdetr_annotations)},
        "seqtr/instances.json": {split: _texts(_seqtr(example, objects))},
        f"visual_genome/{split}.json": {
            "images": images, "annotations": _texts(_grit(example, objects))},
        "visual_genome/region_descriptions.json": {WHOLE: _texts([_regions(example, objects)])},
        "visual_genome/image_data.json": {WHOLE: _texts([_image_data(example)])},
        "visual_genome/densecap_splits.json": {split: [str(example.image_id)]},
        f"llava_{split}.json": {WHOLE: _texts([_llava(example, example.questions)])},
        f"talks_{split}.json": {
            WHOLE: _texts([_llava(example, example.talk)]) if example.talk else []},
    }  # fmt: skip
    lines = {
        f"scenes_{split}_localized_narratives.jsonl": json.dumps(narrative_line(example)),
        f"scenes_{split}_truth.jsonl": json.dumps(truth_line(example)),
        f"flickr30k/{split}.txt": example.file_name.removesuffix(".jpg"),
        f"shikra_{split}.jsonl": "\n".join(_shikra(example, objects)),
    }
    members = entity_files(example.captions, example.scene, objects, example.file_name)
    return Entries(lines, lists, _refs(example, objects), members)


def _texts(entries: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(entry) for entry in entries]


def _image(example: Example) -> dict[str, Any]:
    height, width = example.scene.size
    return {"id": example.image_id, "file_name": example.file_name,
            "height": height, "width": width}  # fmt: skip


def narrative_line(example: Example) -> dict[str, Any]:
    """The published Localized Narratives fields."""
    name = f"scenes_{example.split}"
    return {
        "dataset_id": name,
        "image_id": str(example.image_id),
        "annotator_id": example.annotator,
        "caption": example.narration.caption,
        "timed_caption": example.narration.timed_caption,
        "traces": example.narration.traces,
        "voice_recording": f"{name}/{name}_{example.image_id}_{example.annotator}.ogg",
    }


def truth_line(example: Example) -> dict[str, Any]:
    """What evaluation may know: objects, and which one every mention and expression is about."""
    objects = [
        {"id": example.first_id + index, "phrase": phrase,
         "kind": thing.kind, "colour": thing.colour, "size": thing.size,
         "box": [round(value, 5) for value in box],
         "center": [round(value, 5) for value in thing.center], "heldout_pair": thing.held_out}
        for index, (thing, box, phrase) in enumerate(
            zip(example.scene.objects, example.boxes.tolist(), example.phrases, strict=True)
        )
    ]  # fmt: skip
    return {
        "image_id": str(example.image_id),
        "background": example.scene.background,
        "heldout_pair": any(thing["heldout_pair"] for thing in objects),
        "objects": objects,
        "mentions": example.narration.mentions,
        "expressions": [
            {"sent_id": number, **said._asdict()}
            for number, said in enumerate(example.expressions, example.first_id)
        ],
    }


def categories() -> list[dict[str, Any]]:
    """Every colour and kind, in a fixed order with ids from 1 on."""
    entries = [{"name": f"{c} {kind}", "supercategory": kind} for kind in KINDS for c in COLOURS]
    return [{"id": index, **entry} for index, entry in enumerate(entries, start=1)]


_CATEGORY_IDS = {entry["name"]: entry["id"] for entry in categories()}


def instances(example: Example) -> list[dict[str, Any]]:
    """COCO instance annotations."""
    height, width = example.scene.size
    encoded = coco_mask.encode(np.asfortranarray(example.masks.transpose(1, 2, 0).astype(np.uint8)))
    boxes_px = (example.boxes * (width, height, width, height)).round().astype(int).tolist()
    return [
        {
            "id": number,
            "image_id": example.image_id,
            "category_id": _CATEGORY_IDS[f"{thing.colour} {thing.kind}"],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            "attributes": {"colour": thing.colour, "kind": thing.kind, "size": thing.size},
        }
        for number, (thing, mask, (x0, y0, x1, y1), rle) in enumerate(
            zip(example.scene.objects, example.masks, boxes_px, encoded, strict=True),
            example.first_id,
        )
    ]


def short_caption(example: Example) -> str:
    """A caption as in COCO: what is there, and in front of what."""
    names = [f"{thing.colour} {thing.kind}" for thing in example.scene.objects]
    names = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    things = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    sentence = f"{things} in front of {BACKDROPS[example.scene.background]}."
    return sentence[0].upper() + sentence[1:]


def _refs(example: Example, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Objects with their expressions as in the `refs(*).p` of lichengunc/refer."""
    sentences = defaultdict(list)
    for number, said in enumerate(example.expressions, example.first_id):
        words = {"raw": said.text, "sent": said.text, "tokens": said.text.split()}
        sentences[said.object].append({"sent_id": number, **words})
    return [
        {"ref_id": thing["id"], "ann_id": thing["id"], "category_id": thing["category_id"],
         "image_id": example.image_id, "file_name": example.file_name, "split": example.split,
         "sent_ids": [sentence["sent_id"] for sentence in sentences[index]],
         "sentences": sentences[index]}
        for index, thing in enumerate(objects) if sentences[index]
    ]  # fmt: skip


def _mdetr(
    example: Example, objects: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """An image and an annotation for every expression, as in MDETR's `finetune_*.json`."""
    images, annotations, image = [], [], _image(example)
    for number, said in enumerate(example.expressions, example.first_id):
        span, thing = [[0, len(said.text)]], objects[said.object]
        images.append({**image, "id": number, "original_id": example.image_id,
                       "caption": said.text, "dataset_name": "scenes",
                       "tokens_negative": span})  # fmt: skip
        annotations.append({**thing, "id": number, "image_id": number, "original_id": thing["id"],
                            "tokens_positive": span})  # fmt: skip
    return images, annotations


def _seqtr(example: Example, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `instances.json` of SeqTR, which UNINEXT took over: an entry per object."""
    height, width = example.scene.size
    said = defaultdict(list)
    for expression in example.expressions:
        said[expression.object].append(expression.text)
    return [
        {"image_id": example.image_id, "height": height, "width": width,
         "data_source": "coco",  # names its images alike
         "bbox": thing["bbox"], "mask": thing["segmentation"], "expressions": said[index]}
        for index, thing in enumerate(objects) if said[index]
    ]  # fmt: skip


def _grit(example: Example, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The annotations of GRiT's `train.json` and `test.json` of Visual Genome."""
    kept = ("id", "image_id", "bbox", "area", "iscrowd")
    return [
        {**{key: thing[key] for key in kept}, "category_id": 1, "caption": phrase}
        for thing, phrase in zip(objects, example.phrases, strict=True)
    ]


def _regions(example: Example, objects: list[dict[str, Any]]) -> dict[str, Any]:
    """An entry of Visual Genome's `region_descriptions.json`."""
    regions = [
        {"region_id": thing["id"], "image_id": example.image_id, "phrase": phrase,
         **dict(zip(("x", "y", "width", "height"), thing["bbox"], strict=True))}
        for thing, phrase in zip(objects, example.phrases, strict=True)
    ]  # fmt: skip
    return {"id": example.image_id, "regions": regions}


def _image_data(example: Example) -> dict[str, Any]:
    """An entry of Visual Genome's `image_data.json`, whose images are named after their ids."""
    height, width = example.scene.size
    name = example.file_name
    return {"image_id": example.image_id, "width": width, "height": height, "file_name": name,
            "url": f"{example.split}/{name}", "coco_id": None, "flickr_id": None}  # fmt: skip


def _llava(example: Example, rounds: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation in the layout of LLaVA's instruction files."""
    turns = []
    for number, (question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    image = f"{example.split}/{example.file_name}"
    return {"id": str(example.image_id), "image": image, "conversations": turns}


def _shikra(example: Example, objects: list[dict[str, Any]]) -> list[str]:
    """Lines as in Shikra-RD, whose boxes are corners."""
    corners = [[x, y, x + w, y + h] for x, y, w, h in (thing["bbox"] for thing in objects)]
    image = f"{example.split}/{example.file_name}"
    return [shikra_line(question, said, corners, image) for question, said in example.answered]


def write_annotations(entries: Iterable[Entries], folder: Path) -> None:
    """Put the annotation files of any number of scenes together; lists wait as text."""
    lists: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    refs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        streams: dict[str, TextIO] = {}
        (folder / ENTITIES_FILE).parent.mkdir()
        archive = stack.enter_context(zipfile.ZipFile(folder / ENTITIES_FILE, "w"))
        for entry in entries:
            for member, text in entry.members.items():
                archive.writestr(zipfile.ZipInfo(member), text)
            for file, line in entry.lines.items():
                if file not in streams:
                    streams[file] = stack.enter_context(open(folder / file, "w"))
                streams[file].write(line + "\n")
            for file, parts in entry.lists.items():
                for name, texts in parts.items():
                    lists[file][name] += texts
            refs += entry.refs
    for file, parts in lists.items():
        (folder / file).parent.mkdir(exist_ok=True)
        _write_json(folder / file, parts)
    with open(folder / REFS_FILE, "wb") as stream:
        pickle.dump(refs, stream, protocol=2)


def _write_json(file: Path, lists: dict[str, list[str]]) -> None:
    """A list, or an object of lists with what COCO files hold beside annotations."""
    with open(file, "w") as stream:
        if WHOLE in lists:
            stream.write("[" + ",\n".join(lists[WHOLE]) + "]\n")
            return
        parts = [f'"{name}": [' + ",\n".join(texts) + "]" for name, texts in lists.items()]
        if "annotations" in lists:
            rest: dict[str, Any] = {"info": INFO, "licenses": []}
            if file.parent.name == "visual_genome":
                rest["categories"] = [{"id": 1, "name": "object"}]
            elif not file.name.startswith("captions"):  # COCO's tools take them for instances
                rest["categories"] = categories()
            parts += [f'"{name}": {json.dumps(value)}' for name, value in rest.items()]
        stream.write("{" + ",\n".join(parts) + "}\n")
