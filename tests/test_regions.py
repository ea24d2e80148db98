from __future__ import annotations

import pytest

from pixelllm.evaluation import regions
from pixelllm.evaluation.captions import score_captions
from pixelllm.evaluation.dense import Region
from pixelllm.evaluation.regions import grouped_references, score_region_captions

REGIONS = {
    "a": Region((0, 0, 0.5, 0.5), "a dog"),
    "b": Region((0.6, 0.6, 1, 1), "the grass"),
    "c": Region((0, 0, 0.5, 0.45), "a puppy"),
}


def test_every_region_of_a_group_has_all_its_captions():
    other = {"d": Region((0, 0, 0.5, 0.5), "a dog elsewhere")}
    assert grouped_references([REGIONS, {}, other]) == {
        "a": ["a dog", "a puppy"],
        "b": ["the grass"],
        "c": ["a dog", "a puppy"],
        "d": ["a dog elsewhere"],
    }


def test_scores_are_those_of_captions_with_meteor(monkeypatch):
    monkeypatch.setattr(regions, "score_meteor", lambda hypotheses, references: 0.25)
    hypotheses = {"a": "a puppy", "b": "green grass", "c": "a dog"}
    single = {key: [region.caption] for key, region in REGIONS.items()}
    scores = score_region_captions(hypotheses, single)
    expected = score_captions(hypotheses, single)
    names = ("cider_d", "rouge_l", "bleu_4")
    assert scores == {"meteor": 0.25} | {name: expected[name] for name in names}
    grouped = score_region_captions(hypotheses, grouped_references([REGIONS]))
    assert grouped["rouge_l"] > scores["rouge_l"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="region a is in two images"):
        grouped_references([REGIONS, {"a": REGIONS["a"]}])
    with pytest.raises(ValueError, match=r"regions \['a'\] ...: box .* is not in \[0, 1\]"):
        grouped_references([{"a": Region((0, 0, 20, 30), "x")}])
    with pytest.raises(ValueError, match="1 ids without a reference: b"):
        score_region_captions({"a": "x", "b": "y"}, {"a": ["x"]})
