"""Procedural scenes as a data set in the formats the corpora publish.

    python -m data.scenes runs/scenes --train 20000 --val 500 --seed 0
    python -m data.scenes runs/crowded --train 4000 --objects 10 14 --min-size 0.13 --max-size 0.3

Writes JPEG images, Localized Narratives JSON Lines, COCO instances and captions, and a truth
file that says which object every mention is about. Scene i of a split depends on the seed, the
split, i and the world, on nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from data.scene_images import draw_scene
from data.scene_narrations import BACKDROPS, Narration, Order, Verbosity, narrate
from data.scene_worlds import COLOURS, KINDS, Scene, World, plan_scene

OPTIONS_FILE = "scenes.json"
FIRST_ID = {"train": 1, "val": 900_000_001}
JPEG_QUALITY = 92
MIN_VISIBLE = 0.3  # scenes that hide more of an object are drawn again


@dataclass(frozen=True)
class Options:
    """Write procedural scenes in the published formats.

    Args:
        out: folder to write; a complete one of the same options is kept as it is.
        train, val: number of images.
        seed: another seed, other scenes.
        held_out_scenes: share of validation scenes with an object of a held-out pair.
        order: in which order objects are narrated.
        verbosity: long narrations say more about sizes and places.
        num_proc: processes; all cores by default.
    """

    out: tyro.conf.Positional[Path]
    train: int = 20000
    val: int = 500
    seed: int = 0
    world: Annotated[World, tyro.conf.arg(name="")] = field(default_factory=World)
    held_out_scenes: float = 0.2
    order: Order = "left-to-right"
    verbosity: Verbosity = "short"
    num_proc: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        if self.train < 0 or self.val < 0 or self.train + self.val == 0:
            raise ValueError(f"train {self.train} and val {self.val}: nothing to write")
        if not 0 <= self.held_out_scenes <= 1 or self.num_proc < 1 or self.seed < 0:
            raise ValueError("held_out_scenes must be in [0, 1], num_proc and seed not negative")

    def described(self) -> dict[str, Any]:
        """Everything the content depends on."""
        values = asdict(self)
        del values["out"], values["num_proc"]
        return json.loads(json.dumps(values))


@dataclass(frozen=True)
class Example:
    """A scene with all that is written about it."""

    image_id: int
    scene: Scene
    image: np.ndarray  # uint8[H, W, 3]
    masks: np.ndarray  # bool[n, H, W], visible parts
    boxes: np.ndarray  # float[n, 4], xyxy in [0, 1], of the visible parts
    narration: Narration
    annotator: int


def make_example(options: Options, split: str, index: int) -> Example:
    """Scene `index` of a split, with its picture and narration."""
    seeds = [options.seed, FIRST_ID[split], index]
    rng = np.random.default_rng([*seeds, 0])
    with_held_out = split == "val" and rng.random() < options.held_out_scenes
    scene, image, masks = _drawn(rng, options.world, with_held_out)
    boxes = np.stack([_box(mask) for mask in masks])
    voice = np.random.default_rng([*seeds, 1])  # its own, so that wording changes no picture
    narration = narrate(voice, scene, boxes, options.order, options.verbosity)
    image_id, annotator = FIRST_ID[split] + index, int(voice.integers(100))
    return Example(image_id, scene, image, masks, boxes, narration, annotator)


def _drawn(
    rng: np.random.Generator, world: World, with_held_out: bool
) -> tuple[Scene, np.ndarray, np.ndarray]:
    for _ in range(50):
        scene = plan_scene(rng, world, with_held_out)
        image, masks, visible = draw_scene(rng, scene)
        if visible.min() >= MIN_VISIBLE:
            return scene, image, masks
    raise ValueError("objects hide each other; ask for fewer or a smaller max_overlap")


def _box(mask: np.ndarray) -> np.ndarray:
    """xyxy in [0, 1] around the True pixels."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    pixels = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return pixels / (width, height, width, height)


def narrative_line(example: Example, split: str) -> dict[str, Any]:
    """The published Localized Narratives fields."""
    name = f"scenes_{split}"
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
    """What evaluation may know: boxes, and which object each mention is about."""
    objects = [
        {"kind": thing.kind, "colour": thing.colour, "size": thing.size,
         "box": [round(value, 5) for value in box],
         "center": [round(value, 5) for value in thing.center], "heldout_pair": thing.held_out}
        for thing, box in zip(example.scene.objects, example.boxes.tolist(), strict=True)
    ]  # fmt: skip
    return {
        "image_id": str(example.image_id),
        "background": example.scene.background,
        "heldout_pair": any(thing["heldout_pair"] for thing in objects),
        "objects": objects,
        "mentions": example.narration.mentions,
    }


def categories() -> list[dict[str, Any]]:
    """Every colour and kind, in a fixed order with ids from 1 on."""
    entries = [{"name": f"{c} {kind}", "supercategory": kind} for kind in KINDS for c in COLOURS]
    return [{"id": index, **entry} for index, entry in enumerate(entries, start=1)]


def instances(example: Example) -> list[dict[str, Any]]:
    """COCO instance annotations, without ids."""
    height, width = example.scene.size
    encoded = coco_mask.encode(np.asfortranarray(example.masks.transpose(1, 2, 0).astype(np.uint8)))
    ids = {entry["name"]: entry["id"] for entry in categories()}
    boxes_px = example.boxes * (width, height, width, height)
    return [
        {
            "image_id": example.image_id,
            "category_id": ids[f"{thing.colour} {thing.kind}"],
            "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            "attributes": {"colour": thing.colour, "kind": thing.kind, "size": thing.size},
        }
        for thing, mask, (x0, y0, x1, y1), rle in zip(
            example.scene.objects, example.masks, boxes_px, encoded, strict=True
        )
    ]


def short_caption(example: Example) -> str:
    """A caption as in COCO: what is there, and in front of what."""
    names = [f"{thing.colour} {thing.kind}" for thing in example.scene.objects]
    names = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    things = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    sentence = f"{things} in front of {BACKDROPS[example.scene.background]}."
    return sentence[0].upper() + sentence[1:]


def _write_example(options: Options, folder: Path, split: str, index: int) -> dict[str, Any]:
    """Write the image; returns the parts of the annotation files as text and plain values."""
    example = make_example(options, split, index)
    height, width = example.scene.size
    name = f"{example.image_id:012d}.jpg"
    Image.fromarray(example.image).save(folder / split / name, quality=JPEG_QUALITY, subsampling=0)
    return {
        "narrative": json.dumps(narrative_line(example, split)),
        "truth": json.dumps(truth_line(example)),
        "image": {"id": example.image_id, "file_name": name, "height": height, "width": width},
        "instances": instances(example),
        "caption": {"image_id": example.image_id, "caption": short_caption(example)},
    }


def write_scenes(options: Options) -> bool:
    """Write the data set; returns False where a complete one of these options was there.

    Raises FileExistsError where `out` holds something else, ValueError on an impossible world.
    """
    out = options.out
    if _is_complete(options):
        return False
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "annotations").mkdir(parents=True)
    try:
        for split, count in (("train", options.train), ("val", options.val)):
            if count:
                (beside / split).mkdir()
                parts = _parts(options, beside, split, count)
                _write_split(tqdm(parts, f"{split} scenes", count), beside, split)
        (beside / OPTIONS_FILE).write_text(json.dumps(options.described(), indent=2) + "\n")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return True


def _parts(options: Options, folder: Path, split: str, count: int) -> Iterator[dict[str, Any]]:
    work = partial(_write_example, options, folder, split)
    if options.num_proc == 1:
        yield from map(work, range(count))
        return
    context = multiprocessing.get_context("spawn")  # safe beside threads
    with context.Pool(options.num_proc) as pool:
        yield from pool.imap(work, range(count), chunksize=16)


def _is_complete(options: Options) -> bool:
    out = options.out
    if not out.exists() or not any(out.iterdir()):
        return False
    file = out / OPTIONS_FILE
    if not file.exists():
        raise FileExistsError(f"{out} is not empty and holds no scenes; choose another folder")
    present, wanted = json.loads(file.read_text()), options.described()
    differing = [key for key in wanted if present.get(key) != wanted[key]]
    if differing:
        found = f"scenes of other options (not the same {', '.join(differing)})"
        raise FileExistsError(f"{out} holds {found}; remove it or choose another folder")
    return True


def _write_split(parts: Iterable[dict[str, Any]], folder: Path, split: str) -> None:
    annotations = folder / "annotations"
    info = {"description": f"procedural scenes, {split}", "version": "1.0"}
    images, boxes, captions = [], [], []
    with (
        open(annotations / f"scenes_{split}_localized_narratives.jsonl", "w") as narratives,
        open(annotations / f"scenes_{split}_truth.jsonl", "w") as truth,
    ):
        for part in parts:
            narratives.write(part["narrative"] + "\n")
            truth.write(part["truth"] + "\n")
            images.append(part["image"])
            boxes += [{"id": len(boxes) + n, **box} for n, box in enumerate(part["instances"], 1)]
            captions.append({"id": len(captions) + 1, **part["caption"]})
    head = {"info": info, "licenses": [], "images": images}
    for name, content in (
        ("instances", {**head, "annotations": boxes, "categories": categories()}),
        ("captions", {**head, "annotations": captions}),
    ):
        (annotations / f"{name}_{split}.json").write_text(json.dumps(content))


def main() -> None:
    try:
        kind = tyro.conf.OmitArgPrefixes[Options]
        options = tyro.cli(kind, prog="python -m data.scenes", description=__doc__)
        written = write_scenes(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {'written' if written else 'complete already, kept'}")


if __name__ == "__main__":
    main()
