"""Tokens and back to words, on ordinary and odd strings."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pixelllm.tokenizer import END, PAD, UNKNOWN, train_tokenizer, words_of_tokens

CORPUS = [
    "In this image I can see a red car, and a small dog's bowl.",
    "There is a red car near a blue ball; behind it, a tree (very tall).",
    "a red car a blue ball a tall tree",
] * 3
ODD = [
    "",
    " ",
    "a",
    "  a  red   car ",
    "red\tcar\nred\r\ncar",
    "dog's (very) tall-tree: 3.5%, ok?!",
    "... a -- b",
    "naïve café 日本語 emoji 🚗 red",
    "zero\u200bwidth no\u00a0break",
    "a" * 60,
    "<pad> </s> <unk>",
    "RED Car",
    "▁red ▁ car",
]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 200)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2, without merges: a character may be spread over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
@pytest.mark.parametrize("text", [*ODD, *CORPUS[:3]])
def test_joined_words_are_the_decoded_text(kind: str, text: str, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    words = words_of_tokens(tokenizer, ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert [word.text for word in words] == decoded.split()


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
@pytest.mark.parametrize("text", ODD)
def test_tokens_of_words_rise_and_are_never_special(kind: str, text: str, request):
    tokenizer = request.getfixturevalue(kind)
    special = tokenizer.eos_token_id
    ids = [special, *tokenizer(text, add_special_tokens=False).input_ids, special]
    places = [token for word in words_of_tokens(tokenizer, ids) for token in word.tokens]
    assert places == sorted(places)
    assert not {0, len(ids) - 1} & set(places)
    assert all(word.tokens for word in words_of_tokens(tokenizer, ids))


def test_every_token_of_a_word_is_counted(trained):
    ids = [0, *trained("a red car, xyz", add_special_tokens=False).input_ids, 1]
    words = words_of_tokens(trained, ids)
    assert [word.text for word in words] == ["a", "red", "car,", "xyz"]
    assert [t for word in words for t in word.tokens] == list(range(1, len(ids) - 1))


def test_special_ids_are_those_of_t5(trained):
    assert [trained.convert_tokens_to_ids(t) for t in (PAD, END, UNKNOWN)] == [0, 1, 2]


def test_captions_of_the_corpus_survive_a_round_trip(trained):
    for text in CORPUS:
        assert trained.decode(trained(text, add_special_tokens=False).input_ids) == text


def test_training_is_deterministic():
    first, second = (train_tokenizer(CORPUS, 150).get_vocab() for _ in range(2))
    assert first == second


def test_the_vocabulary_has_an_upper_bound():
    assert len(train_tokenizer(CORPUS, 120)) == 120
