"""Localized Narratives -> a table of records: one narration per line, words with their places.

Reads the published JSON Lines files (Pont-Tuset et al., ECCV 2020) of all four parts, COCO,
Flickr30k, ADE20K and Open Images, and files in the same layout.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from PIL import Image
from tqdm import tqdm

from data.processes import ordered_map
from pixelllm.alignment import rank_pieces, text_pieces
from pixelllm.records import Phrase, Record
from pixelllm.shards import check_shard_size, unfinished_shards, write_shards
from pixelllm.tables import write_table

FIELDS = ("dataset_id", "image_id", "annotator_id", "caption", "timed_caption", "traces")


class Line(NamedTuple):
    """One line of an annotation file and where it stands."""

    file: str
    number: int
    text: bytes

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Options:
    """How narratives become records.

    Args:
        images: folder of the images, in the layout of their corpus.
        alignment: by the words' characters, or the official one by rank (docs/alignment.md).
        embed_images: copy the image files into the table instead of naming their paths.
        skip_missing: drop and count narratives whose image is missing.
    """

    images: Path
    alignment: Literal["text", "rank"] = "text"
    embed_images: bool = False
    skip_missing: bool = False


def read_record(line: Line, options: Options) -> Record | str:
    """The record of one narrative, or why it is dropped.

    Raises ValueError on malformed input and FileNotFoundError on a missing image, both naming
    the file and line.
    """
    narrative = _parse(line)
    if not narrative["caption"]:
        return "empty caption"
    names = f"{narrative['dataset_id']}/{narrative['image_id']}"
    tried = image_candidates(options.images, narrative["dataset_id"], narrative["image_id"])
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        if options.skip_missing:
            return "missing image"
        raise FileNotFoundError(
            f"{line.place}: no image for {names}; tried {', '.join(map(str, tried))}. "
            "Check --images, or drop such narratives with --skip-missing"
        )
    align = text_pieces if options.alignment == "text" else rank_pieces
    try:
        size = image_size(path)
        pieces = align(narrative)
    except ValueError as error:
        raise ValueError(f"{line.place}: {names}: {error}") from error
    name = f"{names}/{narrative['annotator_id']}"
    phrase = Phrase(name, "narration", narrative["caption"], pieces=pieces)
    if options.embed_images:
        return Record(names, size, (phrase,), data=path.read_bytes())
    return Record(names, size, (phrase,), path=os.path.abspath(path))


def _parse(line: Line) -> dict[str, Any]:
    try:
        narrative = json.loads(line.text)
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{line.place}: not a JSON object ({error})") from error
    if not isinstance(narrative, dict):
        raise ValueError(f"{line.place}: expected an object, got {type(narrative).__name__}")
    for field in FIELDS:
        if field not in narrative:
            raise ValueError(
                f"{line.place}: field {field!r} is missing; is this the annotation "
                "file of Localized Narratives and not the captions-only one?"
            )
        if field in ("dataset_id", "caption") and not isinstance(narrative[field], str):
            raise ValueError(f"{line.place}: {field} is not a string: {narrative[field]!r}")
    cleaned = {"image_id": str(narrative["image_id"]), "caption": narrative["caption"].strip()}
    return narrative | cleaned


def image_candidates(root: Path, dataset_id: str, image_id: str) -> list[Path]:
    """Where the image of, for example, ("mscoco_val2017", "137576") may lie below `root`."""
    part = dataset_id.lower()
    split = "train" if "train" in part else "test" if "test" in part else "val"
    number = image_id.zfill(12) if image_id.isdigit() else image_id
    if "coco" in part:
        paths = [f"{folder}{number}.jpg" for folder in ("", "train2017/", "val2017/")]
        for year_split in ("train2014", "val2014"):  # the 2017 splits regroup the 2014 images
            name = f"COCO_{year_split}_{number}.jpg"
            paths += [name, f"{year_split}/{name}"]
    elif "flic" in part:
        folders = ("", "flickr30k-images/", "flickr30k_images/", "images/")
        paths = [f"{folder}{image_id}.jpg" for folder in folders]
    elif "ade" in part:
        return _ade20k_candidates(root, split, image_id)
    elif "open" in part:
        folders = ("", f"{split}/", "validation/") if split == "val" else ("", f"{split}/")
        paths = [f"{folder}{image_id}.jpg" for folder in folders]
    else:
        paths = [
            f"{folder}{name}.{suffix}"
            for folder in ("", f"{split}/", "images/")
            for name in dict.fromkeys((number, image_id))
            for suffix in ("jpg", "png")
        ]
    return [root / path for path in paths]


def _ade20k_candidates(root: Path, split: str, image_id: str) -> list[Path]:
    """Flat, as in the scene parsing challenge, or nested by scene as in the full release."""
    if image_id.isdigit():
        image_id = f"ADE_{split}_{int(image_id):08d}"
    name = f"{image_id}.jpg"
    folder = "training" if split == "train" else "validation"
    paths = [root / name, root / folder / name, root / "images" / folder / name]
    if not any(path.is_file() for path in paths):
        nested = _ade20k_index(root).get(name)
        return [nested] if nested else [*paths, root / "**" / name]
    return paths


@lru_cache(maxsize=1)
def _ade20k_index(root: Path) -> dict[str, Path]:
    return {path.name: path for path in root.rglob("ADE_*.jpg")}


@lru_cache(maxsize=4096)  # the five narratives of an image are not neighbours in the files
def image_size(path: Path) -> tuple[int, int]:
    """(H, W) after the EXIF rotation, from the header alone. Raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # those that transpose
        if width * height > Image.MAX_IMAGE_PIXELS:  # where Pillow only warns
            raise Image.DecompressionBombError(f"{width} x {height} pixels")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is refused as a decompression bomb ({error})") from error
    return (width, height) if is_turned else (height, width)


def read_lines(files: Iterable[Path], progress: Callable[[int], Any]) -> Iterator[Line]:
    """Non-blank lines of the files in order; `progress` gets the bytes taken from disk."""
    for file in files:
        with open(file, "rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            taken = 0
            try:
                for number, text in enumerate(stream, start=1):
                    if not text.isspace():
                        yield Line(str(file), number, text)
                    position = raw.tell()
                    progress(position - taken)
                    taken = position
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{file}: damaged or not a gzip file ({error})") from error


def read_records(
    lines: Iterator[Line],
    options: Options,
    num_proc: int,
    report: dict[str, Any],
    seen: Counter[str],
) -> Iterator[Record]:
    """Records in the order of the lines, the same for any number of processes.

    `report` is added to while they are taken. Phrase ids end in "#n", the running number of the
    narratives of one image and annotator; `seen` counts them.
    """
    for outcome in ordered_map(partial(read_record, options=options), lines, num_proc):
        report["read"] += 1
        if isinstance(outcome, str):
            report["dropped"][outcome] = report["dropped"].get(outcome, 0) + 1
            continue
        (phrase,) = outcome.phrases
        report["kept"] += 1
        report["without_trace"] += not phrase.pieces
        report["pieces"] += len(phrase.pieces)
        report["pieces_with_place"] += sum(p.center is not None for p in phrase.pieces)
        numbered = replace(phrase, id=f"{phrase.id}#{seen[phrase.id]}")
        seen[phrase.id] += 1
        yield replace(outcome, phrases=(numbered,))


def convert(
    files: list[Path],
    options: Options,
    out: Path,
    num_proc: int = 1,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """Write the table `out` from annotation files; returns its report.

    Args:
        shard_size: records in each Parquet shard; None writes one Arrow table. What was finished
            of the shards when a call ended early is kept for the next with the same arguments.

    Raises FileNotFoundError or ValueError on the first bad item; then there is no table.
    """
    _require(files, options)
    check_shard_size(shard_size)
    names = [str(file.resolve()) for file in files]
    report: dict[str, Any] = {"files": names, "alignment": options.alignment}
    report.update(read=0, kept=0, dropped={}, without_trace=0, pieces=0, pieces_with_place=0)
    seen: Counter[str] = Counter()
    if shard_size is not None:
        plan = [names, [file.stat().st_size for file in files], repr(options), shard_size]
        for report, ids in unfinished_shards(out, plan):  # noqa: B007, the last report counts
            seen.update(name.rpartition("#")[0] for name in ids)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="narratives") as bar:
        lines = islice(read_lines(files, bar.update), report["read"], None)
        records = read_records(lines, options, num_proc, report, seen)
        if shard_size is None:
            write_table(records, out, report)
        else:
            write_shards(records, out, report, shard_size)
    return report


def _require(files: list[Path], options: Options) -> None:
    if not files:
        raise ValueError("no annotation file given")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such annotation file")
    if not options.images.is_dir():
        raise FileNotFoundError(f"--images {options.images}: no such folder")


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    options: Annotated[Options, tyro.conf.arg(name="")],
    out: Path,
    num_proc: int = 1,
    parquet: int | None = None,
) -> None:
    """Turn Localized Narratives into a table of records with a place for every word.

    python -m data.localized_narratives coco_val_localized_narratives.jsonl --images coco \\
        --out tables/ln_coco_val --num-proc 2

    Args:
        annotations: shards, .jsonl or .jsonl.gz.
        out: table to write; a table of that name is replaced when the new one is complete.
        num_proc: processes; the table is the same for any number.
        parquet: write Parquet shards of so many records, to be streamed (docs/data.md). The same
            command goes on where it was interrupted.
    """
    try:
        report = convert(list(annotations), options, out, num_proc, parquet)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
