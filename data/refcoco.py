"""Referring expressions to tables: RefCOCO, RefCOCO+, RefCOCOg and sets in their layouts.

    python -m data.refcoco "refcoco/refs(unc).p" refcoco/instances.json --split val \
        --images coco --out tables/refcoco_val

Four layouts are told apart by content: `refer`'s pickle with its instances.json (Kazemzadeh et
al. 2014, Yu et al. 2016), MDETR's COCO files with a caption per image entry, the lists by split
of SeqTR and UNINEXT, and lists with a `solution` box as the newer RefCOCOs has them. All files
of one call are merged by image.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    add_images,
    are_numbers,
    by_listed_image,
    check_coco,
    check_entries,
    check_name,
    clean_text,
    clip_box,
    coco_number,
    drop,
    encode_mask,
    image_paths,
    load_json,
    print_report,
    read_record,
    start_report,
)
from pixelllm.records import Phrase, Record
from pixelllm.tables import REPORT_FILE, Table, write_table

FILE_NAMES = {"coco": "COCO_train2014_{:012d}.jpg", "vg": "{}.jpg", "flickr": "{}.jpg"}
# What a damaged pickle may raise, among it what its instructions do to each other's results
UNREADABLE = (
    pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError,
    OverflowError,
)  # fmt: skip
REF_KEYS = ("ref_id", "ann_id", "image_id", "split", "sentences", "file_name")


class Referent(NamedTuple):
    """An object of an image and the expressions that mean it."""

    name: str  # in errors: its file and entry
    split: str | None  # None where its file is one split
    source: str  # whose image it is, see FILE_NAMES
    image: str  # file name
    entry: dict[str, Any]  # may state the image's `height` and `width`
    expressions: list[tuple[int | str, str]]  # (id, text)
    target: dict[str, Any]  # `bbox`, null or absent if nothing is meant; perhaps `segmentation`


@dataclass(frozen=True)
class Options:
    """Which expressions become records.

    Args:
        images: folder of the images: COCO's, for mixtures also Visual Genome's and Flickr30k's.
        split: as the files name it; needed where they hold several.
        leaks: tables or annotation files; count the images shared with each of their splits
            other than train.
        drop_leaks: the same, and leave those images out.
        source: take the images of this corpus alone where the files mix several.
        image_data: image_data.json of Visual Genome, which says which of its images are COCO's;
            what leaks of those cannot be found without.
        matching: take the expressions of these forms alone, globs such as "* object".
        regions: every expression is the caption of its box as well, as in RefCOCOg's captioning.
        skip_missing: drop and count images whose file is missing.
    """

    images: Path
    split: str | None = None
    source: Literal["coco", "vg", "flickr"] | None = None
    image_data: Path | None = None
    matching: tuple[str, ...] = ("*",)
    regions: bool = False
    leaks: tuple[Path, ...] = ()
    drop_leaks: tuple[Path, ...] = ()
    skip_missing: bool = False


class _PlainUnpickler(pickle.Unpickler):
    """Containers, strings and numbers only: a pickle that names anything else could run it."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no published file needs; do not use this file"
        )


def load_refs(file: Path) -> list[dict[str, Any]]:
    """The references of a `refs(*).p`, without running what a pickle could run.

    Raises ValueError naming the file and what is wrong in it.
    """
    try:
        with open(file, "rb") as stream:
            refs = _PlainUnpickler(stream, encoding="latin1").load()  # written by Python 2
    except UNREADABLE as error:
        raise ValueError(f"{file}: not a list of references ({error})") from error
    check_entries(f"{file}: references", refs, REF_KEYS)
    for ref in refs:
        check_entries(
            f"{file}: sentences of {ref['ref_id']}", ref["sentences"], ("sent_id", "sent")
        )
    return refs


def load_referents(files: Iterable[Path]) -> list[Referent]:
    """Everything the files refer to. Raises FileNotFoundError or ValueError naming the file."""
    pickles, referents, images, objects = [], [], {}, {}
    for file in files:
        if _is_pickle(file):
            pickles.append(file)
            continue
        content = load_json(file)
        if isinstance(content, list):
            referents += _solution_referents(file, content)
        elif isinstance(content, dict) and "images" not in content:
            referents += _seqtr_referents(file, content)
        elif _has_expressions(check_coco(file, content)):
            referents += _mdetr_referents(file, content)
        else:
            add_images(images, file, content)
            objects.update({entry["id"]: entry for entry in content["annotations"]})
    for file in pickles:
        referents += _refer_referents(file, images, objects)
    if not referents:
        names = ", ".join(map(str, files))
        raise ValueError(f"no expression in {names}; an instances.json needs its refs(*).p")
    return referents


def _is_pickle(file: Path) -> bool:
    """Whether it does not begin like JSON."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such annotation file")
    with open(file, "rb") as stream:
        return stream.read(64).lstrip()[:1] not in (b"{", b"[")


def _refer_referents(file: Path, images: dict, objects: dict) -> Iterator[Referent]:
    for ref in load_refs(file):
        name = f"{file}: reference {ref['ref_id']}"
        image, target = images.get(ref["image_id"]), objects.get(ref["ann_id"])
        if image is None or target is None:
            absent = f"image {ref['image_id']} or annotation {ref['ann_id']}"
            raise ValueError(f"{name}: no file describes {absent}; add the instances.json beside")
        expressions = [(sentence["sent_id"], sentence["sent"]) for sentence in ref["sentences"]]
        file_name = image["file_name"]
        yield Referent(name, ref["split"], "coco", file_name, image, expressions, target)


def _has_expressions(content: dict[str, Any]) -> bool:
    return any(image.keys() & {"caption", "expressions"} for image in content["images"])


def _mdetr_referents(file: Path, content: dict[str, Any]) -> Iterator[Referent]:
    """An image entry per expression; UNINEXT's conversion has one per object."""
    targets = by_listed_image(file, content)
    for image in content["images"]:
        name = f"{file}: image {image['id']}"
        texts = image.get("expressions") or [image.get("caption")]
        if not isinstance(texts, list):
            raise ValueError(f"{name}: expressions must be a list, not {texts!r:.60}")
        for target in targets[image["id"]] or [{}]:
            base = image.get("refexp_id", target.get("id", image["id"]))
            expressions = [(f"{base}/{i}" if i else base, text) for i, text in enumerate(texts)]
            yield Referent(name, None, "coco", image["file_name"], image, expressions, target)


def _seqtr_referents(file: Path, content: dict[str, Any]) -> Iterator[Referent]:
    for split, entries in content.items():
        check_entries(f"{file}: {split}", entries, ("image_id", "expressions"))
        # Only mixtures say where an image is from; COCO's ids have at most six digits.
        default = "flickr" if any(len(str(e["image_id"])) > 6 for e in entries) else "coco"
        for number, entry in enumerate(entries):
            name = f"{file}: {split}[{number}]"
            image_id, texts = entry["image_id"], entry["expressions"]
            if not isinstance(image_id, int) or not isinstance(texts, list):
                raise ValueError(f"{name}: image_id must be a number and expressions a list")
            source = entry.get("data_source", default)
            image = FILE_NAMES.get(source, "{}").format(image_id)
            expressions = [(f"{split}/{number}/{i}", text) for i, text in enumerate(texts)]
            target = {"bbox": entry.get("bbox"), "segmentation": entry.get("mask")}
            yield Referent(name, split, source, image, entry, expressions, target)


def _solution_referents(file: Path, content: list[Any]) -> Iterator[Referent]:
    """Boxes are xyxy in pixels here, and null where the expression means nothing."""
    check_entries(str(file), content, ("image", "normal_caption", "solution"))
    for number, entry in enumerate(content):
        name, corners = f"{file}: entry {number}", entry["solution"]
        if corners is not None and not are_numbers(corners, 4):
            raise ValueError(f"{name}: solution is not [x0, y0, x1, y1] but {corners!r}")
        x0, y0, x1, y1 = corners or (0,) * 4
        target = {"bbox": corners and [x0, y0, x1 - x0, y1 - y0]}
        expressions = [(number, entry["normal_caption"])]
        image = check_name(entry["image"], name)
        yield Referent(name, None, "coco", image, entry, expressions, target)


def choose_split(referents: list[Referent], split: str | None) -> list[Referent]:
    """Those of the split. Raises ValueError naming the splits there are."""
    known = sorted({referent.split for referent in referents if referent.split is not None})
    if split is None and len(known) > 1:
        raise ValueError(f"the files hold the splits {', '.join(known)}; choose one with --split")
    if split is not None and split not in known:
        remedy = f"choose one of {', '.join(known)}" if known else "each is one split, leave it out"
        raise ValueError(f"--split {split}: the files hold no such split; {remedy}")
    return [referent for referent in referents if split is None or referent.split in (None, split)]


def held_out_images(path: Path) -> dict[str, set[int]]:
    """COCO image ids in a table or annotation file, by the name of each split but train."""
    if path.is_dir():
        rows = Table(path).rows.select_columns("image")
        split = json.loads((path / REPORT_FILE).read_text()).get("split")
        trains = (split or "").startswith("train")
        pairs = [(None, row["image"]["path"] or "") for row in rows if not trains]
    elif _is_pickle(path):
        pairs = [(ref["split"], ref["file_name"]) for ref in load_refs(path)]
    else:
        pairs = [(referent.split, referent.image) for referent in load_referents([path])]
    found = defaultdict(set)
    for split, image in pairs:
        number = coco_number(image)
        if number is not None and not (split or "").startswith("train"):
            found[f"{path.parent.name}/{path.name} {split or ''}".strip()].add(number)
    if not found:
        raise ValueError(f"{path}: no COCO image outside its train split, nothing can leak from it")
    return found


class Leaks:
    """Training images that other sets hold out, counted in a report and perhaps left out.

    Args:
        counted, dropped: tables or annotation files with COCO images, as in `Options`.
        report: gets `leaks`, the number of images shared with each split.

    Raises ValueError naming a file that no image can leak from.
    """

    def __init__(
        self, counted: Iterable[Path], dropped: Iterable[Path], report: dict[str, Any]
    ) -> None:
        parts = {path: held_out_images(path) for path in (*counted, *dropped)}
        self._held_out = {name: found for part in parts.values() for name, found in part.items()}
        self._to_drop = set().union(*(n for path in dropped for n in parts[path].values()))
        self._report = report
        report["leaks"] = dict.fromkeys(self._held_out, 0)

    def drops(self, number: int | str | None) -> bool:
        """Count an image by its number in COCO; whether it is to be left out."""
        for name, numbers in self._held_out.items():
            self._report["leaks"][name] += number in numbers
        if number in self._to_drop:
            drop(self._report, "leaked image")
            return True
        return False


def load_coco_ids(image_data: Path) -> dict[str, int]:
    """File name in Visual Genome -> COCO's image id, where there is one. Raises ValueError."""
    entries = load_json(image_data)
    check_entries(str(image_data), entries, ("image_id", "coco_id"))
    return {
        FILE_NAMES["vg"].format(entry["image_id"]): entry["coco_id"]
        for entry in entries
        if entry["coco_id"] is not None
    }


def read_records(
    referents: list[Referent], options: Options, report: dict[str, Any]
) -> Iterator[Record]:
    """One record per image with all its expressions; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the image or referent.
    """
    report["split"] = options.split
    leaks = Leaks(options.leaks, options.drop_leaks, report)
    coco_ids = load_coco_ids(options.image_data) if options.image_data else None
    by_image = defaultdict(list)
    for referent in referents:
        number = coco_number(referent.image)
        by_image[referent.source, referent.image if number is None else number].append(referent)
    seen: Counter[int | str] = Counter()
    for (source, image), found in by_image.items():
        if options.source not in (None, source):
            continue
        if source == "vg" and report["leaks"] and coco_ids is None:
            remedy = "give Visual Genome's image_data.json as --image-data"
            raise ValueError(f"{found[0].name}: no way to find the leaks of {image}; {remedy}")
        if leaks.drops((coco_ids or {}).get(image, image)):
            continue
        if source not in FILE_NAMES:
            drop(report, f"image of {source}")
            continue
        first = found[0]
        tried = image_paths(options.images, first.image, source)
        name = image if isinstance(image, int) else Path(image).stem
        picture = Picture(f"{first.name}: {first.image}", name, tried, first.entry)
        phrases_at = partial(_phrases, found, options, report, seen)
        record = read_record(picture, phrases_at, report, options.skip_missing)
        if record:
            yield record


def _phrases(
    found: list[Referent],
    options: Options,
    report: dict[str, Any],
    seen: Counter[int | str],
    size: Size,
) -> Iterator[Phrase]:
    """Ids that several files use end in "#n" from the second on."""
    for referent in found:
        if not referent.target.get("bbox"):
            drop(report, "expression without target", len(referent.expressions))
            continue
        box = clip_box(referent.target["bbox"], referent.name, size)
        mask = encode_mask(referent.target.get("segmentation"), referent.name, size)
        for number, text in referent.expressions:
            text = clean_text(text, referent.name)
            if not text or box is None:
                drop(report, "empty box" if text else "empty expression")
                continue
            seen[number] += 1
            if not any(fnmatchcase(text, form) for form in options.matching):
                drop(report, "expression of another form")
                continue
            name = f"{number}#{seen[number] - 1}" if seen[number] > 1 else str(number)
            target = {"target_box": box, "mask": mask}
            yield Phrase(f"referring/{name}", "referring", text, context=text, **target)
            if options.regions:
                yield Phrase(f"region/{name}", "region", text, prompt_box=box, **target)


def convert(files: list[Path], options: Options, out: Path) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report(files, options.images)
    referents = choose_split(load_referents(files), options.split)
    write_table(tqdm(read_records(referents, options, report), "images"), out, report)
    return report


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    options: Annotated[Options, tyro.conf.arg(name="")],
    out: Path,
) -> None:
    """Turn referring expressions into a table of records.

    python -m data.refcoco "refcoco/refs(unc).p" refcoco/instances.json --split train \\
        --images coco --out tables/refcoco_train --drop-leaks "refcocog/refs(umd).p"

    Args:
        annotations: refs(*).p with its instances.json, finetune_refcoco*.json of MDETR, or
            instances.json of SeqTR; files of several sets are merged by image.
        out: table to write; a table of that name is replaced when the new one is complete.
    """
    print_report(partial(convert, list(annotations), options, out))


if __name__ == "__main__":
    tyro.cli(main)
