from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import golden_root, load_golden_json
from numpy.testing import assert_allclose

from pixelllm.evaluation.captions import bleu, cider_d, rouge_l, score_captions

KEYS = {"Bleu_1": "bleu_1", "Bleu_2": "bleu_2", "Bleu_3": "bleu_3", "Bleu_4": "bleu_4",
        "ROUGE_L": "rouge_l", "CIDEr": "cider_d"}  # fmt: skip


def golden_files() -> list[dict]:
    paths = sorted(golden_root().glob("caption_metrics/*.json"))
    assert paths, "the golden folder has no caption_metrics/*.json"
    return [json.loads(path.read_text()) for path in paths]


def test_golden_corpus_scores_of_raw_captions():
    for golden in golden_files():
        items = golden["items"]
        scores = score_captions(
            {item["id"]: item["hypothesis"] for item in items},
            {item["id"]: item["references"] for item in items},
        )
        expected = {KEYS[name]: value for name, value in golden["corpus"].items() if name in KEYS}
        assert scores.keys() == expected.keys()
        for name, value in expected.items():
            assert_allclose(scores[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_golden_scores_of_each_item_from_the_recorded_tokens():
    for golden in golden_files():
        items = golden["items"]
        candidates = [item["hypothesis_tokens"].split() for item in items]
        references = [[text.split() for text in item["reference_tokens"]] for item in items]
        ciders = cider_d(candidates, references)
        for item, candidate, truths, cider in zip(
            items, candidates, references, ciders, strict=True
        ):
            expected = item["scores"]
            assert_allclose(cider, expected["CIDEr"], atol=1e-9, err_msg=item["id"])
            # ROUGE, unlike the others, splits at plain blanks only.
            texts = [text.split(" ") for text in item["reference_tokens"]]
            rouge = rouge_l(item["hypothesis_tokens"].split(" "), texts)
            assert_allclose(rouge, expected["ROUGE_L"], atol=1e-9, err_msg=item["id"])
            if candidate:  # an empty one differs below 1e-15 only
                values = [expected[f"Bleu_{n}"] for n in (1, 2, 3, 4)]
                assert_allclose(bleu([candidate], [truths]), values, rtol=1e-9)


def test_bleu_clips_repeated_words_and_punishes_short_captions():
    """Papineni's example: 'the' seven times, twice in the reference."""
    truth = "the cat is on the mat".split()
    assert_allclose(bleu([["the"] * 7], [[truth]])[0], 2 / 7, rtol=1e-6)
    assert_allclose(bleu([["the", "cat"]], [[truth]])[0], math.exp(1 - 6 / 2), rtol=1e-6)


def test_bleu_is_pooled_over_the_corpus_with_the_closest_reference_length():
    candidates, truth = [["a"], ["b", "c", "d"]], [[["a"]], [["x", "y", "z"]]]
    assert_allclose(bleu(candidates, truth)[0], 1 / 4, rtol=1e-6)
    closest = bleu([["a", "b"]], [[["a", "b", "c", "d"], ["a"]]])[0]  # length 1, not 4
    assert_allclose(closest, 1.0, rtol=1e-6)


def test_rouge_takes_the_best_precision_and_recall_of_any_reference():
    precision, recall = 2 / 3, 1.0  # from "a b x y" and from "a"
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert_allclose(rouge_l(["a", "b", "c"], [["a", "b", "x", "y"], ["a"]]), expected)
    assert rouge_l([], [["a"]]) == 0.0
    assert rouge_l([], [[]]) == 1.0


def test_cider_rewards_rare_words_and_is_zero_for_one_image():
    truths = [[["a", "dog"]], [["a", "cat"]], [["a", "bus"]]]
    common, rare = cider_d([["a", "x"], ["x", "cat"], ["a", "bus"]], truths)[:2]
    assert common == 0.0 and rare > 0.0
    assert cider_d([["a", "dog"]], truths[:1]) == [0.0]
    assert score_captions({"1": "a dog"}, {"1": ["a dog"]})["cider_d"] == 0.0


def test_cider_falls_with_length_and_clips_repetition():
    truths = [[["red", "dog"]], [["blue", "cat"]]]
    exact, doubled = (
        cider_d([candidate, ["x"]], truths)[0]
        for candidate in (["red", "dog"], ["red", "dog", "red", "dog"])
    )
    assert exact > doubled > 0


def test_order_of_the_images_does_not_matter():
    golden = load_golden_json("caption_metrics/leave_last_out.json")["items"][:12]
    hypotheses = {item["id"]: item["hypothesis"] for item in golden}
    references = {item["id"]: item["references"] for item in golden}
    backwards = dict(reversed(references.items()))
    assert score_captions(hypotheses, references) == score_captions(hypotheses, backwards)


def test_a_fraction_counts_as_two_words_in_ngrams_only():
    scores = score_captions({"1": "3 1/2 cups"}, {"1": ["3 1/2 dogs"]})
    assert_allclose(scores["bleu_1"], 2 / 3, rtol=1e-6)
    assert_allclose(scores["rouge_l"], 1 / 2)


def test_ids_of_one_side_only_are_named():
    with pytest.raises(ValueError, match="1 ids without a hypothesis: b"):
        score_captions({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="1 ids without a reference: c"):
        score_captions({"a": "x", "c": "z"}, {"a": ["x"]})
    with pytest.raises(ValueError, match="without a reference: a"):
        score_captions({"a": "x"}, {"a": []})
    with pytest.raises(ValueError, match="a: its references are one string"):
        score_captions({"a": "x"}, {"a": "x"})
    with pytest.raises(ValueError, match="no captions"):
        score_captions({}, {})
    assert np.isfinite(list(score_captions({"a": ""}, {"a": [""]}).values())).all()
