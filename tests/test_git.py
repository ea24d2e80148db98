"""The official text decoder: golden numbers, cache, masks."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from flax_language import git_decoder

from pixelllm.models.git import GitDecoder


def tiny():
    torch.manual_seed(0)
    model = GitDecoder(
        40, prefix_width=12, width=16, num_layers=2, num_heads=2, max_length=24, bos_id=2, eos_id=3
    ).eval()
    torch.nn.init.normal_(model.output.weight)  # spread the words, so that captions differ
    return model


@pytest.fixture
def batch(generator):
    prefix = torch.randn(3, 4, 12, generator=generator)
    context = torch.randint(4, 40, (3, 5), generator=generator)
    context[1, 2:] = 0
    context[2] = 0
    token_ids = torch.randint(4, 40, (3, 6), generator=generator)
    token_ids[:, 0] = 2
    return prefix, context, context == 0, token_ids, token_ids == 0


def layer_outputs(model, *batch):
    """Features, and all positions of the embeddings and of every layer, float[R, S + T, D]."""
    inputs = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in model.encoder.layer
    ]
    last = model.encoder.register_forward_hook(
        lambda module, args, output: inputs.append(output.last_hidden_state)
    )
    hidden = model(*batch)
    for handle in [*handles, last]:
        handle.remove()
    return hidden, inputs


@pytest.mark.parametrize("name", golden_names("text_decoder"))
def test_golden_text_decoder(name):
    case = load_golden(name)
    model = git_decoder(case.weights(), case.hparams).eval()
    prefix, token_ids = case.tensor("in.visual_features"), case.tensor("in.text_tokens").long()
    context = token_ids[:, :0]
    if "in.context_tokens" in case.arrays:
        context = case.tensor("in.context_tokens").long()
    hidden, layers = layer_outputs(model, prefix, context, context == 0, token_ids, token_ids == 0)
    torch.testing.assert_close(model.logits(hidden), case.tensor("out.logits"), **case.tolerance)
    features = hidden
    if fused := case.hparams["out_feat_fuse_method"].removeprefix("concat:"):
        T = token_ids.shape[1]
        features = torch.cat([layers[int(i)][:, -T:] for i in fused.split(",")], dim=-1)
    torch.testing.assert_close(features, case.tensor("out.features"), **case.tolerance)
    if "out.features_with_prefix" in case.arrays:
        expected = case.tensor("out.features_with_prefix")
        torch.testing.assert_close(layers[-1], expected, **case.tolerance)


def test_stream_with_cache_equals_one_pass(batch):
    """Wrong positions or masks under the cache would show here."""
    model, (prefix, context, padding, *_) = tiny(), batch
    for row in range(3):
        one = (prefix[row : row + 1], context[row : row + 1], padding[row : row + 1])
        ids, hidden, log_probs = zip(*model.stream(*one, max_new_tokens=8), strict=True)
        token_ids = torch.tensor([[model.bos_id, *ids]])
        expected = model(*one, token_ids, torch.zeros_like(token_ids, dtype=torch.bool))
        torch.testing.assert_close(torch.stack(hidden, 1), expected[:, 1:])
        steps = model.logits(expected[:, :-1]).log_softmax(-1)
        expected = steps.gather(-1, token_ids[:, 1:, None])[0, :, 0]
        torch.testing.assert_close(torch.tensor(log_probs), expected)


def test_stream_writes_what_generate_does(batch):
    """Neither says a word twice in a row, which this bias asks for."""
    model, (prefix, context, padding, *_) = tiny(), batch
    torch.nn.init.normal_(model.output.weight, std=0.02)
    with torch.no_grad():
        model.output.bias[7] += 5
    one = (prefix[:1], context[:1], padding[:1])
    ids, _, log_probs = zip(*model.stream(*one, max_new_tokens=8), strict=True)
    expected = model.generate(*one, max_new_tokens=8)
    assert list(ids) == expected.token_ids[0, 1 : 1 + len(ids)].tolist() and ids[0] == 7 != ids[1]
    torch.testing.assert_close(torch.tensor(log_probs), expected.log_probs[0, 1 : 1 + len(ids)])


def test_padding_changes_nothing(batch):
    model, (prefix, context, padding, token_ids, token_padding) = tiny(), batch
    expected = model(prefix, context, padding, token_ids, token_padding)
    changed = torch.where(padding, 7, context)
    longer = torch.nn.functional.pad(token_ids, (0, 3))
    hidden = model(prefix, changed, padding, longer, longer == 0)
    torch.testing.assert_close(hidden[:, :6], expected)


def test_generate_ends_with_eos_then_padding(batch):
    model, (prefix, context, padding, *_) = tiny(), batch
    for num_beams in (1, 3):
        generation = model.generate(prefix, context, padding, max_new_tokens=9, num_beams=num_beams)
        for ids, end in zip(generation.token_ids, generation.padding, strict=True):
            words = ids[~end].tolist()
            assert words[0] == model.bos_id and model.eos_id not in words[:-1]
            assert (ids[end] == model.pad_id).all()
