"""The `pixelllm` and `train.py` commands: their output, their files, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from pixelllm import cli
from pixelllm.config import Config
from pixelllm.recipes import RECIPES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def images(tiny_scenes) -> list[str]:
    return [str(path) for path in sorted((tiny_scenes / "val").iterdir())[:3]]


def caption(tiny_run, *arguments: str | Path) -> None:
    cli.main(["caption", *map(str, arguments), "--model", str(tiny_run.main), "--device", "cpu"])


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
    caption(tiny_run, *images[:2], "--json", *boxes, "--context", "a red car")
    results = printed_json(capsys)
    assert [result["image"] for result in results] == [n for n in images[:2] for _ in range(2)]
    assert [result["prompt_box"] for result in results[:2]] == [[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]]


def test_beams_are_passed_on(tiny_run, images, capsys, monkeypatch):
    seen = []
    generate = cli.PixelLLM.generate
    monkeypatch.setattr(
        cli.PixelLLM,
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


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"]])
def test_help_fits_a_screen(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    if arguments == ["--help"]:
        assert any(line.strip().startswith("pixelllm caption photo.jpg") for line in lines[:6])
        assert any(line.strip() == "pixelllm info runs/quickstart" for line in lines[:7])


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


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_train_help_fits_a_screen_and_starts_with_a_command(arguments, capsys):
    train.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
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
    assert run.data == (Path("a"), Path("b")) and not run.resume
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
