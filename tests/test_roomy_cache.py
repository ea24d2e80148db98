"""A cache with room holds what transformers' own does, whatever happens to its rows."""

from __future__ import annotations

import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, MistralConfig

from pixelllm.models.roomy_cache import ROOM, roomy_cache

CONFIG = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)


def states(rows: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Strided as a projection's are."""
    return tuple(
        torch.randn(rows, tokens, 2, 8, generator=generator).transpose(1, 2) for _ in range(2)
    )


def test_it_holds_what_was_appended_through_repeats_and_reorders(generator):
    ours, theirs = roomy_cache(CONFIG), DynamicCache(config=CONFIG)
    order = torch.tensor([1, 1, 3, 0])
    steps = [5, 1, 1, "repeat", 1, 1, "reorder", 1, ROOM, 1, "reorder", 1, 1]
    rows = 2
    for step in steps:
        if step == "repeat":
            rows *= 2
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(2)
        elif step == "reorder":
            for cache in (ours, theirs):
                cache.reorder_cache(order)
        else:
            for layer in range(2):
                new = states(rows, step, generator)
                assert_close(ours.update(*new, layer), theirs.update(*new, layer), rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_is_appended_without_a_copy_of_the_rest(generator):
    cache = roomy_cache(CONFIG)
    keys, _ = cache.update(*states(2, 5, generator), 0)
    for _ in range(ROOM):
        longer, _ = cache.update(*states(2, 1, generator), 0)
        assert longer.data_ptr() == keys.data_ptr()


def test_sliding_windows_keep_their_own_layers():
    config = MistralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, sliding_window=4
    )
    assert roomy_cache(config).is_sliding == DynamicCache(config=config).is_sliding == [True]
