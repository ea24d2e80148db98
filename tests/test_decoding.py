"""Official greedy and beam search against the official tokens and scores."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import golden_names, load_golden
from flax_language import git_decoder
from recomputed import Recomputed

from pixelllm.decoding import beam_search, greedy_search

BOS, EOS = 0, 1


def sine_logits(token_ids, t):
    """The toy model of the reference sheet, section 15: V = 6."""
    words = torch.arange(6)
    return 2 * torch.cos(1.3 * (6 * token_ids[:, t, None] + words)) + 0.1 * t * (words == EOS)


def begin(num_rows, length, bos=BOS, eos=EOS):
    start = torch.full((num_rows, length), eos)
    start[:, 0] = bos
    return start


@pytest.mark.parametrize("name", golden_names("decode_table"))
def test_golden_table_model(name):
    case = load_golden(name)
    table, start = case.tensor("in.table"), case.tensor("in.begin_tokens").long()
    eos = case.hparams["end_token_id"]

    def next_logits(token_ids, t):
        item = torch.arange(len(token_ids)) // (len(token_ids) // len(table))
        return table[item, t, token_ids[:, t]]

    tokens, scores = greedy_search(next_logits, start, eos)
    assert torch.equal(tokens, case.tensor("out.greedy.tokens").long())
    torch.testing.assert_close(scores, case.tensor("out.greedy.log_probs"), **case.tolerance)
    searches = [key for key in case.arrays if re.fullmatch(r"out\.beam.*\.tokens", key)]
    assert searches
    for key in searches:
        num_beams, per_beam, alpha = re.fullmatch(
            r"out\.beam(\d+)_node(\d+)_alpha([\d.]+)\.tokens", key
        ).groups()
        tokens, scores = beam_search(
            next_logits, start, eos, int(num_beams), int(per_beam), float(alpha)
        )
        assert torch.equal(tokens, case.tensor(key).long()), key
        expected = case.tensor(key.replace("tokens", "scores"))
        torch.testing.assert_close(scores, expected, **case.tolerance)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("name", golden_names("decode_text_decoder"))
def test_golden_text_decoder(name, is_cached):
    case = load_golden(name)
    model = git_decoder(case.weights(), case.hparams).eval()
    prefix = case.tensor("in.visual_features").flatten(0, 1)
    context = case.tensor("in.context_tokens").flatten(0, 1).long()
    start = case.tensor("in.begin_tokens").flatten(0, 1).long()
    outputs = sorted(k for k in case.arrays if re.fullmatch(r"out\.[^.]+\.text_tokens", k))
    for key in outputs:
        name = key.split(".")[1]
        ids = context[:, :0] if "nocontext" in name else context
        with torch.no_grad():
            prompt = model.encode(prefix, ids, ids == 0)
            tokens, scores = search(model, prompt, start, name, case.hparams, is_cached)
        assert torch.equal(tokens[:, -1], case.tensor(key).long().flatten(0, 1)), key
        expected = case.tensor(f"out.{name}.log_probs").flatten()
        torch.testing.assert_close(scores[:, -1], expected, **case.tolerance)
        beams = f"out.{name}.beam_text_tokens"
        if beams in case.arrays:
            assert torch.equal(tokens, case.tensor(beams).long().flatten(0, 1)), key
            expected = case.tensor(f"out.{name}.beam_log_probs").flatten(0, 1)
            torch.testing.assert_close(scores, expected, **case.tolerance)


def search(model, prompt, start, name, hparams, is_cached):
    """Tokens int64[R, beams, T] and scores of the search that `name` describes."""
    num_beams = int(re.match(r"beam(\d+)", name).group(1)) if name.startswith("beam") else 1
    steps = model.new_steps(prompt, num_beams, start.shape[1] - 2)
    if not is_cached:
        steps = Recomputed(model, prompt, num_beams)
    eos = hparams["end_token_id"]
    if name.startswith("greedy"):
        tokens, scores = greedy_search(steps, start, eos)
        return tokens[:, None], scores[:, None]
    per_beam, alpha = hparams["per_node_beam_size"], hparams["brevity_penalty_alpha"]
    return beam_search(steps, start, eos, num_beams, per_beam, alpha, steps.reorder)


def test_toy_model_of_the_reference_sheet():
    start = begin(1, 8)
    tokens, scores = greedy_search(sine_logits, start, EOS)
    assert tokens.tolist() == [[0, 5, 4, 5, 4, 5, 4, 1]]
    torch.testing.assert_close(scores, torch.tensor([-0.644485]), atol=1e-5, rtol=0)
    tokens, scores = beam_search(sine_logits, start, EOS, num_beams=4)
    rows = ["05454111", "05411111", "05311111", "01111111"]
    assert tokens[0].tolist() == [[int(digit) for digit in row] for row in rows]
    expected = torch.tensor([[-3.577551, -2.896585, -2.690203, -2.415437]])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_beams_that_never_finish_return_with_plain_log_probabilities():
    tokens, scores = beam_search(sine_logits, begin(1, 8), EOS, num_beams=3, per_beam=1)
    rows = ["00545401", "00545451", "05454541"]
    assert tokens[0].tolist() == [[int(digit) for digit in row] for row in rows]
    expected = torch.tensor([[-5.241893, -5.195451, -4.804617]])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_items_do_not_influence_each_other(generator):
    """The search ends for all items at once; a long item must not change a short one."""
    table = 3 * torch.randn(4, 9, 9, generator=generator)

    def next_logits_of(items):
        def next_logits(token_ids, t):
            return table[items.repeat_interleave(3), token_ids[:, t]]

        return next_logits

    together, _ = beam_search(next_logits_of(torch.arange(4)), begin(4, 9), EOS, num_beams=3)
    for item in range(4):
        alone, _ = beam_search(next_logits_of(torch.tensor([item])), begin(1, 9), EOS, num_beams=3)
        assert torch.equal(alone[0], together[item])


def test_greedy_never_writes_a_word_twice_in_a_row(generator):
    table = 3 * torch.randn(9, 9, generator=generator)
    table.fill_diagonal_(50)
    tokens, _ = greedy_search(lambda ids, t: table[ids[:, t]], begin(1, 9), EOS)
    words = tokens[0][tokens[0] != EOS]
    assert (words[1:] != words[:-1]).all()


def test_a_cache_is_told_which_beams_go_on(generator):
    """A model that sees its own words only through `reorder` finds the same captions."""
    table = 3 * torch.randn(30, 9, generator=generator)
    seen = torch.full((5, 3, 9), -1)  # what a cache would hold: items, beams, words

    def next_logits(token_ids, t):
        words = token_ids[:, : t + 1]
        return table[(words * torch.arange(1, t + 2)).sum(1) % 30]

    def of_the_cache(token_ids, t):
        seen[..., t] = token_ids[:, t].unflatten(0, (5, 3))
        return next_logits(seen.flatten(0, 1), t)

    def reorder(beams):
        seen.copy_(seen.gather(1, beams[..., None].expand_as(seen)))

    expected, _ = beam_search(next_logits, begin(5, 9), EOS, num_beams=3)
    tokens, _ = beam_search(of_the_cache, begin(5, 9), EOS, num_beams=3, reorder=reorder)
    assert torch.equal(tokens, expected)
    seen.fill_(-1)
    tokens, _ = beam_search(of_the_cache, begin(5, 9), EOS, num_beams=3)
    assert not torch.equal(tokens, expected)


def test_greedy_asks_no_further_once_every_item_has_ended():
    asked = []

    def next_logits(token_ids, t):
        asked.append(t)
        return torch.eye(6)[[EOS if t >= item else 2 + t for item in (1, 3)]] * 9

    tokens, _ = greedy_search(next_logits, begin(2, 12), EOS)
    assert asked == [0, 1, 2, 3]
    assert tokens[:, :5].tolist() == [[BOS, 2, EOS, EOS, EOS], [BOS, 2, 3, 4, EOS]]


def test_a_live_beam_may_still_overtake_a_finished_one():
    """The search may only stop when no live beam can win under the largest penalty."""
    probabilities = torch.full((8, 8), 1e-6)
    probabilities[BOS] = 0.02
    probabilities[BOS, EOS] = torch.tensor(-0.95).exp()  # scores -0.95 at once
    probabilities[BOS, 2] = torch.tensor(-1.0).exp()
    probabilities[torch.arange(2, 7), torch.arange(3, 8)] = 1.0
    probabilities[7, EOS] = 1.0
    table = probabilities.log()
    tokens, scores = beam_search(lambda ids, t: table[ids[:, t]], begin(1, 10), EOS, num_beams=1)
    assert tokens.tolist() == [[[0, 2, 3, 4, 5, 6, 7, 1, 1, 1]]]
    total = table[BOS].log_softmax(-1)[2].item()
    assert scores.item() == pytest.approx(total / ((5 + 7) / 6) ** 0.6, abs=1e-3)
