"""Procedural scenes as a data set in the formats the corpora publish.

    python -m data.scenes runs/scenes --train 20000 --val 500 --seed 0
    python -m data.scenes runs/crowded --train 4000 --objects 10 14 --min-size 0.13 --max-size 0.3

Writes JPEG images; narratives, instances, captions, referring expressions, regions, conversations,
grounded captions and pointing answers in the layouts of the corpora (`data.scene_layouts`); and a
truth file that says which object every mention and expression is about. Scene i of a split depends
on the seed, the split, i and the world, on nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from data.processes import ordered_map
from data.scene_answers import pointing_answers
from data.scene_captions import grounded_captions
from data.scene_expressions import expressions, follow_ups, questions, region_phrase
from data.scene_images import draw_scene
from data.scene_layouts import Entries, Example, entries_of, write_annotations
from data.scene_narrations import Order, Verbosity, narrate
from data.scene_worlds import Scene, World, plan_scene

OPTIONS_FILE = "scenes.json"
FORMAT = 4  # of the written files; folders of another one are not taken for complete
FIRST_ID = {"train": 1, "val": 900_000_001}
IDS_PER_SCENE = 1000  # more than 128 objects with three expressions each
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
        return json.loads(json.dumps({"format": FORMAT, **values}))


def make_example(options: Options, split: str, index: int) -> Example:
    """Scene `index` of a split, with its picture and all that is said about it.

    Picture, narration, expressions and captions have generators of their own: other words, same
    picture.
    """
    seeds = [options.seed, FIRST_ID[split], index]
    rng = np.random.default_rng([*seeds, 0])
    with_held_out = split == "val" and rng.random() < options.held_out_scenes
    scene, image, masks = _drawn(rng, options.world, with_held_out)
    boxes = np.stack([_box(mask) for mask in masks])
    voice = np.random.default_rng([*seeds, 1])
    writer, is_train = Random(" ".join(map(str, seeds))), split == "train"
    return Example(
        split=split,
        image_id=FIRST_ID[split] + index,
        first_id=FIRST_ID[split] + IDS_PER_SCENE * index,
        scene=scene,
        image=image,
        masks=masks,
        boxes=boxes,
        narration=narrate(voice, scene, boxes, options.order, options.verbosity),
        annotator=int(voice.integers(100)),
        phrases=[region_phrase(thing) for thing in scene.objects],
        expressions=expressions(writer, scene, is_train),
        questions=questions(writer, scene, options.world, is_train),
        talk=follow_ups(Random(f"talk {seeds}"), scene, is_train),
        captions=grounded_captions(Random(f"captions {seeds}"), scene),
        answered=pointing_answers(Random(f"answers {seeds}"), scene, is_train),
    )


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


def _write_example(options: Options, folder: Path, split: str, index: int) -> Entries:
    """Write the image; returns what the scene adds to the annotation files."""
    example = make_example(options, split, index)
    picture = Image.fromarray(example.image)
    picture.save(folder / split / example.file_name, quality=JPEG_QUALITY, subsampling=0)
    return entries_of(example)


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
        write_annotations(_entries(options, beside), beside / "annotations")
        (beside / OPTIONS_FILE).write_text(json.dumps(options.described(), indent=2) + "\n")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return True


def _entries(options: Options, folder: Path) -> Iterator[Entries]:
    """Write the images of every split one after the other, telling how far it is."""
    for split, count in (("train", options.train), ("val", options.val)):
        if not count:
            continue
        (folder / split).mkdir()
        work = partial(_write_example, options, folder, split)
        examples = ordered_map(work, iter(range(count)), options.num_proc)
        yield from tqdm(examples, f"{split} scenes", count)


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
