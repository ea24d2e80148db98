"""Cached steps of the official text decoder against recomputing everything."""

from __future__ import annotations

import pytest
import torch
from recomputed import Recomputed

from pixelllm.decoding import beam_search, greedy_search
from pixelllm.models import git_cache
from pixelllm.models.git import GitDecoder


def tiny():
    torch.manual_seed(0)
    model = GitDecoder(
        40, prefix_width=12, width=32, num_layers=2, num_heads=2, max_length=24, bos_id=2, eos_id=3
    ).eval()
    torch.nn.init.normal_(model.output.weight)  # spread the words, so that captions differ
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def prompt(model, generator):
    """Three items, of which one has no context and one a padded one."""
    context = torch.randint(4, 40, (3, 5), generator=generator)
    context[1, 2:] = 0
    context[2] = 0
    return model.encode(torch.randn(3, 4, 12, generator=generator), context, context == 0)


@pytest.mark.parametrize("packed_rows", [1, 1000])
def test_steps_equal_recomputing_while_beams_change_places(
    model, prompt, packed_rows, monkeypatch, generator
):
    """Catches keys of another beam or item, wrong positions, and a wrong packed product."""
    monkeypatch.setattr(git_cache, "_PACKED_ROWS", packed_rows)
    git_cache.forget_weights(model)
    A, T = 4, 9
    token_ids = torch.full((3, A, T), 3)
    token_ids[..., 0] = 2
    cached, expected = model.new_steps(prompt, A, T), Recomputed(model, prompt, A)
    for t in range(T):
        logits = cached(token_ids.flatten(0, 1), t)
        torch.testing.assert_close(logits, expected(token_ids.flatten(0, 1), t))
        beams = torch.randint(A, (3, A), generator=generator)
        cached.reorder(beams)
        token_ids = token_ids.gather(1, beams[..., None].expand_as(token_ids))
        if t + 1 < T:
            token_ids[..., t + 1] = torch.randint(4, 40, (3, A), generator=generator)


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_search_with_a_cache_finds_the_same_words(model, prompt, num_beams):
    start = torch.full((3, 20), model.eos_id)
    start[:, 0] = model.bos_id
    found = []
    for steps in (model.new_steps(prompt, num_beams, 18), Recomputed(model, prompt, num_beams)):
        if num_beams == 1:
            found.append(greedy_search(steps, start, model.eos_id))
        else:
            reorder = steps.reorder
            found.append(beam_search(steps, start, model.eos_id, num_beams, reorder=reorder))
    (token_ids, scores), (expected_ids, expected_scores) = found
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores)


def test_autocast_holds_for_the_steps_and_not_for_the_head(model, prompt):
    """Keys, values and weights are bfloat16, as in `decode`; logits are float32."""
    token_ids = torch.tensor([[2, 7, 9]]).repeat(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        steps, expected = model.new_steps(prompt, 1, 3), Recomputed(model, prompt, 1)
        for t in range(3):
            logits = steps(token_ids, t)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected(token_ids, t), atol=0.1, rtol=0.05)
    assert steps.kept[0].dtype == steps.weights.layers[0].inner.weight.dtype == torch.bfloat16


def test_weights_are_made_once_until_they_change(prompt):
    model = tiny()
    first = model.new_steps(prompt, 2, 3).weights
    assert model.new_steps(prompt, 2, 5).weights is first
    assert model.new_steps(prompt, 4, 5).weights is not first  # packed for other rows
    for change in (lambda: model.output.weight.mul_(2), lambda: _double_unseen(model)):
        change()
        token_ids = torch.full((6, 3), 2)
        logits = model.new_steps(prompt, 2, 3)(token_ids, 0)
        torch.testing.assert_close(logits, Recomputed(model, prompt, 2)(token_ids, 0))


def _double_unseen(model):
    """As FSDP gathers parameters: autograd does not count it, but validation calls `eval`."""
    model.output.weight.data.mul_(2)
    model.eval()


def test_a_model_in_bfloat16_generates(generator):
    model = tiny().bfloat16()
    nothing = torch.zeros(2, 0).long()
    prefix = torch.randn(2, 4, 12, generator=generator).bfloat16()
    for num_beams in (1, 3):
        found = model.generate(
            prefix, nothing, nothing.bool(), max_new_tokens=5, num_beams=num_beams
        )
        assert found.hidden.dtype == torch.bfloat16 and found.log_probs.dtype == torch.float32
