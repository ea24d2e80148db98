"""Tokenizers: one trained on the captions at hand, and the step from tokens back to words."""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pixelllm.alignment import words_of

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # T5's ids 0, 1, 2; T5 also begins with <pad>


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over whitespace words and punctuation, with T5's special tokens.

    Only pieces seen at least twice are merged; other text is spelled in characters, and
    characters that are neither ASCII nor seen become <unk>.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


class Word(NamedTuple):
    """A whitespace word of a caption and the positions of its tokens."""

    text: str
    tokens: list[int]


def words_of_tokens(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> list[Word]:
    """Group token ids into whitespace words; special tokens belong to none.

    Positions index `token_ids`. Joined with blanks, the words are the decoded caption up to
    white space. A token of white space alone, or of some bytes of a character, belongs to the
    word that goes on or follows.
    """
    special = set(tokenizer.all_special_ids)
    positions = [place for place, token in enumerate(token_ids) if token not in special]
    kept = [token_ids[place] for place in positions]
    text = tokenizer.decode(kept)
    spans = words_of(text)
    words = [Word(text[first:last], []) for first, last in spans]
    start = 0
    for count, position in enumerate(positions, start=1):
        # Byte-level pieces have no text of their own: an unfinished character is not in `text`.
        end = max(start, len(os.path.commonprefix([tokenizer.decode(kept[:count]), text])))
        touched = [n for n, (first, last) in enumerate(spans) if first < end and start < last]
        following = [n for n, (_, last) in enumerate(spans) if start < last][:1]
        for number in touched or following:
            words[number].tokens.append(position)
        start = end
    return words
