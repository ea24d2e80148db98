"""Scenes: deterministic, true to their own annotations, and without a cue outside the pixels."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data import flickr30k, llava, refcoco, shikra, visual_genome
from data.scene_expressions import parse_region
from data.scene_images import SHAPES, draw_scene
from data.scene_layouts import narrative_line, short_caption
from data.scene_narrations import BACKDROPS, narrate, object_mentions
from data.scene_worlds import BACKGROUNDS, COLOURS, KINDS, Scene, SceneObject, World, plan_scene
from data.scenes import Options, make_example, write_scenes
from pixelllm.records import Record
from pixelllm.tables import Table

LN_FIELDS = {
    "dataset_id", "image_id", "annotator_id", "caption", "timed_caption", "traces",
    "voice_recording",
}  # fmt: skip


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    assert write_scenes(Options(out, train=12, val=80, num_proc=1))
    return out


@pytest.fixture(scope="module")
def examples() -> list:
    options = Options(Path("unused"))
    return [make_example(options, "train", index) for index in range(120)]


def test_every_kind_and_background_can_be_drawn():
    assert tuple(SHAPES) == KINDS and tuple(BACKDROPS) == tuple(BACKGROUNDS)
    assert len(KINDS) >= 16 and len(COLOURS) >= 8 and len(BACKGROUNDS) >= 5
    rng = np.random.default_rng(0)
    for number, kind in enumerate(KINDS):
        thing = SceneObject(kind, "red", "large", (0.5, 0.5), 48.0)
        background = list(BACKGROUNDS)[number % 8]
        image, masks, visible = draw_scene(rng, Scene((64, 64), background, (thing,)))
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        rows, columns = np.nonzero(masks[0])
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 45 <= longer <= 50 and visible[0] == 1, kind
        assert (
            abs(rows.min() + rows.max() - 63) <= 2 and abs(columns.min() + columns.max() - 63) <= 2
        )


def test_a_scene_depends_on_seed_split_and_index_alone(written: Path, tmp_path: Path):
    """Catches a generator that is shared between scenes or processes."""
    write_scenes(Options(tmp_path / "out", train=3, val=0, num_proc=2))
    few, many = tmp_path / "out", written
    for file in sorted((few / "train").iterdir()):
        assert file.read_bytes() == (many / "train" / file.name).read_bytes()
    name = "annotations/scenes_train_localized_narratives.jsonl"
    assert read_lines(few / name) == read_lines(many / name)[:3]
    options = Options(Path("unused"))
    same = make_example(options, "train", 1)
    for changed in (
        make_example(options, "train", 2),
        make_example(options, "val", 1),
        make_example(replace(options, seed=1), "train", 1),
    ):
        assert not np.array_equal(changed.image, same.image)


def test_pictures_and_narrations_of_a_seed_stay_as_they_were():
    """Catches a generator that expressions share with what was there before them."""
    example = make_example(Options(Path("unused")), "train", 0)
    assert example.narration.caption == (
        "Here I see a blue flower and a white car, and there is a white moon. "
        "In the background I can see sand."
    )
    assert example.narration.traces[0][0] == {"x": 0.1029, "y": 0.7882, "t": 0.811}
    assert example.image[80, 80].tolist() == [198, 184, 154] and example.annotator == 18


def test_wording_changes_no_picture():
    options = Options(Path("unused"))
    long = replace(options, verbosity="long", order="random")
    a, b = make_example(options, "val", 5), make_example(long, "val", 5)
    assert np.array_equal(a.image, b.image) and a.narration.caption != b.narration.caption


def test_image_ids_are_unique_over_splits_and_name_the_files(written: Path):
    ids = []
    for split, count in (("train", 12), ("val", 80)):
        entries = json.loads((written / f"annotations/instances_{split}.json").read_text())[
            "images"
        ]
        assert len(entries) == count
        assert {entry["file_name"] for entry in entries} == {
            file.name for file in (written / split).iterdir()
        }
        assert all(entry["file_name"] == f"{entry['id']:012d}.jpg" for entry in entries)
        ids += [entry["id"] for entry in entries]
    assert len(set(ids)) == 92


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
def test_instances_are_read_by_the_coco_tools_and_fit_their_masks(written: Path):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(written / "annotations/instances_val.json"))
        captions = COCO(str(written / "annotations/captions_val.json"))
    truth = {int(line["image_id"]): line for line in truth_of(written)}
    assert len(captions.anns) == len(coco.imgs) == 80
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (160, 160) and mask.sum() == annotation["area"]
        x, y, width, height = annotation["bbox"]
        tight = coco_mask.toBbox(coco.annToRLE(annotation))
        np.testing.assert_allclose((x, y, width, height), tight, atol=0.02)
        category = coco.cats[annotation["category_id"]]
        attributes = annotation["attributes"]
        assert category["name"] == f"{attributes['colour']} {attributes['kind']}"
        assert category["supercategory"] == attributes["kind"]
    for image_id, line in truth.items():
        names = [f"{thing['colour']} {thing['kind']}" for thing in line["objects"]]
        found = [coco.cats[a["category_id"]]["name"] for a in coco.imgToAnns[image_id]]
        assert found == names
        caption = captions.imgToAnns[image_id][0]["caption"]
        assert [f"{c} {k}" for _, _, c, k in object_mentions(caption)] == names


def truth_of(out: Path, split: str = "val") -> list[dict]:
    return read_lines(out / f"annotations/scenes_{split}_truth.jsonl")


def test_the_colour_of_an_object_is_that_of_its_pixels(examples):
    """Catches masks that belong to another object or place."""
    for example in examples[:40]:
        for thing, mask in zip(example.scene.objects, example.masks, strict=True):
            if thing.kind in ("heart", "star", "fish"):
                middle = np.median(example.image[mask], axis=0)
                distance = {c: np.abs(middle - rgb).sum() for c, rgb in COLOURS.items()}
                assert min(distance, key=distance.get) == thing.colour


def test_narratives_have_the_published_fields(written: Path):
    lines = read_lines(written / "annotations/scenes_val_localized_narratives.jsonl")
    assert len(lines) == 80
    for line in lines:
        assert set(line) == LN_FIELDS
        assert (
            isinstance(line["image_id"], str)
            and (written / "val" / f"{int(line['image_id']):012d}.jpg").exists()
        )
        joined = " ".join(timed["utterance"] for timed in line["timed_caption"])
        assert joined == line["caption"] and line["caption"][0].isupper()
        times = [(timed["start_time"], timed["end_time"]) for timed in line["timed_caption"]]
        assert all(start <= end for start, end in times)
        assert all(a[1] <= b[0] for a, b in zip(times[:-1], times[1:], strict=True))
        clock = [point["t"] for stretch in line["traces"] for point in stretch]
        assert clock == sorted(clock) and all(line["traces"])


@pytest.mark.parametrize("order", ["left-to-right", "size", "random"])
@pytest.mark.parametrize("verbosity", ["short", "long"])
def test_every_object_is_mentioned_once_and_parsed_back(order: str, verbosity: str):
    options = Options(Path("unused"), order=order, verbosity=verbosity)
    for index in range(60):
        example = make_example(options, "train", index)
        narration, objects = example.narration, example.scene.objects
        found = object_mentions(narration.caption)
        assert len(found) == len(objects) == len(narration.mentions)
        for (start, end, colour, kind), mention in zip(found, narration.mentions, strict=True):
            thing = objects[mention["object"]]
            assert (mention["start"], mention["end"]) == (start, end)
            assert (colour, kind) == (thing.colour, thing.kind)
        named = [objects[mention["object"]] for mention in narration.mentions]
        if order == "left-to-right":
            assert named == sorted(named, key=lambda thing: thing.center[0])
        if order == "size":
            assert named == sorted(named, key=lambda thing: -thing.side_px)


def test_mentions_are_found_in_any_text():
    text = "A Red car, an orange  fish and red redcar; the green boatman, blue\nkey."
    assert [text[start:end] for start, end, _, _ in object_mentions(text)] == [
        "Red car",
        "orange  fish",
        "blue\nkey",
    ]
    assert object_mentions("") == []


def test_relations_and_places_in_narrations_are_true():
    options = Options(Path("unused"), verbosity="long", order="random")
    relations = {
        "below it": (1, 1), "under it": (1, 1), "above it": (1, -1),
        "to the right of it": (0, 1), "to the left of it": (0, -1),
    }  # fmt: skip
    places = {
        " on the left": (0, -1), " on the right": (0, 1), "at the top": (1, -1),
        "at the bottom": (1, 1), "top left": (0, -1), "bottom right": (0, 1),
    }  # fmt: skip
    seen: Counter[str] = Counter()
    for index in range(150):
        example = make_example(options, "train", index)
        caption, mentions = example.narration.caption, example.narration.mentions
        ends = [*(mention["start"] for mention in mentions[1:]), len(caption)]
        for number, mention in enumerate(mentions):
            thing = example.scene.objects[mention["object"]]
            after = caption[mention["end"] : ends[number]]
            for words, (axis, sign) in places.items():
                if words in after:
                    seen[words] += 1
                    assert sign * (thing.center[axis] - 0.5) > 0, caption
            before = caption[mentions[number - 1]["end"] : mention["start"]].lower()
            for words, (axis, sign) in relations.items():
                if number and words in before:
                    seen[words] += 1
                    other = example.scene.objects[mentions[number - 1]["object"]]
                    assert sign * (thing.center[axis] - other.center[axis]) > 0, caption
    assert set(seen) == set(relations) | set(places)


def test_narrations_are_short_varied_and_of_few_words(examples):
    captions = [example.narration.caption for example in examples]
    lengths = [len(caption.split()) for caption in captions]
    assert 15 <= np.mean(lengths) <= 28 and np.percentile(lengths, 95) <= 40
    words = {word.strip(".,").lower() for caption in captions for word in caption.split()}
    assert len(words) <= 150 and len({caption.split(" a")[0] for caption in captions}) >= 8
    long = Options(Path("unused"), verbosity="long")
    longer = [len(make_example(long, "train", n).narration.caption.split()) for n in range(40)]
    assert np.mean(longer) > np.mean(lengths) + 5


def test_held_out_pairs_are_spread_and_never_in_training(written: Path):
    world = World()
    held_out = set(world.held_out_pairs)
    assert len(held_out) == 13 and not held_out & set(world.pairs)
    assert len(held_out) + len(world.pairs) == 128
    for part in (0, 1):
        assert max(Counter(pair[part] for pair in held_out).values()) <= 2
    pairs = {
        (thing.colour, thing.kind)
        for index in range(600)
        for thing in plan_scene(np.random.default_rng(index), world).objects
    }
    assert pairs == set(world.pairs)
    assert not any(line["heldout_pair"] for line in truth_of(written, "train"))
    flagged = [line["heldout_pair"] for line in truth_of(written)]
    assert 0.08 < np.mean(flagged) < 0.35
    for line in truth_of(written):
        flags = [thing["heldout_pair"] for thing in line["objects"]]
        assert flags == [(t["colour"], t["kind"]) in held_out for t in line["objects"]]
        assert line["heldout_pair"] == any(flags)


def test_kind_colour_size_and_place_are_independent():
    """Catches a world that can be described without looking; 4.5 sigma on every cell."""
    world = World()
    xs, ys, sizes = defaultdict(list), defaultdict(list), defaultdict(list)
    scenes = [plan_scene(np.random.default_rng([7, index]), world) for index in range(2000)]
    things = [thing for scene in scenes for thing in scene.objects]
    for scene in scenes:
        for thing in scene.objects:
            for word in (thing.kind, thing.colour, scene.background):
                xs[word].append(thing.center[0])
                ys[word].append(thing.center[1])
                sizes[word].append(thing.side_px)
    for values in (xs, ys, sizes):
        every = np.array([value for word in KINDS for value in values.get(word, ())])
        for word, found in values.items():
            error = abs(np.mean(found) - every.mean()) / (every.std() / np.sqrt(len(found)))
            assert error < 4.5, word
    counts = Counter((thing.colour, thing.kind) for thing in things)
    expected = len(things) / len(world.pairs)
    assert all(abs(counts[pair] - expected) < 4.5 * np.sqrt(expected) for pair in world.pairs)


def test_objects_keep_their_distance():
    world = World()
    for index in range(300):
        objects = plan_scene(np.random.default_rng(index), world).objects
        assert 2 <= len(objects) <= 3
        centers = sorted(thing.center[0] for thing in objects)
        assert np.diff(centers).min() >= world.center_gap
        for thing in objects:
            assert 0.25 <= thing.side_px / 160 <= 0.45
            assert all(0 <= c * 160 - s * thing.side_px / 2 <= 160
                       for c in thing.center for s in (-1, 1))  # fmt: skip


def object_word_places(line: dict, truth: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """(time-averaged trace point, box) of every utterance that is part of a mention."""
    points = np.array([(p["t"], p["x"], p["y"]) for stretch in line["traces"] for p in stretch])
    places, position = [], 0
    for timed in line["timed_caption"]:
        start = line["caption"].index(timed["utterance"], position)
        position = start + len(timed["utterance"])
        for mention in truth["mentions"]:
            if start < mention["end"] and position > mention["start"]:
                times = np.linspace(timed["start_time"], timed["end_time"], 16)
                mean = [np.interp(times, points[:, 0], points[:, axis]).mean() for axis in (1, 2)]
                places.append(
                    (np.array(mean), np.array(truth["objects"][mention["object"]]["box"]))
                )
    return places


def test_the_hand_points_at_what_is_spoken_about(written: Path):
    lines = read_lines(written / "annotations/scenes_val_localized_narratives.jsonl")
    pairs = zip(lines, truth_of(written), strict=True)
    places = [place for line, truth in pairs for place in object_word_places(line, truth)]
    points, boxes = (np.stack(part) for part in zip(*places, strict=True))
    errors = np.abs(points - (boxes[:, :2] + boxes[:, 2:]) / 2)
    inside = ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(axis=1)
    assert inside.mean() > 0.97 and 0.01 < errors.mean() < 0.03


def test_traces_look_like_a_hand(examples):
    stretches = [example.narration.traces for example in examples]
    clocks = [np.array([p["t"] for s in parts for p in s]) for parts in stretches]
    spacing = np.concatenate([np.diff(clock) for clock in clocks])
    assert 0.015 < np.median(spacing) < 0.018  # about 60 points a second
    assert 0.001 < (spacing > 0.08).mean() < 0.05  # rests
    assert 0.1 < np.mean([len(parts) > 1 for parts in stretches]) < 0.7  # lifted
    points = np.array([(p["x"], p["y"]) for parts in stretches for s in parts for p in s])
    outside = ((points < 0) | (points > 1)).any(axis=1)
    assert 0.001 < outside.mean() < 0.05 and np.abs(points - 0.5).max() < 0.7
    steps = np.concatenate([np.hypot(*np.diff(np.array([(p["x"], p["y"]) for p in s]).T))
                            for parts in stretches for s in parts])  # fmt: skip
    assert np.percentile(steps, 99) < 0.06 < 10 * np.median(steps)
    timed = [example.narration.timed_caption for example in examples]
    assert any(" " in part["utterance"] for parts in timed for part in parts)
    assert any(parts[0]["end_time"] == 0 for parts in timed)


def test_the_reader_of_localized_narratives_takes_them(written: Path):
    from data.localized_narratives import image_candidates

    line = read_lines(written / "annotations/scenes_val_localized_narratives.jsonl")[0]
    tried = image_candidates(written / "val", line["dataset_id"], line["image_id"])
    assert any(path.is_file() for path in tried)


def phrases_of(records: Iterable[Record]) -> list[tuple[str, str]]:
    """(image, caption) of every phrase, in order."""
    return sorted((record.id, phrase.caption) for record in records for phrase in record.phrases)


def expected(out: Path, split: str, texts_of: Callable[[dict], list[str]]) -> list[tuple[str, str]]:
    """The same of what the truth file holds."""
    named = {f"{split}/{line['image_id']}": line for line in truth_of(out, split)}
    return sorted((name, text) for name, line in named.items() for text in texts_of(line))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "files",
    [
        ["refer/refs(unc).p", "refer/instances.json"],
        ["mdetr/finetune_scenes_{}.json"],
        ["seqtr/instances.json"],
    ],
)
def test_readers_take_every_expression(written: Path, tmp_path: Path, split: str, files: list[str]):
    paths = [written / "annotations" / file.format(split) for file in files]
    options = refcoco.Options(written / split, None if "mdetr" in files[0] else split)
    report = refcoco.convert(paths, options, tmp_path / "table")
    records = list(Table(tmp_path / "table"))
    every = expected(written, split, lambda line: [e["text"] for e in line["expressions"]])
    assert phrases_of(records) == every and not report["dropped"]
    truth = {f"{split}/{line['image_id']}": line for line in truth_of(written, split)}
    for record in records:
        said = {e["text"]: e for e in truth[record.id]["expressions"]}
        for phrase in record.phrases:
            expression = said[phrase.caption]
            if "seqtr" not in files[0]:  # which has no ids
                assert phrase.id == f"referring/{expression['sent_id']}"
            thing = truth[record.id]["objects"][expression["object"]]
            np.testing.assert_allclose(phrase.target_box, thing["box"], atol=1e-4)
            box_px = coco_mask.toBbox(phrase.mask) / 160
            np.testing.assert_allclose(box_px[:2], thing["box"][:2], atol=1e-4)


@pytest.mark.parametrize(
    "files",
    [
        ["region_descriptions.json", "image_data.json", "densecap_splits.json"],
        ["val.json"],
    ],
)
def test_readers_take_every_region(written: Path, tmp_path: Path, files: list[str]):
    paths = [written / "annotations/visual_genome" / file for file in files]
    split = "val" if len(files) == 3 else None
    report = visual_genome.convert(
        paths, visual_genome.Options(written / "val", split), tmp_path / "table"
    )
    records = list(Table(tmp_path / "table"))
    every = expected(written, "val", lambda line: [thing["phrase"] for thing in line["objects"]])
    assert phrases_of(records) == every and not report["dropped"]
    things = {f"region/{t['id']}": t for line in truth_of(written) for t in line["objects"]}
    for phrase in (phrase for record in records for phrase in record.phrases):
        thing = things.pop(phrase.id)
        assert parse_region(phrase.caption) == (thing["size"], thing["colour"], thing["kind"])
        np.testing.assert_allclose(phrase.prompt_box, thing["box"], atol=1e-4)
    assert not things


def test_the_reader_of_conversations_takes_every_answer(written: Path, tmp_path: Path):
    file = written / "annotations/llava_val.json"
    llava.convert([file], written, tmp_path / "table")
    records = list(Table(tmp_path / "table"))
    turns = [turn for entry in json.loads(file.read_text()) for turn in entry["conversations"]]
    answers = [phrase.caption for record in records for phrase in record.phrases]
    assert answers == [turn["value"] for turn in turns if turn["from"] == "gpt"]
    assert len(records) == 80 and len(answers) > 200


def test_conversations_are_written_where_there_is_something_to_talk_about(written, tmp_path):
    llava.convert([written / "annotations/talks_val.json"], written, tmp_path / "table")
    records = list(Table(tmp_path / "table"))
    assert 60 < len(records) <= 80 and all(len(record.phrases) in (2, 4, 6) for record in records)


def test_the_reader_of_pointing_answers_finds_the_objects_they_name(written, tmp_path):
    shikra.convert([written / "annotations/shikra_val.jsonl"], written, tmp_path / "table")
    things = {line["image_id"]: line["objects"] for line in truth_of(written)}
    counted = 0
    for record in Table(tmp_path / "table"):
        for phrase in record.phrases:
            for piece in phrase.pieces:
                words = phrase.caption[piece.start : piece.end].split()
                boxes = [tuple(t["box"]) for t in things[record.id.split("/")[1]]
                         if t["kind"] in words[-1] and (words[-2] in ("one", t["colour"])
                         or len(words) == 2)]  # fmt: skip
                assert min(np.abs(np.subtract(box, piece.box)).max() for box in boxes) < 0.01
            counted += "How many" in phrase.context
    assert counted == 80


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_reader_of_grounded_captions_takes_every_phrase(
    written: Path, tmp_path: Path, split: str
):
    """Every object is named once in the first sentence of its image, at its box."""
    folder = written / "annotations/flickr30k"
    flickr30k.convert(
        folder / "annotations.zip", written / split, tmp_path / "table", folder / f"{split}.txt"
    )
    records, groups = list(Table(tmp_path / "table")), 0
    truth = {f"{split}/{line['image_id']}": line["objects"] for line in truth_of(written, split)}
    assert [record.id for record in records] == list(truth)
    for record in records:
        things = truth[record.id]
        first, *others = record.phrases
        assert first.task == "grounded" and first.caption[0].isupper()
        named = object_mentions(first.caption)
        assert sorted(m[2:] for m in named) == sorted((t["colour"], t["kind"]) for t in things)
        boxes = {(thing["colour"], thing["kind"]): thing["box"] for thing in things}
        for (start, end, *name), piece in zip(named, first.pieces, strict=True):
            assert first.caption[piece.start : piece.end].lower().split()[0] in ("a", "an")
            assert piece.start < start and piece.end == end
            np.testing.assert_allclose(piece.box, boxes[tuple(name)], atol=1e-4)
        kinds = Counter(thing["kind"] for thing in things)
        assert len(others) == (len(kinds) < len(things))
        for sentence in others:
            groups += 1
            found = Counter((piece.start, piece.end) for piece in sentence.pieces)
            counted = [sentence.caption[start:end].split()[0].lower() for start, end in found]
            assert sorted(found.values()) == sorted(kinds.values())
            numbers = {1: ("a", "an"), 2: ("two",), 3: ("three",)}
            assert all(w in numbers[n] for w, n in zip(counted, found.values(), strict=True))
    assert groups or split == "train"


def test_other_worlds_are_possible():
    crowded = World(objects=(10, 14), min_size=0.13, max_size=0.3)
    counts = [len(plan_scene(np.random.default_rng(n), crowded).objects) for n in range(30)]
    assert min(counts) >= 10 and np.mean(counts) > 11
    hard = World(image_size=(96, 200), objects=(2, 5), min_size=0.13, max_overlap=0.5, kinds=9)
    options = Options(Path("unused"), world=hard, order="random", verbosity="long")
    for index in range(20):
        example = make_example(options, "val", index)
        assert example.image.shape == (96, 200, 3) and example.masks.any(axis=(1, 2)).all()
        assert not (example.masks.sum(axis=0) > 1).any()  # visible parts do not overlap
        assert len(object_mentions(narrative_line(example)["caption"])) == len(example.boxes)
    alone = replace(options, world=World(objects=(1, 1)))
    assert " and " not in short_caption(make_example(alone, "train", 0))


def test_a_finished_folder_is_kept_and_another_is_not_overwritten(written: Path, tmp_path: Path):
    options = Options(written, train=12, val=80, num_proc=1)
    before = (written / "scenes.json").stat().st_mtime_ns
    assert not write_scenes(replace(options, num_proc=2))
    assert (written / "scenes.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other options.*train, world"):
        write_scenes(replace(options, train=13, world=World(kinds=12)))
    described = json.loads((written / "scenes.json").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old/scenes.json").write_text(json.dumps({**described, "format": 1}))
    with pytest.raises(FileExistsError, match="not the same format"):
        write_scenes(replace(options, out=tmp_path / "old"))
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_scenes(replace(options, out=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Image.Image, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="No space left"):
        write_scenes(Options(tmp_path / "out", train=2, val=0, num_proc=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": (16,)}, "image_size"),
        ({"objects": (3, 2)}, "smallest and a largest"),
        ({"min_size": 0.5, "max_size": 0.4}, "0.5 to 0.4"),
        ({"max_overlap": -0.1}, "max_overlap"),
        ({"rotation": 200}, "rotation"),
        ({"kinds": 99}, "kinds: 1 to 16"),
        ({"colours": 1, "kinds": 1}, "3 different objects"),
    ],
)
def test_impossible_worlds_are_refused(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        World(**values)


def test_too_many_objects_for_the_image_are_an_error_that_says_what_to_do():
    world = World(objects=(9, 9), min_size=0.8, max_size=0.8)
    with pytest.raises(ValueError, match="9 objects .* do not fit"):
        plan_scene(np.random.default_rng(0), world)
    with pytest.raises(ValueError, match="nothing to write"):
        Options(Path("unused"), train=0, val=0)


def test_a_narration_points_at_boxes_it_is_given():
    """The hand follows the boxes, not the plan: moved boxes move the trace."""
    scene = plan_scene(np.random.default_rng(0), World(objects=(2, 2)))
    left = np.tile([0.1, 0.1, 0.2, 0.2], (2, 1))
    narration = narrate(np.random.default_rng(2), scene, left, "size", "short")
    last = narration.mentions[-1]
    assert narration.caption[last["start"] : last["end"]].split()[0] in COLOURS
    points = np.array([(p["x"], p["y"]) for s in narration.traces for p in s])
    assert np.abs(np.median(points, axis=0) - 0.15).max() < 0.1
