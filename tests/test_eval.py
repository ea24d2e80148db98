"""`eval.py` on a trained run: its files, its scores, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.localized_narratives as localized_narratives
import eval as command
from pixelllm.evaluation import narrations as trace
from pixelllm.evaluation import objects
from pixelllm.evaluation.narrations import Narration, narrative_line
from pixelllm.evaluation.objects import ObjectTruth
from pixelllm.generation import Caption, PlacedWord
from pixelllm.records import Phrase, Piece, Record
from pixelllm.tables import Table, write_table

ROOT = Path(__file__).parents[1]
MODEL_AND_BASELINE = {"point_l1", "lbm_k0", "lbm_k1", "bleu_4", "rouge_l", "cider_d"}


def options(tiny_run, tiny_tables, out: Path, **changes) -> command.Options:
    given = {"run": tiny_run.main, "data": tiny_tables.val, "truth": tiny_tables.truth, "out": out}
    return command.Options(**{**given, "device": "cpu", "batch_size": 4, **changes})


@pytest.fixture(scope="module")
def written(tiny_run, tiny_tables, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    command.evaluate(options(tiny_run, tiny_tables, out))
    return out


def test_the_result_has_the_contracted_fields(written):
    result = json.loads((written / "trace.json").read_text())
    assert result.keys() >= {"metrics", "baselines", "config", "num_examples"}
    assert result["num_examples"] == 6 and result["config"]["recipe"] == "tiny"
    assert result["metrics"].keys() >= MODEL_AND_BASELINE
    assert result["baselines"].keys() >= MODEL_AND_BASELINE
    scores = [*result["metrics"].values(), *result["baselines"].values()]
    assert all(isinstance(score, float) for score in scores)
    for name in ("object_precision", "object_recall", "object_point_in_box", "object_point_l1"):
        assert 0 <= result["metrics"][name] <= 1 and 0 <= result["baselines"][name] <= 1


def test_predictions_are_localized_narratives(written, tiny_scenes):
    """Our own reader takes them, as other tools for that corpus would."""
    lines = (written / "trace_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 6
    for number, line in enumerate(lines, start=1):
        fields = json.loads(line)
        assert " ".join(w["utterance"] for w in fields["timed_caption"]) == fields["caption"]
        assert len(fields["word_boxes"]) == len(fields["timed_caption"])
        record = localized_narratives.read_record(
            localized_narratives.Line("predictions", number, line.encode()),
            localized_narratives.Options(tiny_scenes, "text"),
        )
        (phrase,) = record.phrases
        assert phrase.caption == fields["caption"] and phrase.pieces
        points = {(p["x"], p["y"]) for p in fields["traces"][0]}
        for piece in phrase.pieces:
            if piece.center is not None and piece.box[:2] == piece.box[2:]:
                assert any(np.allclose(piece.center, point, atol=1e-6) for point in points)


def test_batches_do_not_change_the_scores(tiny_run, tiny_tables, written, tmp_path):
    command.evaluate(options(tiny_run, tiny_tables, tmp_path, batch_size=1))
    single, many = (
        json.loads((f / "trace.json").read_text())["metrics"] for f in (tmp_path, written)
    )
    assert single == pytest.approx(many, abs=1e-5)


def test_the_limit_takes_the_first(tiny_run, tiny_tables, written, tmp_path, capsys):
    command.evaluate(options(tiny_run, tiny_tables, tmp_path, limit=2, truth=None, beams=2))
    lines = (tmp_path / "trace_predictions.jsonl").read_text().splitlines()
    first = (written / "trace_predictions.jsonl").read_text().splitlines()[:2]
    assert [json.loads(a)["image_id"] for a in lines] == [json.loads(a)["image_id"] for a in first]
    printed = capsys.readouterr().out
    assert "trace, 2 examples" in printed
    assert "object_recall" in printed  # the truth was found beside the annotations


def test_a_table_without_narrations_is_named(tiny_run, tiny_tables, tmp_path):
    with pytest.raises(ValueError, match="no 'narration' phrases"):
        command.evaluate(options(tiny_run, tiny_tables, tmp_path, data=tiny_tables.val_regions))
    assert not list(tmp_path.iterdir())


def test_a_truth_of_other_scenes_is_named(tiny_run, tiny_tables, tmp_path):
    other = tmp_path / "truth.jsonl"
    other.write_text("")
    with pytest.raises(ValueError, match="the truth says nothing of image"):
        command.evaluate(options(tiny_run, tiny_tables, tmp_path / "out", truth=other))


def test_narrations_without_any_place_are_scored_for_words(tiny_run, tiny_tables, tmp_path):
    """Records without trace are kept for their captions; their points are not a number."""

    def records():
        table = Table(tiny_tables.val)
        for i in range(3):
            phrases = tuple(replace(p, pieces=()) for p in table[i].phrases)
            yield replace(table[i], phrases=phrases)

    write_table(records(), tmp_path / "table", {})
    command.evaluate(
        options(tiny_run, tiny_tables, tmp_path / "out", data=tmp_path / "table", truth=None)
    )
    text = (tmp_path / "out" / "trace.json").read_text()
    assert "NaN" not in text  # which is not JSON
    metrics = json.loads(text)["metrics"]
    assert metrics["point_l1"] is None and metrics["lbm_k0"] is None and metrics["bleu_1"] >= 0


def test_the_command_says_what_is_wrong_in_one_line(tiny_run, tiny_tables, tmp_path):
    """A real process: a run that is not there, then a help that fits a screen."""
    arguments = [sys.executable, "eval.py", tmp_path / "none", "--data", tiny_tables.val]
    failed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ") and len(failed.stderr.splitlines()) == 1
    assert "none" in failed.stderr


@pytest.mark.parametrize("option", ["--limit", "--beams", "--batch-size"])
def test_counts_below_one_are_refused_before_any_work(tmp_path, capsys, option):
    """Catches a negative limit that silently drops the last examples."""
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--data", str(tmp_path), option, "-3"])
    assert f"{option} must be at least 1, not -3" in capsys.readouterr().err


def test_a_missing_truth_file_is_refused_before_any_work(tmp_path):
    """Catches a typing mistake that shows after all predictions."""
    with pytest.raises(SystemExit, match="truth.jsonl: no such file"):
        command.main(
            [str(tmp_path), "--data", str(tmp_path), "--truth", str(tmp_path / "truth.jsonl")]
        )


def test_help_fits_a_screen_and_starts_with_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 45
    assert any("python eval.py runs/quickstart" in line for line in lines[:8])


# --- scores on hand-made narrations ---


def narration(caption: str, boxes, target_boxes, generated: Caption, image=1) -> Narration:
    phrase = Phrase("p", "narration", caption, pieces=(Piece(0, 1),))
    record = Record(f"scenes_val/{image}", (10, 10), (phrase,), path="x")
    boxes, targets = np.array(boxes, np.float32), np.array(target_boxes, np.float32)
    corners = (b.reshape(-1, 2, 2) for b in (boxes, targets))
    return Narration(record, phrase, *corners, boxes, targets, generated)


def placed(text: str, x: float, y: float) -> PlacedWord:
    return PlacedWord(text, (x, y), (x, y, x, y), -1.0)


def caption_of(*words: PlacedWord) -> Caption:
    return Caption(" ".join(w.text for w in words), words, -float(len(words)))


NOWHERE = [np.nan] * 4
TRUTH = ObjectTruth(
    names=[("red", "car"), ("blue", "ball")],
    boxes=np.array([[0.0, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0]]),
    centers=np.array([[0.2, 0.2], [0.8, 0.8]]),
    mentions=[(2, 9, 0), (16, 25, 1)],
    is_held_out=False,
)
REFERENCE = "a red car and a blue ball"


def test_forced_scores_by_hand():
    """Words: a, red, car, and, a, blue, ball; the four in mentions count."""
    boxes = [NOWHERE] * 7
    boxes[1], boxes[2] = [0.1, 0.1, 0.3, 0.3], [0.2, 0.2, 0.4, 0.4]  # points 0.2 and 0.3
    boxes[5], boxes[6] = [0.1, 0.1, 0.3, 0.3], [0.7, 0.7, 0.9, 0.9]  # points 0.2 and 0.8
    targets = [NOWHERE] * 7
    targets[1] = [0.2, 0.2, 0.4, 0.4]  # 0.1 away
    targets[6] = [0.6, 0.6, 0.8, 0.8]  # 0.1 away
    item = narration(REFERENCE, boxes, targets, caption_of())
    scores = objects.score_forced([item], [TRUTH], [item.word_boxes])
    assert scores["object_point_l1"] == pytest.approx(0.1, abs=1e-6)
    assert scores["object_center_l1"] == pytest.approx((0 + 0.1 + 0.6 + 0) / 4, abs=1e-6)
    assert scores["object_point_in_box"] == 3 / 4


def test_forced_scores_take_the_words_that_tokens_reach():
    item = narration(REFERENCE, [[0.1, 0.1, 0.3, 0.3]] * 3, [[0.2] * 4] * 3, caption_of())
    scores = objects.score_forced([item], [TRUTH], [item.word_boxes])
    assert scores["object_point_in_box"] == 1  # of "red car"; the blue ball was cut off
    one = narration(REFERENCE, [NOWHERE], [NOWHERE], caption_of())
    assert objects.score_forced([one], [TRUTH], [one.word_boxes]) == {}


def test_a_line_that_is_no_truth_is_named(tmp_path):
    for line in ('{"image_id": 1}', "[]", "{cut"):
        (tmp_path / "truth.jsonl").write_text(line)
        with pytest.raises(ValueError, match="truth.jsonl:1: not objects, mentions and"):
            objects.load_truth(tmp_path / "truth.jsonl")


def test_generated_scores_by_hand():
    """A right object told twice counts once; a wrong colour is a wrong object."""

    def mentions(text):
        colours, kinds = ("red", "green", "blue"), ("car", "ball")
        words = text.split()
        starts = np.cumsum([0, *(len(w) + 1 for w in words)])
        return [
            (int(starts[i]), int(starts[i + 2] - 1), words[i], words[i + 1])
            for i in range(len(words) - 1)
            if words[i] in colours and words[i + 1] in kinds
        ]

    words = [
        ("red", 0.1), ("car", 0.7), ("red", 0.1), ("car", 0.1), ("green", 0.8), ("ball", 0.8)
    ]  # fmt: skip
    caption = caption_of(*(placed(text, at, at) for text, at in words))
    scores = objects.score_generated([caption], [TRUTH], mentions)
    assert scores["object_precision"] == pytest.approx(1 / 3)
    assert scores["object_recall"] == pytest.approx(1 / 2)
    assert scores["generated_point_in_box"] == pytest.approx(3 / 4)  # words of red cars
    plain = objects.score_generated([caption.text], [TRUTH], mentions)
    assert "generated_point_in_box" not in plain
    nothing = objects.score_generated([caption_of()], [TRUTH], mentions)
    assert (nothing["object_precision"], nothing["object_recall"]) == (0, 0)


def test_point_scores_by_hand():
    """The nearest corner of each target counts; unknown places count nowhere."""
    boxes = [[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.9]]
    targets = [[0.2, 0.1, 0.3, 0.3], NOWHERE, [0.9, 0.8, 0.9, 0.9]]
    item = narration("a b c", boxes, targets, caption_of(placed("a", 0.2, 0.2)))
    scores = trace.score_narrations([item])
    assert scores["point_l1"] == pytest.approx((0.05 / 2 + 0) / 2, abs=1e-6)
    baseline = trace.score_baselines([item], ["a b c"])
    assert baseline["point_l1"] == pytest.approx((0.2 + 0.35) / 2, abs=1e-6)
    assert baseline["bleu_1"] > scores["bleu_1"]


def test_point_errors_of_an_image_are_pooled():
    """Five narrations of one image weigh what one of another does, and tokens count in it."""
    near = narration("a", [[0.3] * 4], [[0.2] * 4], caption_of())
    far = narration("a b", [[0.5] * 4] * 2, [[0.2] * 4] * 2, caption_of(), image=2)
    known = [(n.record.id, n.token_points, n.token_targets) for n in (*[near] * 5, far)]
    assert trace.point_l1(known) == pytest.approx(0.2)
    both = [("x", n.token_points, n.token_targets) for n in (near, far)]
    assert trace.point_l1(both) == pytest.approx((0.1 + 2 * 0.3) / 3)


def test_an_empty_caption_can_be_scored_and_written():
    item = narration("a b", [[0.1] * 4] * 2, [[0.2] * 4] * 2, caption_of())
    scores = trace.score_narrations([item])
    assert np.isfinite(scores["point_l1"]) and scores["bleu_1"] == 0
    line = narrative_line(item)
    assert line["caption"] == "" and line["timed_caption"] == []
    assert (line["dataset_id"], line["image_id"]) == ("scenes_val", "1")


def test_times_of_predicted_words_rise():
    words = caption_of(placed("a", 0.1, 0.2), placed("b", 0.3, 0.4))
    line = narrative_line(narration("a", [[0.1] * 4], [[0.1] * 4], words))
    times = [(w["start_time"], w["end_time"]) for w in line["timed_caption"]]
    assert times == [(0, 0.4), (0.4, 0.8)]
    assert [p["t"] for p in line["traces"][0]] == [0.2, 0.6]
    assert [(p["x"], p["y"]) for p in line["traces"][0]] == [(0.1, 0.2), (0.3, 0.4)]


def test_teacher_forced_points_are_those_of_the_reference_words(tiny_model, tiny_tables):
    table = Table(tiny_tables.val)
    (item,) = trace.predict_narrations(tiny_model, table, limit=1)
    spans = item.phrase.caption.split()
    assert item.word_boxes.shape == item.target_boxes.shape == (len(spans), 4)
    places = [
        any(p.start < end and start < p.end and p.box for p in item.phrase.pieces)
        for start, end in objects.words_of(item.phrase.caption)
    ]
    agree = np.mean(~np.isnan(item.target_boxes[:, 0]) == np.array(places))
    assert agree > 0.95  # a word at a seam may have tokens on both sides
    points = item.token_points
    assert np.isfinite(points).all()
    token_boxes = np.concatenate([points.min(1), points.max(1)], axis=1)
    assert all((token_boxes == box).all(1).any() for box in item.word_boxes)
