"""The reader: published files in, a table of records out, or one clear error and nothing."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import golden_root
from PIL import Image

from data.localized_narratives import Options, convert, image_candidates, image_size, main
from pixelllm import shards
from pixelllm.alignment import rank_pieces, text_pieces
from pixelllm.records import from_row
from pixelllm.tables import Table

SIZE = (6, 8)  # (H, W)


def narrative(image_id="1", annotator_id=7, **changes):
    words = ["A", "small dog"]
    return {
        "dataset_id": "mscoco_val2017",
        "image_id": image_id,
        "annotator_id": annotator_id,
        "caption": " A small dog. ",
        "timed_caption": [
            {"utterance": word, "start_time": i, "end_time": i + 1} for i, word in enumerate(words)
        ],
        "traces": [[{"x": 0.2, "y": 0.2, "t": 0}, {"x": 0.6, "y": 0.2, "t": 2.0}], []],
        "voice_recording": "coco_val/coco_val_1_7.ogg",
        "an_extra_key": 1,
        **changes,
    }


@pytest.fixture
def images(tmp_path):
    """A folder with COCO images 1 to 5."""
    folder = tmp_path / "images"
    for number in range(1, 6):
        save_image(folder / f"val2017/{number:012d}.jpg")
    return folder


def save_image(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "red").save(path, **options)
    return path


def write(path, narratives):
    text = "\n".join(json.dumps(story) for story in narratives) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def records(path):
    table = Table(path)
    return [table[index] for index in range(len(table))]


def test_a_narrative_becomes_a_record(tmp_path, images):
    file, out = write(tmp_path / "a.jsonl", [narrative()]), tmp_path / "table"
    report = convert([file], Options(images), out)
    (record,) = records(out)
    (phrase,) = record.phrases
    assert (record.id, record.size) == ("mscoco_val2017/1", SIZE)
    assert record.path == str(images / "val2017/000000000001.jpg") and record.data is None
    assert (phrase.id, phrase.task) == ("mscoco_val2017/1/7#0", "narration")
    assert phrase.caption == "A small dog." and phrase.prompt_box is None
    assert [phrase.caption[p.start : p.end] for p in phrase.pieces] == ["A", "small dog."]
    assert phrase.pieces[0].center == pytest.approx((0.3, 0.2))
    assert phrase.pieces[1].box == pytest.approx((0.4, 0.2, 0.6, 0.2))
    assert report == json.loads((out / "report.json").read_text())
    assert report["read"] == report["kept"] == 1 and report["dropped"] == {}
    assert report["pieces"] == report["pieces_with_place"] == 2


@pytest.mark.parametrize("alignment", ["text", "rank"])
def test_the_table_holds_the_pieces_of_the_alignment(tmp_path, images, alignment):
    lines = (golden_root() / "ln_edge_cases/records.jsonl").read_text().splitlines()
    stories = [{**json.loads(line), "image_id": "1"} for line in lines]
    file = write(tmp_path / "a.jsonl", stories)
    report = convert([file], Options(images / "val2017", alignment), tmp_path / "table")
    align = {"text": text_pieces, "rank": rank_pieces}[alignment]
    kept = records(tmp_path / "table")
    assert report["without_trace"] == 2 and report["kept"] == len(kept) == len(stories)
    for record, story in zip(kept, stories, strict=True):
        expected = align({**story, "caption": story["caption"].strip()})
        assert len(record.phrases[0].pieces) == len(expected)
        for piece, wanted in zip(record.phrases[0].pieces, expected, strict=True):
            assert (piece.start, piece.end) == (wanted.start, wanted.end)
            assert piece.center == (wanted.center and pytest.approx(wanted.center, abs=1e-6))


def test_processes_and_shards_change_nothing(tmp_path, images):
    stories = [narrative(str(1 + i % 5), annotator_id=i % 3) for i in range(150)]
    whole = write(tmp_path / "all.jsonl", stories)
    shards = [write(tmp_path / f"{i}.jsonl.gz", stories[i * 50 :][:50]) for i in range(3)]
    one = convert([whole], Options(images), tmp_path / "one")
    two = convert(shards, Options(images), tmp_path / "two", num_proc=2)
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert {**one, "files": 0} == {**two, "files": 0} and two["kept"] == 150
    ids = [record.phrases[0].id for record in records(tmp_path / "one")]
    assert len(set(ids)) == 150 and ids[15].endswith("/1/0#1")


def test_narratives_without_trace_are_kept_for_their_caption(tmp_path, images):
    stories = [narrative(traces=[]), narrative(traces=[[{"x": 0, "y": 0, "t": 0}]]), narrative()]
    report = convert([write(tmp_path / "a.jsonl", stories)], Options(images), tmp_path / "t")
    assert (report["kept"], report["without_trace"]) == (3, 2)
    assert [len(record.phrases[0].pieces) for record in records(tmp_path / "t")] == [0, 0, 2]


def test_dropped_narratives_are_counted_by_reason(tmp_path, images):
    stories = [narrative(caption="  "), narrative("99"), narrative(), narrative("98")]
    options = Options(images, skip_missing=True)
    report = convert([write(tmp_path / "a.jsonl", stories)], options, tmp_path / "t")
    assert report["read"] == 4 and report["kept"] == 1
    assert report["dropped"] == {"empty caption": 1, "missing image": 2}


def test_images_can_be_embedded(tmp_path, images):
    file = write(tmp_path / "a.jsonl", [narrative()])
    convert([file], Options(images, embed_images=True), tmp_path / "t")
    (record,) = records(tmp_path / "t")
    assert record.data == (images / "val2017/000000000001.jpg").read_bytes()
    assert record.path is None


@pytest.mark.parametrize(
    ("dataset_id", "image_id", "place"),
    [
        ("mscoco_train2017", "137576", "000000137576.jpg"),
        ("mscoco_train2017", "137576", "train2017/000000137576.jpg"),
        ("mscoco_val2017", "137576", "val2017/000000137576.jpg"),
        ("mscoco_val2017", "137576", "val2014/COCO_val2014_000000137576.jpg"),
        ("mscoco_train2017", "137576", "COCO_val2014_000000137576.jpg"),
        ("Flickr30k_train", "1000092795", "flickr30k-images/1000092795.jpg"),
        ("Flickr30k_val", "1000092795", "1000092795.jpg"),
        ("ADE20k_train", "ADE_train_00000001", "images/training/ADE_train_00000001.jpg"),
        ("ADE20k_validation", "ADE_val_00000001", "ADE_val_00000001.jpg"),
        ("ADE20k_train", "ADE_train_00000001", "a/abbey/ADE_train_00000001.jpg"),
        ("open_images_train", "000002b66c9c498e", "train/000002b66c9c498e.jpg"),
        ("open_images_validation", "0001eeaf4aed83f9", "validation/0001eeaf4aed83f9.jpg"),
        ("open_images_test", "000026e7ee790996", "000026e7ee790996.jpg"),
        ("scenes_train", "12", "train/000000000012.jpg"),
        ("scenes_val", "900000001", "val/000900000001.jpg"),
        ("my_photos", "holiday", "holiday.png"),
    ],
)
def test_images_are_found_by_the_rules_of_their_corpus(tmp_path, dataset_id, image_id, place):
    path = save_image(tmp_path / place)
    candidates = image_candidates(tmp_path, dataset_id, image_id)
    assert [candidate for candidate in candidates if candidate.is_file()] == [path]


def test_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_size(save_image(tmp_path / "turned.jpg", (6, 8), exif=exif)) == (8, 6)
    exif[0x0112] = 9  # which is no orientation
    assert image_size(save_image(tmp_path / "unknown.jpg", (6, 8), exif=exif)) == (6, 8)
    assert image_size(save_image(tmp_path / "plain.png", (6, 8))) == (6, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"dataset_id": ', r"a\.jsonl:3: not a JSON object"),
        ("[1, 2]", r"a\.jsonl:3: expected an object, got list"),
        ({**narrative(), "caption": None}, r"a\.jsonl:3: caption is not a string"),
        ({"dataset_id": "mscoco_val2017"}, r"a\.jsonl:3: field 'image_id' is missing"),
        (narrative(traces=[[{"x": 1, "t": 2}]]), r"a\.jsonl:3: mscoco_val2017/1: traces: .*'y'"),
        (narrative(timed_caption=[{}]), r"a\.jsonl:3: .*timed_caption: .*'utterance'"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, images, line, message):
    file, out = tmp_path / "a.jsonl", tmp_path / "t"
    bad = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f"{json.dumps(narrative())}\n\n{bad}\n")
    with pytest.raises(ValueError, match=message):
        convert([file], Options(images), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "images"]


def test_the_first_bad_line_is_named_with_processes_too(tmp_path, images):
    lines = [json.dumps(narrative())] * 200
    lines[100] = lines[180] = "{"
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl:101: "):
        convert([file], Options(images), tmp_path / "t", num_proc=2)
    assert not list(tmp_path.glob("t*"))


def test_a_missing_image_names_the_record_and_where_it_was_sought(tmp_path, images):
    file = write(tmp_path / "a.jsonl", [narrative("99")])
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl:1: .*/99.*COCO_val2014_0+99\.jpg"):
        convert([file], Options(images), tmp_path / "t")
    assert not list(tmp_path.glob("t*"))


def test_a_broken_image_is_named(tmp_path, images):
    (images / "val2017/000000000001.jpg").write_bytes(b"no image")
    file = write(tmp_path / "a.jsonl", [narrative()])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*000000000001\.jpg is not a readable"):
        convert([file], Options(images), tmp_path / "t")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save_image(tmp_path / "bomb.png", (100, 100))
    for limit in (60, 6000):  # Pillow raises above twice the limit and warns above the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"bomb\.png is refused"):
            image_size(path)


def test_nothing_to_keep_is_an_error(tmp_path, images):
    for stories in ([], [narrative("99")]):
        file = write(tmp_path / "a.jsonl", stories)
        with pytest.raises(ValueError, match="no record"):
            convert([file], Options(images, skip_missing=True), tmp_path / "t")
    assert not list(tmp_path.glob("t*"))


def test_a_damaged_archive_is_named(tmp_path, images):
    file = write(tmp_path / "a.jsonl.gz", [narrative()] * 100)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged"):
        convert([file], Options(images), tmp_path / "t")
    content = bytearray(write(tmp_path / "a.jsonl.gz", [narrative()] * 100).read_bytes())
    content[12:16] = b"\xff" * 4  # of the compressed stream
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged"):
        convert([file], Options(images), tmp_path / "t")


def test_shards_hold_a_record_or_more(tmp_path, images):
    file = write(tmp_path / "a.jsonl", [narrative()])
    with pytest.raises(ValueError, match="shards hold 1 record or more, not 0"):
        convert([file], Options(images), tmp_path / "t", shard_size=0)
    assert not list(tmp_path.glob("t*"))


def test_missing_inputs_are_named(tmp_path, images):
    with pytest.raises(ValueError, match="no annotation file"):
        convert([], Options(images), tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        convert([tmp_path / "nowhere.jsonl"], Options(images), tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="--images .*nowhere"):
        file = write(tmp_path / "a.jsonl", [narrative()])
        convert([file], Options(tmp_path / "nowhere"), tmp_path / "t")


def test_command_writes_a_table(tmp_path, images):
    file, out = write(tmp_path / "a.jsonl", [narrative()]), tmp_path / "t"
    command = [sys.executable, "-m", "data.localized_narratives", file, "--images", images]
    command += ["--out", out, "--alignment", "rank", "--num-proc", "1"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["kept"] == 1 and len(Table(out)) == 1


def test_command_ends_with_one_line_of_error(tmp_path, images):
    file = write(tmp_path / "a.jsonl", [narrative("99")])
    with pytest.raises(SystemExit, match=r"^error: .*a\.jsonl:1: no image for"):
        main((file,), Options(images), tmp_path / "t")


def test_shards_hold_the_table_also_after_an_interruption(tmp_path, images, monkeypatch):
    """Narratives of one image and annotator are still numbered over all shards."""
    stories = [narrative(str(1 + i % 2), annotator_id=i % 3) for i in range(40)]
    stories[7] = narrative(caption=" ")
    file, out = write(tmp_path / "a.jsonl", stories), tmp_path / "shards"
    table = convert([file], Options(images), tmp_path / "table")
    write_shard, written = shards._write_shard, []

    def interrupted(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_shard(*arguments)

    monkeypatch.setattr(shards, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert([file], Options(images), out, shard_size=8)
    report = convert([file], Options(images), out, num_proc=2, shard_size=8)
    assert report == table and json.loads((out / "report.json").read_text()) == table
    assert len(written) == 2 + 1 + 3, "two shards of five were not made again"
    rows = [
        row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert [from_row(row) for row in rows] == records(tmp_path / "table")
