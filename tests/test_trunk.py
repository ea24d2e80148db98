"""Cached steps of trunks from `transformers` against recomputing everything."""

from __future__ import annotations

import pytest
import torch
from recomputed import Recomputed
from transformers import GPT2Config, LlamaConfig

from pixelllm.decoding import beam_search, greedy_search
from pixelllm.models.language import build_t5, build_trunk

V, D = 40, 16


def t5():
    return build_t5(V, D, 1, 2, num_heads=2, ff=24)


def llama():
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return build_trunk(config)


def gpt2():
    """Learned absolute positions."""
    return build_trunk(
        GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    )


@pytest.fixture(params=[t5, llama, gpt2], ids=lambda build: build.__name__)
def trunk(request):
    torch.manual_seed(0)
    trunk = request.param().eval().requires_grad_(False)
    torch.nn.init.normal_(trunk.model.lm_head.weight)  # spread the words, so that captions differ
    return trunk


@pytest.fixture
def prompt(trunk, generator):
    """Three items: with context, with padded context, without."""
    context = torch.randint(2, V, (3, 5), generator=generator)
    padding = torch.arange(5) >= torch.tensor([[5], [2], [0]])
    return trunk.encode(torch.randn(3, 4, D, generator=generator), context, padding)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_search_with_a_cache_finds_what_recomputing_finds(trunk, prompt, num_beams):
    """Catches a cache of the wrong beam: without `reorder` the beams' captions change."""
    start = torch.full((3, 14), trunk.eos_id)
    start[:, 0] = trunk.bos_id
    found = []
    for steps in (trunk.new_steps(prompt, num_beams, 12), Recomputed(trunk, prompt, num_beams)):
        if num_beams == 1:
            found.append(greedy_search(steps, start, trunk.eos_id))
        else:
            reorder = steps.reorder
            found.append(beam_search(steps, start, trunk.eos_id, num_beams, reorder=reorder))
    (token_ids, scores), (expected_ids, expected_scores) = found
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores)
