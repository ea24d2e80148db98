"""Tokenizers: one trained on the captions at hand, and the step from tokens back to words."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
    white space. Decodes growing prefixes, as byte-level pieces have no text of their own.
    """
    words: list[Word] = []
    special = set(tokenizer.all_special_ids)
    kept: list[int] = []
    text, starts_word = "", True
    for position, token in enumerate(token_ids):
        if token in special:
            continue
        kept.append(token)
        longer = tokenizer.decode(kept, skip_special_tokens=True)
        addition = longer[len(text) :]
        text = longer
        starts_word = starts_word or addition[:1].isspace()
        if not addition.strip():
            starts_word = starts_word or bool(addition)
            continue
        parts = addition.split()
        if starts_word or not words:
            words.append(Word(parts[0], [position]))
        else:
            last = words.pop()
            words.append(Word(last.text + parts[0], [*last.tokens, position]))
        words.extend(Word(part, [position]) for part in parts[1:])
        starts_word = addition[-1].isspace()
    return words
