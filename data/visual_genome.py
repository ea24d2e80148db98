"""Visual Genome's region descriptions to tables: a phrase for every box (Krishna et al. 2017).

    python -m data.visual_genome region_descriptions.json image_data.json densecap_splits.json \
        --split test --images visual_genome --out tables/vg_test

Reads the published files, or GRiT's train.json and test.json (COCO's layout with a caption per
box). From the published files phrases are taken as they stand but for blanks: GRiT's cleaning
is not reproduced. `region_descriptions.json` is read an image at a time; GRiT's files whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    by_listed_image,
    check_coco,
    check_entries,
    clean_text,
    clip_box,
    drop,
    image_paths,
    load_json,
    print_report,
    read_record,
    start_report,
    stream_list,
)
from data.refcoco import Leaks
from pixelllm.records import Phrase, Record
from pixelllm.tables import write_table

REGION_KEYS = ("region_id", "x", "y", "width", "height", "phrase")


class Corpus:
    """The files of one call, told apart by content.

    Raises FileNotFoundError or ValueError naming a file that is none of them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.descriptions: list[Path] = []
        self.coco: list[tuple[Path, dict[str, Any]]] = []
        self.image_data: dict[int, dict[str, Any]] = {}
        self.splits: dict[str, list[int]] = {}
        for file in files:
            first = next(stream_list(file), None)
            if first is None:
                self._add_object(file, load_json(file))
            elif "regions" in first:
                self.descriptions.append(file)
            else:
                entries = list(stream_list(file))
                check_entries(str(file), entries, ("image_id", "width", "height"))
                self.image_data.update({entry["image_id"]: entry for entry in entries})

    def _add_object(self, file: Path, content: Any) -> None:
        is_split = isinstance(content, dict) and "images" not in content
        if is_split and all(isinstance(ids, list) for ids in content.values()):
            self.splits.update(content)
        else:
            self.coco.append((file, check_coco(file, content)))

    def images_of(self, split: str | None) -> set[int] | None:
        """Ids of the images of a split; None is all of them."""
        if split is None:
            return None
        if split not in self.splits:
            known = ", ".join(self.splits) or "none: give densecap_splits.json as well"
            raise ValueError(f"--split {split}: there is no such split; there are {known}")
        return set(self.splits[split])

    def entries(self) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """(name, image entry, regions in COCO's layout) of every image."""
        for file in self.descriptions:
            for entry in stream_list(file):
                check_entries(f"{file}: entries", [entry], ("id", "regions"))
                name = f"{file}: image {entry['id']}"
                check_entries(f"{name}: regions", entry["regions"], REGION_KEYS)
                regions = [
                    {
                        "id": region["region_id"],
                        "bbox": [region[key] for key in ("x", "y", "width", "height")],
                        "caption": region["phrase"],
                    }
                    for region in entry["regions"]
                ]
                image = self.image_data.get(entry["id"], {})
                yield name, image | {"id": entry["id"]}, regions
        for file, content in self.coco:
            check_entries(f"{file}: annotations", content["annotations"], ("caption", "bbox"))
            by_image = by_listed_image(file, content)
            for image in content["images"]:
                entry = self.image_data.get(image["id"], {}) | image
                yield f"{file}: image {image['id']}", entry, by_image[image["id"]]


@dataclass(frozen=True)
class Options:
    """Which images become records.

    Args:
        images: folder of the images, or the one that holds VG_100K and VG_100K_2.
        split: train, val or test of densecap_splits.json.
        leaks: tables or annotation files with COCO images; count those that a split of theirs
            other than train holds. Needs image_data.json, which knows their numbers.
        drop_leaks: the same, and leave those images out.
        skip_missing: drop and count images whose file is missing.
        expressions: every region is also an expression, its phrase, to locate.
    """

    images: Path
    split: str | None = None
    leaks: tuple[Path, ...] = ()
    drop_leaks: tuple[Path, ...] = ()
    skip_missing: bool = False
    expressions: bool = False


def read_records(corpus: Corpus, options: Options, report: dict[str, Any]) -> Iterator[Record]:
    """One record per image with its regions; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the image or region.
    """
    wanted = corpus.images_of(options.split)
    report["split"] = options.split
    leaks = Leaks(options.leaks, options.drop_leaks, report)
    for name, image, regions in corpus.entries():
        if wanted is not None and image["id"] not in wanted:
            continue
        if report["leaks"] and "coco_id" not in image:
            raise ValueError(f"{name}: no coco_id to find leaks by; give image_data.json as well")
        if leaks.drops(image.get("coco_id")):
            continue
        tried = image_paths(options.images, image.get("file_name", f"{image['id']}.jpg"), "vg")
        picture = Picture(name, image["id"], tried, image)
        phrases_at = partial(_phrases, name, regions, options.expressions, report)
        record = read_record(picture, phrases_at, report, options.skip_missing)
        if record:
            yield record


def _phrases(
    image: str,
    regions: list[dict[str, Any]],
    expressions: bool,
    report: dict[str, Any],
    size: Size,
) -> Iterator[Phrase]:
    for region in regions:
        name = f"{image}: region {region['id']}"
        text = clean_text(region["caption"], name)
        box = clip_box(region["bbox"], name, size)
        if not text or box is None:
            drop(report, "empty box" if text else "empty phrase")
        else:
            number = region["id"]
            yield Phrase(f"region/{number}", "region", text, prompt_box=box, target_box=box)
            if expressions:
                name = f"referring/region-{number}"  # no expression of a corpus of them
                yield Phrase(name, "referring", text, context=text, target_box=box)


def convert(files: list[Path], options: Options, out: Path) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report(files, options.images)
    write_table(tqdm(read_records(Corpus(files), options, report), "images"), out, report)
    return report


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    options: Annotated[Options, tyro.conf.arg(name="")],
    out: Path,
) -> None:
    """Turn Visual Genome's region descriptions into a table of records.

    Args:
        annotations: region_descriptions.json, perhaps with image_data.json, which sizes are
            checked against, and densecap_splits.json; or GRiT's train.json or test.json.
        out: table to write; a table of that name is replaced when the new one is complete.
    """
    print_report(partial(convert, list(annotations), options, out))


if __name__ == "__main__":
    tyro.cli(main)
