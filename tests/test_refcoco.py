"""Referring expressions to tables: every published layout, and what is refused or left out."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data.refcoco import Options, convert, load_refs, main
from pixelllm.tables import Table

REAL = Path(
    os.environ.get("PIXELLLM_REAL_DATA", Path(__file__).parents[2] / "shared" / "data" / "real")
)
HEIGHT, WIDTH = 40, 60
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
SQUARE[10:20, 15:30] = 1
POLYGON = [[15, 10, 30, 10, 30, 20, 15, 20]]
COUNTS = [15 * HEIGHT + 10] + [10, HEIGHT - 10] * 14 + [10, 30 * HEIGHT + 20]
COMPRESSED = coco_mask.encode(np.asfortranarray(SQUARE))["counts"].decode()
BOX = (0.25, 0.25, 0.5, 0.5)


def coco_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """COCO images 1 to 3, an image of Visual Genome and one of Flickr30k."""
    folder = tmp_path / "images"
    names = [f"train2014/{coco_name(number)}" for number in (1, 2, 3)]
    for name in [*names, "VG_100K_2/1.jpg", "flickr30k-images/1000092795.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    return folder


def reference(number: int, image: int, split: str, *sentences: str) -> dict[str, Any]:
    """An entry of `refs(*).p`."""
    ids = [10 * number + i for i in range(len(sentences))]
    return {
        "sent_ids": ids,
        "file_name": coco_name(image).replace(".jpg", f"_{number}.jpg"),
        "ann_id": 100 + number,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": i, "sent": text}
            for i, text in zip(ids, sentences, strict=True)
        ],
        "category_id": 1,
    }


REFS = [
    reference(1, 1, "train", "red car", "the  car\n"),
    reference(2, 1, "train", "left man"),
    reference(3, 2, "testA", "tall man", ""),
    reference(4, 3, "val", "dog"),
]


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_refer(
    folder: Path, refs: list[dict] = REFS, protocol: int = 2, **changes: Any
) -> list[Path]:
    """`refs(unc).p` and the instances.json beside it."""
    annotations = [
        {
            "id": ref["ann_id"],
            "image_id": ref["image_id"],
            "category_id": 1,
            "bbox": [15.0, 10.0, 15.0, 10.0],
            "area": 150.0,
            "iscrowd": 0,
            "segmentation": POLYGON,
            **changes,
        }
        for ref in refs
    ]
    entries = [
        {"id": n, "file_name": coco_name(n), "height": HEIGHT, "width": WIDTH} for n in (1, 2, 3)
    ]
    content = {
        "info": {},
        "images": entries,
        "licenses": [],
        "annotations": annotations,
        "categories": [{"supercategory": "vehicle", "id": 1, "name": "car"}],
    }
    instances = write_json(folder / "instances.json", content)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    return [folder / "refs(unc).p", instances]


def python2_pickle(text: bytes) -> bytes:
    """[{'sent': text}] as Python 2 wrote it: its strings are bytes without an encoding."""
    return b"\x80\x02]q\x01}q\x02U\x04sentq\x03U" + bytes([len(text)]) + text + b"q\x04sa."


def test_expressions_are_captions_of_their_boxes_where_asked(tmp_path: Path, images: Path):
    files = write_refer(tmp_path / "refcoco")
    convert(files, Options(images, "val", regions=True), tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    expression, region = record.phrases
    assert (region.id, region.task, region.caption) == ("region/40", "region", "dog")
    assert region.prompt_box == region.target_box == expression.target_box
    assert expression.prompt_box is None and region.context == ""


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_and_its_instances_become_records_by_image(
    tmp_path: Path, images: Path, protocol: int
):
    files = write_refer(tmp_path / "refcoco", protocol=protocol)
    report = convert(files, Options(images, "train"), tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    assert (record.id, record.size) == ("train2014/1", (HEIGHT, WIDTH))
    assert record.path == str(images / "train2014" / coco_name(1))
    found = [(phrase.id, phrase.caption, phrase.context) for phrase in record.phrases]
    assert found == [
        ("referring/10", "red car", "red car"),
        ("referring/11", "the car", "the car"),
        ("referring/20", "left man", "left man"),
    ]
    for phrase in record.phrases:
        assert (phrase.task, phrase.prompt_box) == ("referring", None)
        assert phrase.target_box == pytest.approx(BOX)
        assert np.array_equal(coco_mask.decode(phrase.mask), SQUARE)
    assert report["files"] == [str(file) for file in files]
    assert (report["split"], report["kept"], report["phrases"]) == ("train", 1, 3)


def test_strings_of_python_2_are_read(tmp_path: Path):
    """Without an encoding, Python 3 stops at the first accent."""
    file = tmp_path / "refs(google).p"
    file.write_bytes(python2_pickle(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"references\[0\] has no ref_id"):
        load_refs(file)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_could_run_code_is_refused_and_says_what_it_asked_for(
    tmp_path: Path, images: Path, protocol: int
):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    refs, instances = write_refer(tmp_path / "refcoco")
    refs.write_bytes(pickle.dumps([*REFS, os.system, Malicious()], protocol=protocol))
    with pytest.raises(ValueError, match=r"refs\(unc\).p: .*posix.system.*do not use this file"):
        convert([refs, instances], Options(images, "train"), tmp_path / "table")
    refs.write_bytes(pickle.dumps([Malicious()], protocol=protocol))
    with pytest.raises(ValueError, match=r"refs\(unc\).p: .*it asks for \w+"):
        convert([refs, instances], Options(images, "train"), tmp_path / "table")
    assert not (tmp_path / "owned").exists() and not (tmp_path / "table").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(REFS)[:-40], b"\x80\x02K\x01b."])
def test_a_damaged_pickle_is_named(tmp_path: Path, images: Path, content: bytes):
    refs, instances = write_refer(tmp_path / "refcoco")
    refs.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\).p: not a list of references"):
        convert([refs, instances], Options(images, "train"), tmp_path / "table")


def test_a_reference_needs_its_instances(tmp_path: Path, images: Path):
    refs, instances = write_refer(tmp_path / "refcoco")
    with pytest.raises(ValueError, match="reference 1: .*image 1 or annotation 101; add the inst"):
        convert([refs], Options(images, "train"), tmp_path / "table")
    with pytest.raises(ValueError, match="instances.json needs its refs"):
        convert([instances], Options(images), tmp_path / "table")


def test_a_split_must_be_chosen_from_those_there_are(tmp_path: Path, images: Path):
    files = write_refer(tmp_path / "refcoco")
    with pytest.raises(ValueError, match="hold the splits testA, train, val; choose one"):
        convert(files, Options(images), tmp_path / "table")
    with pytest.raises(ValueError, match="--split test: .*choose one of testA, train, val"):
        convert(files, Options(images, "test"), tmp_path / "table")
    with pytest.raises(ValueError, match="--split val: .*one split, leave it out"):
        convert([write_mdetr(tmp_path)], Options(images, "val"), tmp_path / "table")


def write_mdetr(folder: Path, **changes: Any) -> Path:
    """finetune_refcoco_train.json: an image entry and an annotation for every sentence."""
    sentences = [(1, 101, "red car"), (2, 103, "a man"), (1, 101, "the car"), (1, 102, "dog")]
    entries = [
        {
            "file_name": coco_name(image),
            "height": HEIGHT,
            "width": WIDTH,
            "id": number,
            "original_id": image,
            "caption": text,
            "dataset_name": "refcoco",
            "tokens_negative": [[0, len(text)]],
        }
        for number, (image, _, text) in enumerate(sentences)
    ]
    annotations = [
        {
            "area": 150.0,
            "iscrowd": 0,
            "image_id": number,
            "category_id": 3,
            "id": 500 + number,
            "bbox": [15.0, 10.0, 15.0, 10.0],
            "original_id": annotation,
            "tokens_positive": [[0, 3]],
            **changes,
        }
        for number, (_, annotation, _) in enumerate(sentences)
    ]
    content = {"info": {}, "images": entries, "annotations": annotations, "categories": []}
    return write_json(folder / "finetune_refcoco_train.json", content)


def test_mdetrs_entries_are_regrouped_by_image(tmp_path: Path, images: Path):
    convert([write_mdetr(tmp_path)], Options(images), tmp_path / "table")
    first, second = Table(tmp_path / "table")
    assert (first.id, second.id) == ("train2014/1", "train2014/2")
    found = [(phrase.id, phrase.caption) for phrase in first.phrases]
    assert found == [
        ("referring/500", "red car"),
        ("referring/502", "the car"),
        ("referring/503", "dog"),
    ]
    assert first.phrases[0].target_box == pytest.approx(BOX) and first.phrases[0].mask is None


def test_mdetrs_layout_is_told_by_any_of_its_entries(tmp_path: Path, images: Path):
    file = write_mdetr(tmp_path)
    content = json.loads(file.read_text())
    del content["images"][0]["caption"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="finetune_refcoco_train.json: image 0: the text"):
        convert([file], Options(images), tmp_path / "table")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
@pytest.mark.parametrize(
    "segmentation",
    [
        POLYGON,
        {"size": [HEIGHT, WIDTH], "counts": COUNTS},
        {"size": [HEIGHT, WIDTH], "counts": COMPRESSED},
    ],
)
def test_merged_files_carry_masks_in_every_form(tmp_path: Path, images: Path, segmentation: Any):
    convert([write_mdetr(tmp_path, segmentation=segmentation)], Options(images), tmp_path / "table")
    for record in Table(tmp_path / "table"):
        for phrase in record.phrases:
            assert np.array_equal(coco_mask.decode(phrase.mask), SQUARE)


def test_uninexts_conversion_has_several_expressions_an_entry(tmp_path: Path, images: Path):
    entry = {"file_name": coco_name(1), "height": HEIGHT, "width": WIDTH, "id": 7}
    annotation = {"id": 7, "image_id": 7, "bbox": [15, 10, 15, 10], "segmentation": POLYGON}
    content = {
        "images": [{**entry, "expressions": ["red car", "the car"]}],
        "annotations": [annotation],
        "categories": [],
    }
    convert([write_json(tmp_path / "a.json", content)], Options(images), tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    assert [(phrase.id, phrase.caption) for phrase in record.phrases] == [
        ("referring/7", "red car"),
        ("referring/7/1", "the car"),
    ]


def seqtr_entry(image: int, *expressions: str, **values: Any) -> dict[str, Any]:
    return {
        "bbox": [15.0, 10.0, 15.0, 10.0],
        "image_id": image,
        "height": HEIGHT,
        "width": WIDTH,
        "category_id": 0,
        "expressions": list(expressions),
        **values,
    }


def test_mixed_sources_are_found_in_their_folders(tmp_path: Path, images: Path):
    """COCO and Visual Genome both have an image 1."""
    entries = [
        seqtr_entry(1, "red car", data_source="coco", mask=POLYGON),
        seqtr_entry(1, "a tree", "green tree", data_source="vg"),
        seqtr_entry(1000092795, "two men", data_source="flickr"),
        seqtr_entry(1, "the cat", data_source="coco"),
        seqtr_entry(9, "clouds", data_source="saiaprtc12"),
    ]
    content = {"train": entries, "val_refcoco_unc": [seqtr_entry(2, "man", data_source="coco")]}
    file = write_json(tmp_path / "mixed/instances.json", content)
    report = convert([file], Options(images, "train"), tmp_path / "table")
    records = list(Table(tmp_path / "table"))
    found = {record.id: [phrase.caption for phrase in record.phrases] for record in records}
    assert found == {
        "train2014/1": ["red car", "the cat"],
        "VG_100K_2/1": ["a tree", "green tree"],
        "flickr30k-images/1000092795": ["two men"],
    }
    masks = [phrase.mask is not None for record in records for phrase in record.phrases]
    assert masks == [True, False, False, False, False]
    assert report["dropped"] == {"image of saiaprtc12": 1}
    ids = [phrase.id for record in records for phrase in record.phrases]
    assert ids[0] == "referring/train/0/0" and len(set(ids)) == len(ids)


def test_one_source_of_a_mixture_can_be_taken(tmp_path: Path, images: Path):
    entries = [
        seqtr_entry(1, "red car", data_source="coco"),
        seqtr_entry(1, "a tree", data_source="vg"),
    ]
    file = write_json(tmp_path / "instances.json", {"train": entries})
    convert([file], Options(images / "train2014", source="coco"), tmp_path / "table")
    assert [record.id for record in Table(tmp_path / "table")] == ["train2014/1"]


def test_leaks_of_visual_genome_are_found_by_its_list_of_images(tmp_path: Path, images: Path):
    """Its image 1 is COCO's image 2, which RefCOCO holds out."""
    entries = [
        seqtr_entry(1, "a tree", data_source="vg"),
        seqtr_entry(1, "red car", data_source="coco"),
    ]
    file = write_json(tmp_path / "mixed.json", {"train": entries})
    held_out = write_refer(tmp_path / "refcoco", [reference(1, 2, "val", "man")])[0]
    with pytest.raises(ValueError, match="no way to find the leaks of 1.jpg; give Visual Genome's"):
        convert([file], Options(images, drop_leaks=(held_out,)), tmp_path / "table")
    image_data = write_json(
        tmp_path / "image_data.json",
        [{"image_id": 1, "coco_id": 2}, {"image_id": 5, "coco_id": None}],
    )
    options = Options(images, image_data=image_data, drop_leaks=(held_out,))
    report = convert([file], options, tmp_path / "table")
    assert [record.id for record in Table(tmp_path / "table")] == ["train2014/1"]
    assert list(report["leaks"].values()) == [1]


def test_images_of_unnamed_sources_are_told_by_their_numbers(tmp_path: Path, images: Path):
    """Only mixtures name their sources; a Flickr30k file may begin with a small number."""
    (images / "flickr30k-images/3.jpg").write_bytes((images / "VG_100K_2/1.jpg").read_bytes())
    for numbers, expected in [((3,), "train2014/3"), ((3, 1000092795), "flickr30k-images/3")]:
        content = {"train": [seqtr_entry(number, "a man") for number in numbers], "val": []}
        file = write_json(tmp_path / "instances.json", content)
        convert([file], Options(images, "train"), tmp_path / "table")
        assert Table(tmp_path / "table")[0].id == expected


def test_solution_boxes_are_corners_and_may_be_missing(tmp_path: Path, images: Path):
    entry = {"height": HEIGHT, "width": WIDTH, "image": f"train2014/{coco_name(2)}"}
    content = [
        {**entry, "normal_caption": "a bowl", "solution": [15.0, 10.0, 30.0, 20.0]},
        {**entry, "normal_caption": "no bowl", "solution": None},
    ]
    file = write_json(tmp_path / "refcocos_test.json", content)
    report = convert([file], Options(images), tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    (phrase,) = record.phrases
    assert (record.id, phrase.caption) == ("train2014/2", "a bowl")
    assert phrase.target_box == pytest.approx(BOX)
    assert report["dropped"] == {"expression without target": 1}


def test_what_means_nothing_or_says_nothing_is_counted(tmp_path: Path, images: Path):
    entries = [
        seqtr_entry(1, "red car", " "),
        seqtr_entry(1, "nobody", "no one", bbox=None),
        seqtr_entry(2, "outside", bbox=[70, 5, 9, 3]),
    ]
    file = write_json(tmp_path / "instances.json", {"val": entries})
    report = convert([file], Options(images), tmp_path / "table")
    assert report["phrases"] == 1 and report["dropped"] == {
        "empty expression": 1,
        "expression without target": 2,
        "empty box": 1,
        "image without phrases": 1,
    }


def test_ids_stay_unique_when_sets_are_merged(tmp_path: Path, images: Path):
    """The sets number their sentences independently."""
    plus = [reference(1, 1, "train", "a car"), reference(4, 3, "train", "a dog")]
    files = [*write_refer(tmp_path / "refcoco"), *write_refer(tmp_path / "refcoco+", plus)]
    convert(files, Options(images, "train"), tmp_path / "table")
    first, second = Table(tmp_path / "table")
    assert [phrase.id for phrase in first.phrases] == [
        "referring/10",
        "referring/11",
        "referring/20",
        "referring/10#1",
    ]
    assert [phrase.caption for phrase in second.phrases] == ["a dog"]


def test_expressions_of_one_form_can_be_taken(tmp_path: Path, images: Path):
    entries = [
        seqtr_entry(1, "the red object", "the red car"),
        seqtr_entry(2, "the large object on the left"),
        seqtr_entry(3, "a dog", "a dog at a door"),
    ]
    file = write_json(tmp_path / "instances.json", {"train": entries})
    options = Options(images, matching=("the * object", "*dog"))
    report = convert([file], options, tmp_path / "table")
    captions = [
        [phrase.caption for phrase in record.phrases] for record in Table(tmp_path / "table")
    ]
    assert captions == [["the red object"], ["a dog"]]
    assert report["dropped"] == {"expression of another form": 3, "image without phrases": 1}


def test_leaks_are_counted_by_split_and_dropped_on_request(tmp_path: Path, images: Path):
    """RefCOCOg's training images include some that RefCOCO tests on."""
    train = [reference(n, n, "train", "thing") for n in (1, 2, 3)]
    files = write_refer(tmp_path / "refcocog", train)
    other = write_refer(tmp_path / "refcoco")[0]
    report = convert(files, Options(images, "train", leaks=(other,)), tmp_path / "table")
    expected = {"refcoco/refs(unc).p testA": 1, "refcoco/refs(unc).p val": 1}
    assert report["leaks"] == expected and len(Table(tmp_path / "table")) == 3
    report = convert(files, Options(images, "train", drop_leaks=(other,)), tmp_path / "safe")
    assert report["leaks"] == expected and report["dropped"] == {"leaked image": 2}
    assert [record.id for record in Table(tmp_path / "safe")] == ["train2014/1"]


def test_no_image_can_leak_from_a_table_of_training_images(tmp_path: Path, images: Path):
    train = write_refer(tmp_path / "g", [reference(n, n, "train", "thing") for n in (1, 2)])
    convert(train, Options(images, "train"), tmp_path / "train")
    with pytest.raises(ValueError, match="train: no COCO image outside its train split"):
        convert(train, Options(images, leaks=(tmp_path / "train",)), tmp_path / "table")


def test_tables_and_other_layouts_can_be_held_out(tmp_path: Path, images: Path):
    files = write_refer(tmp_path / "refcoco")
    convert(files, Options(images, "testA"), tmp_path / "testA")  # image 2
    mdetr = write_mdetr(tmp_path / "mdetr")  # images 1 and 2
    mixed = {"val": [seqtr_entry(3, "x")], "train": [seqtr_entry(1, "x")]}
    seqtr = write_json(tmp_path / "seqtr/instances.json", mixed)
    train = write_refer(tmp_path / "g", [reference(n, n, "train", "thing") for n in (1, 2, 3)])
    options = Options(images, leaks=(mdetr, seqtr), drop_leaks=(tmp_path / "testA",))
    report = convert(train, options, tmp_path / "table")
    assert report["leaks"] == {
        "mdetr/finetune_refcoco_train.json": 2,
        "seqtr/instances.json val": 1,
        f"{tmp_path.name}/testA": 1,
    }
    ids = [record.id for record in Table(tmp_path / "table")]
    assert ids == ["train2014/1", "train2014/3"]
    with pytest.raises(ValueError, match="no COCO image outside its train split"):
        convert(files, Options(images, "val", leaks=(train[0],)), tmp_path / "table")


def test_a_missing_image_is_named_or_skipped(tmp_path: Path, images: Path):
    (images / "train2014" / coco_name(2)).unlink()
    file = write_mdetr(tmp_path)
    with pytest.raises(FileNotFoundError, match="COCO_train2014_000000000002.jpg.*--skip-missing"):
        convert([file], Options(images), tmp_path / "table")
    assert not (tmp_path / "table").exists()
    report = convert([file], Options(images, skip_missing=True), tmp_path / "table")
    assert (report["images"], report["dropped"]) == (2, {"missing image": 1})


def test_images_may_lie_in_the_folders_of_2017(tmp_path: Path, images: Path):
    (images / "val2017").mkdir()
    for number in (1, 2):
        old = images / "train2014" / coco_name(number)
        old.rename(images / "val2017" / f"{number:012d}.jpg")
    convert([write_mdetr(tmp_path)], Options(images), tmp_path / "table")
    assert [record.id for record in Table(tmp_path / "table")] == ["val2017/1", "val2017/2"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": COMPRESSED[:-3]}, "corrupt run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "\x01é"}, "corrupt run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": COMPRESSED + "0"}, "corrupt run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": COUNTS[:-1]}, "corrupt run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]}, "corrupt run lengths"),
        ({"size": [9, 9], "counts": COMPRESSED}, r"mask of size \[9, 9\]"),
        ({"counts": COMPRESSED}, "expected 'size' and 'counts'"),
        ({"size": 160, "counts": COMPRESSED}, "expected .H, W. and run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "expected .H, W. and run lengths"),
        ("polygon", "neither polygons nor"),
        ([[1e9, 2, 3, 4, 5, 6]], "far outside its image"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "far outside its image"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon is not a list of x, y"),
        ([["a", "b"] * 3], "a polygon is not a list of x, y"),
    ],
)
def test_a_corrupt_mask_is_named(tmp_path: Path, images: Path, segmentation: Any, message: str):
    """pycocotools crashes on some of these instead of raising."""
    files = write_refer(tmp_path / "refcoco", segmentation=segmentation)
    with pytest.raises(ValueError, match=f"reference 1: .*{message}"):
        convert(files, Options(images, "train"), tmp_path / "table")
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "a.jpg"}], r"\[0\] has no normal_caption, solution"),
        ([{"image": "a", "normal_caption": "b", "solution": [1, 2]}], "entry 0: .*x0, y0, x1, y1"),
        ({"train": "text"}, "train is not a list"),
        ({"train": [{"image_id": 1}]}, r"train\[0\] has no expressions"),
        ({"train": [seqtr_entry(1) | {"expressions": "car"}]}, "expressions a list"),
        ({"train": [seqtr_entry(1, 5)]}, r"train\[0\]: the text is not a string but 5"),
        ({"train": [seqtr_entry(1, "car", bbox=[1, 2])]}, r"train\[0\]: bbox .*\[1, 2\]"),
        ({"train": [seqtr_entry(1, "car", height=9)]}, "annotations say"),
        ({"images": [{"id": 1, "file_name": 5}], "annotations": []}, "image 1: .*file name but 5"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has no file_name"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, images: Path, content: Any, message: str):
    file = write_json(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        convert([file], Options(images), tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_the_command_reports_or_ends_with_one_line(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture
):
    files = tuple(write_refer(tmp_path / "refcoco"))
    main(files, Options(images, "val"), tmp_path / "table")
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "table/report.json").read_text())
    with pytest.raises(SystemExit, match="^error: .*absent.p"):
        main((tmp_path / "absent.p",), Options(images), tmp_path / "table")


def test_the_real_sample_of_refcocos_is_read(tmp_path: Path):
    file = REAL / "refexp/refcocos/refcocos_test.json"
    if not file.exists():
        pytest.skip(f"no real data at {REAL}; set PIXELLLM_REAL_DATA to its folder")
    content = json.loads(file.read_text())
    for entry in content:
        path = tmp_path / "coco" / entry["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (entry["width"], entry["height"])).save(path)
    report = convert([file], Options(tmp_path / "coco"), tmp_path / "table")
    meant = [entry for entry in content if entry["solution"]]
    phrases = {p.id: p for record in Table(tmp_path / "table") for p in record.phrases}
    assert len(phrases) == len(meant)
    assert report["dropped"]["expression without target"] == len(content) - len(meant)
    for number, entry in enumerate(content):
        if entry["solution"]:
            box = phrases[f"referring/{number}"].target_box
            expected = [value / 1000 for value in entry["normalized_solution"]]
            assert box == pytest.approx(expected, abs=2e-3)
