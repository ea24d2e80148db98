"""The `pixelllm` and `train.py` commands: their output, their files, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from pixelllm import cli
from pixelllm.config import Config
from pixelllm.mask_codes import decode_mask, fill_polygons
from pixelllm.pretrained import PixelLLM
from pixelllm.recipes import RECIPES

ROOT = Path(__file__).parents[1]
COMMANDS = ("caption", "locate", "ask", "dense", "info", "plan", "convert", "import")


@pytest.fixture
def images(tiny_scenes) -> list[str]:
    return [str(path) for path in sorted((tiny_scenes / "val").iterdir())[:3]]


@pytest.fixture(scope="module")
def finder(tiny_run, tiny_joint_model, tmp_path_factory) -> Path:
    """Folder of a model whose detector takes single images: a normalisation needs two values."""
    config, folder = tiny_joint_model.config, tmp_path_factory.mktemp("finder")
    detector = replace(config.model.detector, width=64)
    torch.manual_seed(0)
    model = PixelLLM.from_pretrained(tiny_run.main)
    model.grow(replace(config, model=replace(config.model, detector=detector)), model.tokenizer)
    model.save_pretrained(folder)
    return folder


def caption(tiny_run, *arguments: str | Path) -> None:
    cli.main(["caption", *map(str, arguments), "--model", str(tiny_run.main), "--device", "cpu"])


def locate(model, *arguments: str | Path) -> None:
    cli.main(["locate", *map(str, arguments), "--model", str(model), "--device", "cpu"])


def dense(model, *arguments: str | Path) -> None:
    cli.main(["dense", *map(str, arguments), "--model", str(model), "--device", "cpu"])


def printed_json(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error_of(capsys, run) -> str:
    """The one line that the command dies with."""
    with pytest.raises(SystemExit) as stop:
        run()
    message = str(stop.value.code)
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    assert capsys.readouterr().out == ""
    return message


# --- pixelllm ---


def test_json_has_the_contracted_fields(tiny_run, images, capsys):
    caption(tiny_run, *images, "--json")
    results = printed_json(capsys)
    assert [result["image"] for result in results] == images
    for result in results:
        assert result["size_hw"] == [48, 64] and "prompt_box" not in result
        assert result["caption"] == " ".join(word["text"] for word in result["words"])
        assert result["log_prob"] <= sum(w["log_prob"] for w in result["words"]) + 1e-4
        for word in result["words"]:
            assert word.keys() == {"text", "point", "box", "log_prob"} and word["log_prob"] <= 0
            (x, y), (x0, y0, x1, y1) = word["point"], word["box"]
            assert 0 <= x0 <= x <= x1 <= 1 and 0 <= y0 <= y <= y1 <= 1


def test_batches_do_not_change_the_captions(tiny_run, images, capsys):
    caption(tiny_run, *images, "--json")
    together = printed_json(capsys)
    caption(tiny_run, *images, "--json", "--batch-size", "2")
    for first, second in zip(together, printed_json(capsys), strict=True):
        assert first["caption"] == second["caption"]
        assert first["log_prob"] == pytest.approx(second["log_prob"], abs=1e-4)


def test_text_has_a_line_per_word(tiny_run, images, capsys):
    caption(tiny_run, images[0], "--json")
    (result,) = printed_json(capsys)
    caption(tiny_run, images[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{images[0]}: {result['caption']}"
    assert [line.split()[0] for line in lines[1:]] == [w["text"] for w in result["words"]]


def test_pixels_and_shares_of_a_box_are_the_same(tiny_run, images, capsys):
    caption(tiny_run, images[0], "--json", "--box", "0.25", "0.5", "0.75", "1")
    by_share = printed_json(capsys)
    caption(tiny_run, images[0], "--json", "--pixels", "--box", "16", "24", "48", "48")
    assert printed_json(capsys) == by_share
    assert by_share[0]["prompt_box"] == [0.25, 0.5, 0.75, 1]


def test_several_boxes_give_a_caption_each(tiny_run, images, capsys):
    boxes = ["--box", "0", "0", "1", "1", "--box", "0.1", "0.2", "0.3", "0.4"]
    caption(tiny_run, images[0], *boxes)
    assert "[0.100 0.200 0.300 0.400]: " in capsys.readouterr().out
    caption(tiny_run, *images[:2], "--json", *boxes, "--context", "a red car")
    results = printed_json(capsys)
    assert [result["image"] for result in results] == [n for n in images[:2] for _ in range(2)]
    assert [result["prompt_box"] for result in results[:2]] == [[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]]


def test_beams_are_passed_on(tiny_run, images, capsys, monkeypatch):
    seen = []
    generate = PixelLLM.generate
    monkeypatch.setattr(
        PixelLLM,
        "generate",
        lambda self, **k: seen.append(k["num_beams"]) or generate(self, **k),
    )
    caption(tiny_run, images[0], "--beams", "2")
    assert seen == [2]


def test_pictures_are_written(tiny_run, images, tmp_path, capsys):
    files = {suffix: tmp_path / f"out.{suffix}" for suffix in ("html", "gif", "png")}
    options = [text for suffix, file in files.items() for text in (f"--{suffix}", file)]
    caption(tiny_run, *images[:2], "--json", *options)
    results = printed_json(capsys)
    page = files["html"].read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert all(result["words"][0]["text"] in page for result in results)
    with Image.open(files["gif"]) as gif:
        assert gif.format == "GIF" and gif.n_frames > 1
    with Image.open(files["png"]) as png:
        assert png.format == "PNG"
    assert len(list(tmp_path.iterdir())) == 3


SAMPLED = ["--json", "--sample", "--temperature", "1.5"]


def test_sampled_captions_come_again_with_their_seed(tiny_run, images, capsys):
    """Would catch a seed that is not passed on, and sampling that is not switched on."""
    found = []
    for options in ([*SAMPLED, "--seed", "1"], [*SAMPLED, "--seed", "1"], SAMPLED, ["--json"]):
        caption(tiny_run, *images, *options)
        found.append([result["caption"] for result in printed_json(capsys)])
    assert found[0] == found[1]
    assert found[1] != found[2] and found[2] != found[3]


def test_a_small_top_p_is_greedy(tiny_run, images, capsys):
    """Temperature and top_p reach the search: the likeliest word alone has more than 1e-4."""
    caption(tiny_run, *images, *SAMPLED, "--top-p", "1e-4")
    drawn = printed_json(capsys)
    caption(tiny_run, *images, "--json")
    assert [d["caption"] for d in drawn] == [g["caption"] for g in printed_json(capsys)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--beams 0", "--beams 0: expected 1 or more"),
        ("--batch-size 0", "--batch-size 0: expected 1 or more"),
        ("--top-p 0.5", "--top-p and --seed do nothing without --sample"),
        ("--seed 3", "--seed do nothing without --sample"),
        ("--sample --beams 2", "--beams 2 searches and --sample draws"),
        ("--sample --temperature 0", "--temperature 0.0: expected a number above 0"),
        ("--sample --temperature nan", "--temperature nan: expected a number above 0"),
        ("--sample --top-p 1.5", "--top-p 1.5: expected above 0, and at most 1"),
    ],
)
def test_options_out_of_range_are_named(tiny_run, images, capsys, options, words):
    assert words in error_of(capsys, lambda: caption(tiny_run, images[0], *options.split()))


@pytest.mark.parametrize("option", ["--html", "--gif", "--png"])
def test_an_output_that_is_a_folder_is_named(tiny_run, images, tmp_path, capsys, option):
    message = error_of(capsys, lambda: caption(tiny_run, images[0], option, tmp_path))
    assert message == f"error: {tmp_path} is a folder; name the file to write"


# --- pixelllm locate ---


def test_locate_has_the_contracted_fields(tiny_joint, images, tmp_path, capsys):
    texts, picture = ["the red circle", "a  square"], tmp_path / "found.png"
    locate(tiny_joint, images[0], *texts, "--mask", "--json", "--png", picture)
    results = printed_json(capsys)
    assert [result["text"] for result in results] == texts
    for result in results:
        fields = {"image", "size_hw", "text", "box", "score", "mask", "polygons"}
        assert result.keys() == fields and result["image"] == images[0]
        x0, y0, x1, y1 = result["box"]
        assert 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 and 0 <= result["score"] <= 1
        mask = decode_mask(result["mask"])
        assert mask.shape == (48, 64) == tuple(result["size_hw"])
        assert np.array_equal(fill_polygons(result["polygons"], mask.shape), mask)
    with Image.open(picture) as png:
        assert png.format == "PNG" and png.size == (1024, 768)


def test_locate_without_masks_prints_a_line_per_text(tiny_joint, images, capsys):
    locate(tiny_joint, images[0], "the red circle", "a square")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": box ")[0] for line in lines] == ["the red circle", "a square"]
    locate(tiny_joint, images[0], "the red circle", "--json")
    (result,) = printed_json(capsys)
    assert "mask" not in result and f"{result['box'][0]:.3f} " in lines[0]


def test_a_model_that_learnt_no_expressions_is_told(tiny_run, tiny_joint, images, capsys):
    locate(tiny_run.main, images[0], "a square")
    printed = capsys.readouterr()
    assert printed.out.startswith("a square: box ")
    assert f"warning: {tiny_run.main} was trained on narration, not on expr" in printed.err
    locate(tiny_joint, images[0], "a square")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--dtype", "bfloat16"), ("--int8",)], ids=" ".join)
def test_locate_and_dense_in_lower_precision(tiny_joint, finder, images, capsys, options):
    """Encoders and trunk in 16 or 8 bits find what they find in 32."""
    if "--int8" in options:
        pytest.importorskip("torchao")
    found = []
    for lower in ((), options):
        locate(tiny_joint, images[0], "the red circle", "--mask", "--json", *lower)
        dense(finder, images[0], "--json", *lower)
        found.append(printed_json(capsys))
    (exact, exact_objects), (near, near_objects) = found
    assert np.abs(np.array(exact["box"]) - np.array(near["box"])).max() < 0.05
    assert len(exact_objects["detections"]) == len(near_objects["detections"])


def test_hundreds_of_expressions_are_located(tiny_joint, images, tmp_path, capsys):
    texts = [f"number {n}" for n in range(200)]
    locate(tiny_joint, images[0], *texts, "--json", "--png", tmp_path / "a.png")
    assert [result["text"] for result in printed_json(capsys)] == texts


def test_hundreds_of_boxes_are_captioned(tiny_run, images, capsys):
    boxes = [("0.1", f"{0.002 * n:.3f}", "0.9", "0.95") for n in range(300)]
    given = [text for box in boxes for text in ("--box", *box)]
    caption(tiny_run, images[0], *given, "--json")
    found = [result["prompt_box"] for result in printed_json(capsys)]
    assert found == [[float(edge) for edge in box] for box in boxes]


def test_locate_says_what_it_sees_there(tiny_joint, images, capsys):
    """What tells an expression that fits nothing: the box's caption in the model's own words."""
    locate(tiny_joint, images[0], "the red circle", "--caption", "--json")
    (result,) = printed_json(capsys)
    assert isinstance(result["caption"], str)
    locate(tiny_joint, images[0], "the red circle", "--caption")
    assert f"  seen: {result['caption']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], 'no expression given; try: pixelllm locate {image} "the red car'),
        (["a car", " "], "expression 1 is empty; say what to look for"),
        (["a car", "--png", "{folder}"], "is a folder; name the file to write"),
    ],
)
def test_what_cannot_be_located_is_named(tiny_run, images, tmp_path, capsys, arguments, words):
    given = [text.format(folder=tmp_path) for text in arguments]
    message = error_of(capsys, lambda: locate(tiny_run.main, images[0], *given))
    assert words.format(image=images[0]) in message


def test_a_missing_image_has_no_places(tiny_run, tmp_path, capsys):
    message = error_of(capsys, lambda: locate(tiny_run.main, tmp_path / "lost.jpg", "a car"))
    assert message.endswith("lost.jpg: no such image")


def test_masks_need_a_mask_head(tiny_run, images, capsys):
    message = error_of(capsys, lambda: locate(tiny_run.main, images[0], "a car", "--mask"))
    assert "this model has no mask head" in message


# --- pixelllm dense ---


def test_dense_has_the_contracted_fields(finder, images, tmp_path, capsys):
    page, picture = tmp_path / "page.html", tmp_path / "found.png"
    dense(finder, *images, "--json", "--html", page, "--png", picture)
    results = printed_json(capsys)
    assert [result["image"] for result in results] == images
    assert any(result["detections"] for result in results)
    for result in results:
        assert result.keys() == {"image", "size_hw", "detections"}
        scores = [item["score"] for item in result["detections"]]
        assert scores == sorted(scores, reverse=True)
        for item in result["detections"]:
            fields = {"box", "caption", "words", "log_prob", "score", "detection_score"}
            assert item.keys() == fields and len(item["box"]) == 4
    text = page.read_text()
    assert all(Path(name).name in text for name in images)
    with Image.open(picture) as png:
        assert png.format == "PNG"
    assert len(list(tmp_path.iterdir())) == 2


def test_dense_takes_its_limits(finder, images, capsys, monkeypatch):
    seen = []
    describe = PixelLLM.describe
    monkeypatch.setattr(
        PixelLLM, "describe", lambda self, *a, **k: seen.append(k) or describe(self, *a, **k)
    )
    dense(finder, images[0], "--max-detections", "2", "--beams", "3")
    assert seen == [{"max_detections": 2, "num_beams": 3}]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{images[0]}: {len(lines) - 1} found" and 2 <= len(lines) <= 3
    dense(finder, images[0], "--min-score", "1.1")
    assert capsys.readouterr().out.splitlines() == [f"{images[0]}: 0 found"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--max-detections 0", "--max-detections 0: expected 1 or more"),
        ("--beams 0", "--beams 0: expected 1 or more"),
        ("--html {folder}", "is a folder; name the file to write"),
        ("--png {folder}", "is a folder; name the file to write"),
        ("{folder}/lost.jpg", "lost.jpg: no such image"),
        ("", "this model has no detector; train one of the densecap recipes on it"),
    ],
)
def test_what_cannot_be_listed_is_named(tiny_run, images, tmp_path, capsys, options, words):
    given = options.format(folder=tmp_path).split()
    assert words in error_of(capsys, lambda: dense(tiny_run.main, images[0], *given))


def test_no_image_to_list_is_an_error(tiny_run, capsys):
    message = error_of(capsys, lambda: dense(tiny_run.main))
    assert "no image given; try: pixelllm dense" in message


# --- pixelllm info and what all commands share ---


def test_info_shows_scores_and_passes_over_predictions(tiny_run, tmp_path, capsys):
    """Beside a task's scores lie its predictions, which are JSON too; a score may be null."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run.main, run, ignore=shutil.ignore_patterns("checkpoints"))
    scores = {"metrics": {"map": 0.25, "map_detection": None}, "baselines": {}, "num_examples": 3}
    (run / "eval").mkdir()
    (run / "eval" / "dense.json").write_text(json.dumps(scores))
    (run / "eval" / "dense_results.json").write_text("[]")
    cli.main(["info", str(run)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines[0] == ["dense,", "3", "examples", "model", "trivial"]
    assert lines[1:] == [["map", "0.250", "-"], ["map_detection", "-", "-"]]


def test_info_counts_parameters(tiny_run, capsys):
    cli.main(["info", str(tiny_run.main)])
    out = capsys.readouterr().out
    assert out.startswith("tiny: frame 48 px") and "point_head" in out


def test_a_missing_image_is_named_before_anything_is_done(tiny_run, images, tmp_path, capsys):
    lost, page = tmp_path / "lost.jpg", tmp_path / "page.html"
    message = error_of(capsys, lambda: caption(tiny_run, images[0], lost, "--html", page))
    assert "lost.jpg" in message and not page.exists()


def test_a_truncated_image_is_named(tiny_run, images, tmp_path, capsys):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(Path(images[0]).read_bytes()[:600])
    message = error_of(capsys, lambda: caption(tiny_run, cut, "--gif", tmp_path / "a.gif"))
    assert "cut.jpg" in message and [p.name for p in tmp_path.iterdir()] == ["cut.jpg"]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (["0.8", "0.1", "0.2", "0.9"], "box 0.8 0.1 0.2 0.9: expected x0 < x1"),
        (["0.1", "0.1", "0.2", "1.5"], "in [0, 1]; pixels need --pixels"),
        (["0", "0", "65", "48", "--pixels"], "pixels of 64 x 48"),
        (["-0.1", "0", "0.5", "0.5"], "box -0.1 0.0 0.5 0.5"),
    ],
)
def test_bad_boxes_are_named_with_their_image(tiny_run, images, capsys, box, words):
    message = error_of(capsys, lambda: caption(tiny_run, images[0], "--box", *box))
    assert images[0] in message and words in message


def test_a_folder_that_is_no_run_is_named(images, tmp_path, capsys):
    command = ["caption", images[0], "--model", str(tmp_path)]
    assert "not a finished run" in error_of(capsys, lambda: cli.main(command))


def test_a_device_that_is_not_there_is_named(tiny_run, images, capsys):
    command = ["caption", images[0], "--model", str(tiny_run.main), "--device", "tpu"]
    assert "device 'tpu' is not available" in error_of(capsys, lambda: cli.main(command))


def test_no_image_is_an_error(tiny_run, capsys):
    assert "no image given; try: pixelllm" in error_of(capsys, lambda: caption(tiny_run))


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_fits_a_screen(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= (18 + 2 * len(COMMANDS) if arguments == ["--help"] else 50)
    if arguments == ["--help"]:
        shown = [line.split()[1] for line in lines[:14] if line.startswith("    pixelllm ")]
        assert tuple(shown) == COMMANDS


def test_the_installed_command_captions(tiny_run, images):
    """In a process of its own: nothing but JSON on standard output."""
    command = [sys.executable, "-m", "pixelllm.cli", "caption", images[0], "--json"]
    done = subprocess.run(
        [*command, "--model", tiny_run.main], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["image"] == images[0]


# --- train.py ---


def test_recipes_are_listed_with_what_they_are_for(capsys):
    train.main(["--list"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 4 and len(line) <= 100 for line in lines)


def test_an_out_that_is_a_file_is_named_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/run"):
        with pytest.raises(SystemExit, match=r"--out .*: .*file is a file; name a folder"):
            train.main(f"scenes-tiny --data a --val b --out {tmp_path / out}".split())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_train_help_fits_a_screen_and_starts_with_a_command(arguments, capsys):
    train.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 18 + len(RECIPES) and max(map(len, lines)) <= 100
    commands = [line.strip() for line in lines if line.startswith("    python")]
    recipe, *options = commands[0].split()[2:]
    run, config = train.parse(recipe, options)
    assert isinstance(config, Config) and run.out == Path("runs/tiny")
    assert all(name in "\n".join(lines) for name in RECIPES)


def test_an_unknown_recipe_names_the_nearest(capsys):
    message = error_of(capsys, lambda: train.main(["scenes-tinny"]))
    assert "no recipe 'scenes-tinny'; nearest: scenes-tiny" in message


@pytest.mark.parametrize("name", RECIPES)
def test_any_field_is_an_option(name):
    given = ["--data", "a", "b", "--val", "c", "--out", "d"]
    run, config = train.parse(name, [*given, "--train.steps", "7", "--train.batch_size", "4"])
    assert run.data == ("a", "b") and not run.resume
    assert (config.train.steps, config.train.batch_size) == (7, 4)
    assert type(config) is type(RECIPES[name]())


def test_an_unknown_field_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main("scenes-tiny --data a --val b --out c --model.prompt.num-token 3".split())
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "--model.prompt.num-tokens" in printed.out + printed.err


def test_fields_that_contradict_each_other_are_named(tiny_tables, tmp_path, capsys):
    given = [
        "--data",
        str(tiny_tables.train),
        "--val",
        str(tiny_tables.val),
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit) as stop:
        train.main(["scenes-tiny", *given, "--train.batch-size", "5", "--train.accumulate", "2"])
    printed = capsys.readouterr()
    assert stop.value.code not in (0, None)
    text = " ".join((printed.out + printed.err + str(stop.value.code)).replace("│", " ").split())
    assert "batch_size 5 is not a multiple of accumulate 2" in text


def test_a_missing_table_is_named(tmp_path, capsys):
    given = ["--data", str(tmp_path / "no"), "--val", str(tmp_path / "no"), "--out", str(tmp_path)]
    message = error_of(capsys, lambda: train.main(["scenes-sam", *given]))
    assert "no is not a table of records" in message and "python -m data." in message


def test_a_table_without_the_task_is_named(tiny_tables, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["--data", str(tiny_tables.train), "--val", str(tiny_tables.val), "--out", str(out)]
    message = error_of(capsys, lambda: train.main(["scenes-sam", *given]))
    assert "needs 'region' phrases" in message and not out.exists()


def test_a_start_run_that_is_missing_is_named(tiny_tables, tmp_path, capsys):
    given = [
        "--data",
        str(tiny_tables.train),
        "--val",
        str(tiny_tables.val),
        "--out",
        str(tmp_path),
    ]
    message = error_of(
        capsys, lambda: train.main(["scenes-tiny", *given, "--start.sam", str(tmp_path)])
    )
    assert "not a finished run: config.json is missing" in message


def test_a_trunk_that_does_not_exist_is_named(tiny_tables, tmp_path, capsys):
    given = [
        "--data",
        str(tiny_tables.train),
        "--val",
        str(tiny_tables.val),
        "--out",
        str(tmp_path),
    ]
    lost = tmp_path / "lost-trunk"
    lost.mkdir()
    with pytest.raises(SystemExit) as stop:
        train.main(["scenes-tiny", *given, "--model.language.trunk", str(lost)])
    assert str(stop.value.code).startswith("error: ") and "lost-trunk" in str(stop.value.code)
