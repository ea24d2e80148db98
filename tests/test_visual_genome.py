"""Visual Genome to tables: both layouts, splits, and what is refused or left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import data.annotations
from data.annotations import stream_list
from data.visual_genome import Options, convert, main
from pixelllm.records import Phrase, Record
from pixelllm.tables import Table, write_table

REAL = Path(
    os.environ.get("PIXELLLM_REAL_DATA", Path(__file__).parents[2] / "shared" / "data" / "real")
)
HEIGHT, WIDTH = 40, 60


def region(number: int, image: int, phrase: str, **values: int) -> dict[str, Any]:
    box = {"x": 15, "y": 10, "width": 15, "height": 10}
    return {"region_id": number, "image_id": image, "phrase": phrase, **box, **values}


REGIONS = [
    {"id": 1, "regions": [region(10, 1, "the clock "), region(11, 1, "a\n tree", x=50, width=99)]},
    {"id": 2, "regions": [region(20, 2, "a car")]},
    {"id": 3, "regions": []},
]
SPLITS = {"train": [1, 3], "val": [], "test": [2]}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images 1 to 3 in the two folders they are published in."""
    for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg"):
        path = tmp_path / "vg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    return tmp_path / "vg"


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=1))
    return path


def write_corpus(folder: Path, regions: list[dict] = REGIONS, height: int = HEIGHT) -> list[Path]:
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    size = {"width": WIDTH, "height": height, "url": url, "coco_id": None, "flickr_id": None}
    return [
        write(folder / "region_descriptions.json", regions),
        write(folder / "image_data.json", [{"image_id": n, **size} for n in (1, 2, 3)]),
        write(folder / "densecap_splits.json", SPLITS),
    ]


def test_regions_become_phrases_at_their_boxes(tmp_path: Path, images: Path):
    files = write_corpus(tmp_path)
    report = convert(files, Options(images, "train"), tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    assert (record.id, record.size) == ("VG_100K/1", (HEIGHT, WIDTH))
    clock, tree = record.phrases
    assert (clock.id, clock.task, clock.caption) == ("region/10", "region", "the clock")
    assert clock.context == "" and clock.prompt_box == clock.target_box
    assert clock.prompt_box == pytest.approx((0.25, 0.25, 0.5, 0.5))
    assert tree.caption == "a tree"
    assert tree.target_box == pytest.approx((50 / 60, 0.25, 1.0, 0.5))  # clipped
    assert (report["files"], report["split"]) == ([str(file) for file in files], "train")
    assert report["dropped"] == {"image without phrases": 1}


def test_the_order_and_names_of_the_files_do_not_matter(tmp_path: Path, images: Path):
    files = [file.rename(tmp_path / str(n)) for n, file in enumerate(write_corpus(tmp_path))]
    convert(files[::-1], Options(images, "test"), tmp_path / "table")
    assert [record.id for record in Table(tmp_path / "table")] == ["VG_100K_2/2"]
    convert(files[:1], Options(images), tmp_path / "all")
    assert [record.id for record in Table(tmp_path / "all")] == ["VG_100K/1", "VG_100K_2/2"]


def test_grits_layout_is_read(tmp_path: Path, images: Path):
    annotation = {"id": 7, "image_id": 2, "bbox": [15, 10, 15, 10], "category_id": 1, "iscrowd": 0}
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 60} for n in (1, 2)],
        "annotations": [
            {**annotation, "caption": " a car"},
            {**annotation, "id": 8, "caption": ""},
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    file = write(tmp_path / "train.json", content)
    report = convert([file], Options(images), tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    (phrase,) = record.phrases
    assert (record.id, phrase.id, phrase.caption) == ("VG_100K_2/2", "region/7", "a car")
    assert phrase.prompt_box == pytest.approx((0.25, 0.25, 0.5, 0.5))
    assert report["dropped"] == {"empty phrase": 1, "image without phrases": 1}


def test_a_region_of_an_image_that_is_not_listed_is_named(tmp_path: Path, images: Path):
    annotation = {"id": 7, "image_id": 3, "bbox": [15, 10, 15, 10], "caption": "a car"}
    listed = [{"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}]
    file = write(tmp_path / "train.json", {"images": listed, "annotations": [annotation]})
    with pytest.raises(ValueError, match="train.json: annotation 7 is of image 3, not listed"):
        convert([file], Options(images), tmp_path / "table")


def test_regions_are_expressions_where_that_is_asked_for(tmp_path: Path, images: Path):
    files = write_corpus(tmp_path)
    plain, both = tmp_path / "plain", tmp_path / "both"
    convert(files, Options(images), plain)
    convert(files, Options(images, expressions=True), both)
    for expected, record in zip(Table(plain), Table(both), strict=True):
        assert record.phrases[::2] == expected.phrases
        for described, located in zip(record.phrases[::2], record.phrases[1::2], strict=True):
            assert located.id == f"referring/{described.id.replace('/', '-')}"
            assert located.task == "referring" and located.prompt_box is None
            assert located.context == located.caption == described.caption
            assert located.target_box == described.prompt_box


def test_boxes_outside_the_image_are_counted(tmp_path: Path, images: Path):
    regions = [region(1, 1, "out", x=60), region(2, 1, "flat", height=0), region(3, 1, "in")]
    file = write(tmp_path / "regions.json", [{"id": 1, "regions": regions}])
    report = convert([file], Options(images), tmp_path / "table")
    assert (report["phrases"], report["dropped"]) == (1, {"empty box": 2})


def test_wrong_splits_name_the_right_ones(tmp_path: Path, images: Path):
    files = write_corpus(tmp_path)
    with pytest.raises(ValueError, match="--split testA: .*there are train, val, test"):
        convert(files, Options(images, "testA"), tmp_path / "table")
    with pytest.raises(ValueError, match="--split test: .*give densecap_splits.json"):
        convert(files[:2], Options(images, "test"), tmp_path / "table")


def test_images_that_coco_holds_out_are_left_out(tmp_path: Path, images: Path):
    """By image_data's coco_id: half of Visual Genome is COCO's, some of it RefCOCO's val."""
    files = write_corpus(tmp_path)
    entries = json.loads(files[1].read_text())
    entries[0]["coco_id"], entries[1]["coco_id"] = 7, 8
    write(files[1], entries)
    phrase = Phrase("referring/1", "referring", "it", context="it", target_box=(0.0, 0.0, 1.0, 1.0))
    held_out = Record("x", (9, 9), (phrase,), path="/coco/000000000007.jpg")
    write_table([held_out], tmp_path / "val", {})
    report = convert(files, Options(images, drop_leaks=(tmp_path / "val",)), tmp_path / "table")
    assert [r.id for r in Table(tmp_path / "table")] == ["VG_100K_2/2"]
    assert list(report["leaks"].values()) == [1] and report["dropped"]["leaked image"] == 1
    report = convert(files, Options(images, leaks=(tmp_path / "val",)), tmp_path / "counted")
    assert list(report["leaks"].values()) == [1] and len(Table(tmp_path / "counted")) == 2
    image_data = next(file for file in files if file.name == "image_data.json")
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 60} for n in (1, 2)],
        "annotations": [
            {"id": n, "image_id": n, "bbox": [15, 10, 15, 10], "caption": "a car"} for n in (1, 2)
        ],
    }
    grit = [write(tmp_path / "train.json", content), image_data]
    convert(grit, Options(images, drop_leaks=(tmp_path / "val",)), tmp_path / "grit")
    assert [r.id for r in Table(tmp_path / "grit")] == ["VG_100K_2/2"]
    with pytest.raises(ValueError, match="no coco_id to find leaks by; give image_data.json"):
        convert(files[:1], Options(images, drop_leaks=(tmp_path / "val",)), tmp_path / "other")


def test_images_are_checked(tmp_path: Path, images: Path):
    with pytest.raises(ValueError, match=r"image 1: .*\(40, 60\).*\(41, 60\)"):
        convert(write_corpus(tmp_path, height=41), Options(images), tmp_path / "table")
    (images / "VG_100K/1.jpg").unlink()
    files = write_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match="image 1: .*VG_100K_2/1.jpg.*--skip-missing"):
        convert(files, Options(images), tmp_path / "table")
    report = convert(files, Options(images, skip_missing=True), tmp_path / "table")
    assert report["dropped"] == {"missing image": 1, "image without phrases": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": 1, "regions": [{"region_id": 5}]}], r"regions\[0\] has no x, y, width"),
        ([{"id": 1, "regions": [region(5, 1, "a", x="b")]}], "region 5: bbox"),
        ([{"id": 1, "regions": [region(5, 1, 8)]}], "region 5: the text is not a string"),
        ([{"regions": []}], "has no id"),
        ([{"id": 1}], "has no image_id, width, height"),
        ([4], "4 is no object"),
        ({"images": [], "annotations": [{"id": 1, "image_id": 1}]}, "has no caption, bbox"),
        ("text", "no list 'images'"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, images: Path, content: Any, message: str):
    file = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        convert([file], Options(images), tmp_path / "table")
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("chunk", [3, 5, 64, 2**20])
def test_lists_are_streamed_whatever_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    """An entry, an escape or a letter of several bytes may lie across two chunks."""
    monkeypatch.setattr(data.annotations, "CHUNK", chunk)
    entries = [{"a": 'é]["\\', "b": [1.5, {}]}, {}, {"c": None, "d": "x" * 100}]
    for text in (json.dumps(entries), json.dumps(entries, ensure_ascii=False, indent=2)):
        (tmp_path / "list.json").write_text(" \n" + text + "\n", encoding="utf-8")
        assert list(stream_list(tmp_path / "list.json")) == entries
    (tmp_path / "list.json").write_text("[]")
    assert list(stream_list(tmp_path / "list.json")) == []


@pytest.mark.parametrize(
    "text", [b'[{"a": 1}', b'[{"a": 1}, {"b": ', b'[{"a"}]', b'[{"a": "\xff"}]']
)
def test_a_damaged_list_is_named(tmp_path: Path, text: bytes):
    (tmp_path / "list.json").write_bytes(text)
    with pytest.raises(ValueError, match="list.json: not a list of JSON objects, or cut"):
        list(stream_list(tmp_path / "list.json"))


def test_a_damaged_list_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rest would be searched again with every chunk, hours for a published file."""
    monkeypatch.setattr(data.annotations, "CHUNK", 10)
    monkeypatch.setattr(data.annotations, "LONGEST_ENTRY", 50)
    (tmp_path / "list.json").write_bytes(b'[{"a" 1}, ' + b'{"a": 1}, ' * 5000 + b"\xff]")
    with pytest.raises(ValueError, match="Expecting ':' delimiter"):
        list(stream_list(tmp_path / "list.json"))


def test_the_command_ends_with_one_line(tmp_path: Path, images: Path):
    with pytest.raises(SystemExit, match="^error: .*absent.json"):
        main((tmp_path / "absent.json",), Options(images), tmp_path / "table")


@pytest.mark.parametrize("layout", ["published", "grit"])
def test_the_real_sample_keeps_all_regions(tmp_path: Path, layout: str):
    folder = REAL / "visual_genome"
    if not folder.exists():
        pytest.skip(f"no real data at {REAL}; set PIXELLLM_REAL_DATA to its folder")
    Image.new("L", (800, 600)).save(tmp_path / "1.jpg")
    published = ["region_descriptions_image1.json", "image_data_image1.json"]
    names = {"published": [*published, "densecap_splits.json"], "grit": ["grit_schema_image1.json"]}
    files = [folder / name for name in names[layout]]
    content = json.loads((folder / published[0]).read_text())
    splits = json.loads((folder / "densecap_splits.json").read_text())
    split = next((name for name, ids in splits.items() if 1 in ids), None)
    options = Options(tmp_path, split if layout == "published" else None)
    report = convert(files, options, tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    assert report["phrases"] == len(record.phrases) == len(content[0]["regions"])
    for phrase, entry in zip(record.phrases, content[0]["regions"], strict=True):
        assert phrase.id == f"region/{entry['region_id']}"
        assert phrase.caption == " ".join(entry["phrase"].split())
        assert phrase.target_box[0] == pytest.approx(max(entry["x"], 0) / 800)
