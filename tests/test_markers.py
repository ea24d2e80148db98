"""PerceptionGPT's special tokens: what is refused, and by which name."""

from __future__ import annotations

import pytest

from pixelllm.markers import MARKERS, MarkerIds, add_markers, check_markers, marker_ids
from pixelllm.tokenizer import train_tokenizer

IDS = MarkerIds(*range(100, 108))
ids = IDS._asdict()
SPAN = [ids["vis_start"], ids["vis"], ids["vis"], ids["vis_end"]]


def test_markers_become_single_tokens():
    tokenizer = train_tokenizer(["a red cat", "a red dog"], 100)
    size = len(tokenizer)
    found = add_markers(tokenizer)
    assert sorted(found) == list(range(size, size + len(MARKERS)))
    assert tokenizer("cat".join(MARKERS))["input_ids"].count(found.vis) == 1
    assert add_markers(tokenizer) == found == marker_ids(tokenizer)


def test_a_tokenizer_without_markers_is_refused():
    tokenizer = train_tokenizer(["a red cat", "a red dog"], 100)
    tokenizer.add_tokens(list(MARKERS[1:]), special_tokens=True)
    with pytest.raises(ValueError, match="tokenizer has no <vis>; .*add_markers"):
        marker_ids(tokenizer)


def test_whole_sequences_pass():
    image = [ids["image_start"], ids["image"], ids["image"], ids["image_end"]]
    phrase = [ids["text_start"], 7, ids["text_end"]]
    check_markers([1, *image, *phrase, *SPAN, 5, *SPAN, ids["vis"], 2], IDS, 5, "record 3")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (SPAN[:-1], "record 3: <obj_vis_s> without <obj_vis_e>; was the text cut off"),
        (SPAN[1:], "record 3: token 2 is <obj_vis_e> without <obj_vis_s>"),
        ([SPAN[0], *SPAN], "record 3: token 1 is <obj_vis_s> a second time before <obj_vis_e>"),
        ([ids["text_end"], *SPAN], "token 0 is <obj_text_e> without <obj_text_s>"),
        ([ids["image_start"], *SPAN], "<im_start> without <im_end>"),
    ],
)
def test_unmatched_markers_are_refused(tokens: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        check_markers(tokens, IDS, 2, "record 3")


@pytest.mark.parametrize("num_boxes", [1, 3])
def test_boxes_must_be_as_many_as_their_tokens(num_boxes: int):
    with pytest.raises(ValueError, match=f"record 3: 2 <vis> in the text, but {num_boxes} boxes"):
        check_markers(SPAN, IDS, num_boxes, "record 3")
