"""From tokens to placed words, on tokens chosen by hand."""

from __future__ import annotations

import pytest
import torch

from pixelllm.generation import Caption, place_words, pointing_token, stream_words
from pixelllm.tokenizer import train_tokenizer, words_of_tokens


@pytest.fixture(scope="module")
def tokenizer():
    """Knows "red" and "car" only, so that other words have a token per character."""
    return train_tokenizer(["red car"] * 3, 200)


def encode(tokenizer, text: str) -> list[int]:
    return [0, *tokenizer(text, add_special_tokens=False).input_ids, 1]


def corners_of(length: int) -> torch.Tensor:
    """Token i has its box from i / 100 to (i + 2) / 100, its point at (i + 1) / 100."""
    first = torch.arange(length) / 100
    return torch.stack([first, first + 0.02], dim=1)[..., None].expand(-1, -1, 2)


def test_the_last_token_that_is_no_punctuation_points(tokenizer):
    """Only it has read the whole word; a comma after it is about nothing."""
    ids = encode(tokenizer, 'a "tall", red ...')
    words = words_of_tokens(tokenizer, ids)
    pointing = [tokenizer.decode([ids[pointing_token(w, ids, tokenizer)]]) for w in words]
    assert [word.text for word in words] == ["a", '"tall",', "red", "..."]
    assert pointing == ["a", "l", "red", "."]
    assert pointing_token(words[1], ids, tokenizer) == words[1].tokens[-3]


def test_words_have_the_place_of_their_pointing_token(tokenizer):
    ids = encode(tokenizer, "red tall, car")
    log_probs = -torch.arange(len(ids), dtype=torch.float32)
    caption = place_words(tokenizer, torch.tensor(ids), log_probs, corners_of(len(ids)))
    assert caption.text == "red tall, car"
    words = words_of_tokens(tokenizer, ids)
    for placed, word in zip(caption.words, words, strict=True):
        token = pointing_token(word, ids, tokenizer)
        assert placed.point == pytest.approx(((token + 1) / 100,) * 2)
        assert placed.box == pytest.approx((token / 100,) * 2 + ((token + 2) / 100,) * 2)
        assert placed.log_prob == -sum(word.tokens)
    assert caption.log_prob == log_probs.sum()  # the end token included


def test_padding_after_the_end_changes_nothing(tokenizer):
    ids = encode(tokenizer, "red car")
    padded = torch.tensor([*ids, 0, 0])
    log_probs = torch.tensor([-1.0] * len(ids) + [0.0, 0.0])
    corners = corners_of(len(padded))
    alone = place_words(tokenizer, padded[:-2], log_probs[:-2], corners[:-2])
    assert place_words(tokenizer, padded, log_probs, corners) == alone


def test_corners_outside_or_reversed_still_make_a_box(tokenizer):
    ids = encode(tokenizer, "red")
    corners = torch.tensor([[1.2, 0.5], [0.6, -0.3]]).expand(len(ids), 2, 2)
    (word,) = place_words(tokenizer, torch.tensor(ids), torch.zeros(len(ids)), corners).words
    assert word.box == pytest.approx((0.6, 0.0, 1.0, 0.5))
    assert word.point == pytest.approx((0.8, 0.25))


def test_words_stream_when_the_next_one_begins(tokenizer):
    ids = encode(tokenizer, "red tall car")[1:-1]
    corners = corners_of(len(ids))
    taken = []

    def tokens():
        for position, token in enumerate(ids):
            taken.append(position)
            yield token, corners[position], -1.0

    words = words_of_tokens(tokenizer, ids)
    for number, (text, point, log_prob) in enumerate(stream_words(tokenizer, tokens())):
        assert text == words[number].text
        assert point == pytest.approx(
            ((pointing_token(words[number], ids, tokenizer) + 1) / 100,) * 2
        )
        assert log_prob == -len(words[number].tokens)
        if number < 2:
            assert taken[-1] <= words[number + 1].tokens[-1]
    assert number == 2


def test_captions_become_plain_values():
    assert Caption("", (), -0.5).to_json() == {"caption": "", "words": [], "log_prob": -0.5}
