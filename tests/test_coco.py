"""COCO files to tables: every form of segmentation, what is dropped, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data.coco import convert, main
from data.scenes import Options, write_scenes
from pixelllm.tables import Table

REAL = Path(
    os.environ.get("PIXELLLM_REAL_DATA", Path(__file__).parents[2] / "shared" / "data" / "real")
)
HEIGHT, WIDTH = 40, 60
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
SQUARE[10:20, 15:30] = 1
COUNTS = [15 * HEIGHT + 10] + [10, HEIGHT - 10] * 14 + [10, 30 * HEIGHT + 20]


def instance(number: int, image: int = 1, **values: Any) -> dict[str, Any]:
    annotation = {
        "id": number,
        "image_id": image,
        "category_id": 3,
        "bbox": [15, 10, 15, 10],
        "iscrowd": 0,
        "segmentation": [[15, 10, 30, 10, 30, 20, 15, 20]],
    }
    return {**annotation, **values}


@pytest.fixture
def corpus(tmp_path: Path):
    """A folder of images 1 and 2, and a function that writes an annotation file for them."""
    folder = tmp_path / "val"
    folder.mkdir()
    for image in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{image:012d}.jpg")

    def write(annotations: list[dict[str, Any]], name: str = "instances.json", **values: Any):
        images = [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in (1, 2)
        ]
        content = {"images": images, "annotations": annotations, **values}
        content.setdefault("categories", [{"id": 3, "name": "red car"}])
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return folder, write


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
@pytest.mark.parametrize("form", ["polygon", "counts", "compressed"])
def test_every_form_of_mask_is_the_same_region(corpus, tmp_path: Path, form: str):
    folder, write = corpus
    compressed = coco_mask.encode(np.asfortranarray(SQUARE))
    forms = {
        "polygon": [[15, 10, 30, 10, 30, 20, 15, 20]],
        "counts": {"size": [HEIGHT, WIDTH], "counts": COUNTS},
        "compressed": {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
    }
    file = write([instance(7, segmentation=forms[form])])
    convert([file], folder, tmp_path / "table")
    (phrase,) = Table(tmp_path / "table")[0].phrases
    assert (phrase.id, phrase.task, phrase.caption) == ("region/7", "region", "red car")
    assert phrase.prompt_box == phrase.target_box
    assert phrase.prompt_box == pytest.approx((0.25, 0.25, 0.5, 0.5))
    assert np.array_equal(coco_mask.decode(phrase.mask), SQUARE)


def test_an_instance_alone_of_its_kind_is_an_expression(corpus, tmp_path: Path):
    """Catches names that mean several, crowds included, and the name that was not asked for."""
    folder, write = corpus
    cars = [{"id": 3, "name": "red car", "supercategory": "car"},
            {"id": 4, "name": "blue car", "supercategory": "car"},
            {"id": 5, "name": "red boat", "supercategory": "boat"}]  # fmt: skip
    red, blue = instance(1), instance(2, category_id=4, bbox=[0, 0, 10, 10], segmentation=[])
    boat = instance(3, category_id=5)
    crowd = instance(4, category_id=5, iscrowd=1, segmentation={"size": [40, 60], "counts": [2400]})
    file = write([red, blue, boat, crowd], categories=cars)

    def expressions(naming) -> dict[str, str]:
        convert([file], folder, tmp_path / "table", expressions=naming)
        phrases = Table(tmp_path / "table")[0].phrases
        boxes = {p.id.split("/")[1]: p.target_box for p in phrases if p.task == "region"}
        found = [phrase for phrase in phrases if phrase.task == "referring"]
        assert all(phrase.target_box == boxes[phrase.id.rpartition("-")[2]] for phrase in found)
        return {phrase.id: phrase.context for phrase in found}

    assert expressions(None) == {}
    assert expressions("category") == {
        "referring/region-1": "red car",
        "referring/region-2": "blue car",
    }
    assert expressions("supercategory") == {}
    file = write([red, boat], categories=cars)
    assert expressions("supercategory") == {
        "referring/region-1": "car",
        "referring/region-3": "boat",
    }


def test_expressions_need_the_supercategories(corpus, tmp_path: Path):
    folder, write = corpus
    with pytest.raises(ValueError, match="category 'red car' has no supercategory"):
        convert([write([instance(1)])], folder, tmp_path / "t", expressions="supercategory")
    assert not (tmp_path / "t").exists()


def test_boxes_are_clipped_and_a_mask_is_not_required(corpus, tmp_path: Path):
    folder, write = corpus
    file = write([instance(1, bbox=[30.0, -5, 60.5, 25], segmentation=[])])
    convert([file], folder, tmp_path / "table")
    (phrase,) = Table(tmp_path / "table")[0].phrases
    assert phrase.target_box == pytest.approx((0.5, 0.0, 1.0, 0.5)) and phrase.mask is None


def test_captions_and_regions_of_an_image_share_a_record(corpus, tmp_path: Path):
    folder, write = corpus
    instances = write([instance(1), instance(2), instance(3, image=2)])
    captions = write(
        [{"id": 9, "image_id": 1, "caption": " A car\n on grass. "}], "captions.json", categories=[]
    )
    report = convert([instances, captions], folder, tmp_path / "table")
    first, second = Table(tmp_path / "table")
    assert (first.id, first.size, first.path) == (
        "val/1",
        (HEIGHT, WIDTH),
        str(folder / "000000000001.jpg"),
    )
    assert [phrase.task for phrase in first.phrases] == ["region", "region", "caption"]
    caption = first.phrases[-1]
    assert (caption.caption, caption.prompt_box) == ("A car on grass.", None)
    assert [phrase.task for phrase in second.phrases] == ["region"]
    assert (report["kept"], report["regions"], report["captions"]) == (2, 3, 1)


def test_what_is_dropped_is_counted(corpus, tmp_path: Path):
    folder, write = corpus
    crowd = instance(2, iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": COUNTS})
    empty = [instance(3, bbox=[5, 5, 0, 3]), instance(4, bbox=[70, 5, 9, 3])]
    blank = {"id": 5, "image_id": 1, "caption": " "}
    file = write([instance(1), crowd, *empty, blank])
    report = convert([file], folder, tmp_path / "table")
    assert len(Table(tmp_path / "table")) == report["kept"] == report["regions"] == 1
    dropped = {"crowd": 1, "empty box": 2, "empty caption": 1, "image without phrases": 1}
    assert report["dropped"] == dropped
    assert json.loads((tmp_path / "table/report.json").read_text())["dropped"] == dropped


def test_a_missing_image_is_named_or_skipped(corpus, tmp_path: Path):
    folder, write = corpus
    file = write([instance(1), instance(2, image=2)])
    (folder / "000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="image 2: .*000000000002.jpg.*--skip-missing"):
        convert([file], folder, tmp_path / "table")
    assert not (tmp_path / "table").exists() and not list(tmp_path.glob("*.partial"))
    report = convert([file], folder, tmp_path / "table", skip_missing=True)
    assert report["dropped"] == {"missing image": 1}


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1}], r"categories\[0\] has no name"),
        ([{"name": "cat"}], r"categories\[0\] has no id"),
        ([{"id": [3], "name": "cat"}], r"categories\[0\]: id is not a number but \[3\]"),
        ([{"id": 3, "name": None}], r"categories\[0\]: no name but None"),
        ({"1": "cat"}, "categories is not a list but dict"),
    ],
)
def test_bad_categories_are_named(corpus, tmp_path: Path, categories: Any, message: str):
    folder, write = corpus
    with pytest.raises(ValueError, match=f"instances.json: {message}"):
        convert([write([instance(1)], categories=categories)], folder, tmp_path / "table")


def test_files_whose_ids_mean_other_things_are_not_mixed(corpus, tmp_path: Path):
    folder, write = corpus
    first = write([instance(1)])
    other = write([instance(2)], "b.json", categories=[{"id": 3, "name": "dog"}])
    with pytest.raises(ValueError, match="b.json: category 3 is 'dog' here and 'red car' in a"):
        convert([first, other], folder, tmp_path / "table")
    other.write_text(first.read_text().replace("000000000001", "000000000007"))
    with pytest.raises(ValueError, match="b.json: image 1 is 000000000007.jpg here and 0000"):
        convert([first, other], folder, tmp_path / "table")
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (instance(5, category_id=8), "annotation 5 of image 1: category 8"),
        (instance(5, category_id=[3]), r"annotation 5: category \[3\]"),
        (instance(5, image=[1]), r"annotations\[0\]: image_id is not a number but \[1\]"),
        (instance(5, image=77), "annotation 5 is of image 77"),
        (instance(5, bbox=[1, 2, 3]), r"annotation 5 of image 1: bbox .*\[1, 2, 3\]"),
        (
            instance(5, segmentation={"size": [9, 9], "counts": "0"}),
            r"annotation 5 .* mask of size \[9, 9\]",
        ),
        ({"id": 5}, r"annotations\[0\] has no image_id"),
    ],
)
def test_bad_annotations_are_named(corpus, tmp_path: Path, annotation: dict, message: str):
    folder, write = corpus
    with pytest.raises(ValueError, match=message):
        convert([write([annotation])], folder, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_files_that_are_not_coco_are_refused(corpus, tmp_path: Path):
    folder, write = corpus
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [')
    with pytest.raises(ValueError, match="broken.json: not a JSON file"):
        convert([broken], folder, tmp_path / "table")
    broken.write_text("[1, 2]")
    with pytest.raises(ValueError, match="broken.json: no list 'images'"):
        convert([broken], folder, tmp_path / "table")
    with pytest.raises(FileNotFoundError, match="absent.json"):
        convert([tmp_path / "absent.json"], folder, tmp_path / "table")
    with pytest.raises(FileNotFoundError, match="--images"):
        convert([write([instance(1)])], tmp_path / "nowhere", tmp_path / "table")


def test_resized_images_are_refused(corpus, tmp_path: Path):
    folder, write = corpus
    Image.new("RGB", (WIDTH // 2, HEIGHT // 2)).save(folder / "000000000001.jpg")
    with pytest.raises(ValueError, match=r"image 1: .*\(20, 30\).*\(40, 60\)"):
        convert([write([instance(1)])], folder, tmp_path / "table")


def test_scenes_become_a_table_with_their_objects(tmp_path: Path, capsys: pytest.CaptureFixture):
    scenes = tmp_path / "scenes"
    write_scenes(Options(scenes, train=0, val=5, num_proc=1))
    annotations = scenes / "annotations"
    main(
        (annotations / "instances_val.json",),
        images=scenes / "val",
        out=tmp_path / "table",
        captions=annotations / "captions_val.json",
    )
    report = json.loads(capsys.readouterr().out)
    lines = (annotations / "scenes_val_truth.jsonl").read_text().splitlines()
    truth = [json.loads(line) for line in lines]
    assert report["kept"] == 5 and report["regions"] == sum(len(t["objects"]) for t in truth)
    for record, line in zip(Table(tmp_path / "table"), truth, strict=True):
        *regions, caption = record.phrases
        assert caption.task == "caption"
        for phrase, thing in zip(regions, line["objects"], strict=True):
            assert phrase.caption == f"{thing['colour']} {thing['kind']}"
            assert phrase.target_box == pytest.approx(thing["box"], abs=1e-4)


def test_bad_input_ends_the_command_with_one_line(tmp_path: Path):
    with pytest.raises(SystemExit, match="^error: .*absent.json"):
        main((tmp_path / "absent.json",), images=tmp_path, out=tmp_path / "table")


def test_real_captions_are_read(tmp_path: Path):
    file = REAL / "coco/annotations/captions_val2017_subset.json"
    if not file.exists():
        pytest.skip(f"no real data at {REAL}; set PIXELLLM_REAL_DATA to its folder")
    content = json.loads(file.read_text())
    convert([file], REAL / "coco/images/val2017", tmp_path / "table")
    table = Table(tmp_path / "table")
    assert sum(len(record.phrases) for record in table) == len(content["annotations"])
    sizes = {
        f"val2017/{image['id']}": (image["height"], image["width"]) for image in content["images"]
    }
    assert all(sizes[record.id] == record.size for record in table)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
def test_real_polygons_keep_their_area(tmp_path: Path):
    file = REAL / "coco/annotations/instances_val2017_39769.json"
    if not file.exists():
        pytest.skip(f"no real data at {REAL}; set PIXELLLM_REAL_DATA to its folder")
    content = json.loads(file.read_text())
    (image,) = content["images"]
    Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    convert([file], tmp_path, tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    assert len(record.phrases) == len(content["annotations"])
    for phrase, annotation in zip(record.phrases, content["annotations"], strict=True):
        assert coco_mask.decode(phrase.mask).sum() == pytest.approx(annotation["area"], rel=0.05)
