"""Language trunks: official numbers, parity with transformers, and the ways to decode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_names, load_golden
from flax_language import t5_trunk
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from pixelllm.losses import text_loss
from pixelllm.models.language import (
    DecoderOnlyLanguage,
    EncoderDecoderLanguage,
    add_lora,
    build_t5,
    build_trunk,
    load_trunk,
)

V, D, N = 40, 16, 4


def t5():
    return build_t5(V, D, 1, 2, num_heads=2, ff=24)


def llama():
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return build_trunk(config)


def gpt2():
    """Learned absolute positions: shows whether padded context takes a position."""
    config = GPT2Config(
        vocab_size=V, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    return DecoderOnlyLanguage(GPT2LMHeadModel(config))


@pytest.fixture(params=[t5, llama, gpt2], ids=lambda build: build.__name__)
def trunk(request):
    torch.manual_seed(0)
    trunk = request.param().eval()
    torch.nn.init.normal_(trunk.model.lm_head.weight)  # spread the words, so that captions differ
    return trunk


@pytest.fixture
def batch(generator):
    """Three prompts: with context, with padded context, without."""
    prefix = torch.randn(3, N, D, generator=generator)
    context_ids = torch.randint(2, V, (3, 5), generator=generator)
    padding = torch.arange(5) >= torch.tensor([[5], [2], [0]])
    return prefix, context_ids.masked_fill(padding, 0), padding


@pytest.fixture
def words(generator):
    token_ids = torch.randint(2, V, (3, 7), generator=generator)
    token_ids[:, 0] = 0
    padding = torch.arange(7) >= torch.tensor([[7], [4], [6]])
    return token_ids.masked_fill(padding, 0), padding


@pytest.mark.parametrize("name", golden_names("t5_head"))
def test_golden_t5_head(name):
    case = load_golden(name)
    trunk = t5_trunk(case.weights(), case.hparams).eval()
    token_ids = case.tensor("in.text_tokens").long()
    token_padding = F.pad(token_ids[:, 1:] == 0, (1, 0))
    context_ids = token_ids[:, :0]
    if "in.context_tokens" in case.arrays:
        context_ids = case.tensor("in.context_tokens").long()
    hidden = trunk(
        case.tensor("in.visual_features"), context_ids, context_ids == 0, token_ids, token_padding
    )
    torch.testing.assert_close(hidden, case.tensor("out.features"), **case.tolerance)
    torch.testing.assert_close(trunk.logits(hidden), case.tensor("out.logits"), **case.tolerance)


def test_official_masks_matter_only_at_eos_and_padding(batch, words):
    torch.manual_seed(0)
    trunk = t5().eval()
    plain = trunk(*batch, *words)
    trunk.official_masks = True
    official = trunk(*batch, *words)
    has_target = F.pad(~words[1][:, 1:], (0, 1), value=False)
    torch.testing.assert_close(official[has_target], plain[has_target])
    assert not torch.allclose(official[~has_target], plain[~has_target])


def first_t5():
    """The T5 before 1.1: one matrix for embedding and head, and scaled features."""
    config = T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return EncoderDecoderLanguage(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("build", [t5, first_t5])
def test_t5_equals_transformers_on_embedded_words(build, words):
    """The prefix takes the place of embedded text: feeding text itself must change nothing."""
    torch.manual_seed(0)
    trunk = build().eval()
    context_ids, padding = words
    states = trunk.embed(context_ids)
    hidden = trunk(states[:, :3], context_ids[:, 3:], padding[:, 3:], *words)
    expected = trunk.model(
        input_ids=context_ids, attention_mask=(~padding).long(), decoder_input_ids=words[0]
    )
    torch.testing.assert_close(trunk.logits(hidden), expected.logits)


def test_causal_equals_transformers_without_padding(words):
    torch.manual_seed(0)
    trunk = llama().eval()
    token_ids = words[0]
    empty = token_ids[:, :0]
    hidden = trunk(trunk.embed(token_ids[:, :3]), empty, empty.bool(), token_ids[:, 3:], words[1])
    expected = trunk.model(input_ids=token_ids).logits[:, 3:]
    torch.testing.assert_close(trunk.logits(hidden), expected)


def test_padding_changes_nothing(trunk, batch, words):
    prefix, context_ids, context_padding = batch
    token_ids, token_padding = words
    expected = trunk(*batch, *words)
    more_context = F.pad(context_ids.masked_fill(context_padding, 5), (0, 2), value=6)
    more_words = F.pad(token_ids.masked_fill(token_padding, 7), (0, 2), value=8)
    hidden = trunk(
        prefix,
        more_context,
        F.pad(context_padding, (0, 2), value=True),
        more_words,
        F.pad(token_padding, (0, 2), value=True),
    )[:, :7]
    torch.testing.assert_close(hidden[~token_padding], expected[~token_padding])


def test_words_do_not_see_the_future(trunk, batch, words):
    token_ids, _ = words
    changed = token_ids.clone()
    changed[:, 4:] = 9
    none = torch.zeros_like(token_ids, dtype=torch.bool)
    first, second = (trunk(*batch, ids, none) for ids in (token_ids, changed))
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_cached_generation_equals_uncached(trunk, batch, num_beams):
    cached, uncached = (
        trunk.generate(*batch, max_new_tokens=8, num_beams=num_beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.token_ids, uncached.token_ids)
    torch.testing.assert_close(cached.log_probs, uncached.log_probs)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_equals_single_and_generation_equals_teacher_forcing(trunk, batch, num_beams):
    together = trunk.generate(*batch, max_new_tokens=8, num_beams=num_beams)
    expected = trunk(*batch, together.token_ids, together.padding)
    torch.testing.assert_close(together.hidden, expected)
    for row in range(3):
        one = (tensor[row : row + 1] for tensor in batch)
        alone = trunk.generate(*one, max_new_tokens=8, num_beams=num_beams)
        valid = ~together.padding[row]
        assert torch.equal(alone.token_ids[0], together.token_ids[row, valid])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row, valid])
        torch.testing.assert_close(alone.hidden[0], together.hidden[row, valid])


def test_stream_equals_greedy_generation(trunk, batch):
    for row in range(3):
        one = [tensor[row : row + 1] for tensor in batch]
        ids, hidden, log_probs = zip(*trunk.stream(*one, max_new_tokens=8), strict=True)
        expected = trunk.generate(*one, max_new_tokens=8)
        T = 1 + len(ids)  # without EOS
        assert list(ids) == expected.token_ids[0, 1:T].tolist()
        torch.testing.assert_close(torch.stack(hidden, dim=1), expected.hidden[:, 1:T])
        torch.testing.assert_close(torch.tensor(log_probs), expected.log_probs[0, 1:T])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("phi", {"intermediate_size": 24}),  # a bias
        ("cohere", {"intermediate_size": 24, "logit_scale": 0.25}),
        ("granite", {"intermediate_size": 24, "logits_scaling": 4.0}),
        ("gemma2", {"intermediate_size": 24, "head_dim": 8, "final_logit_softcapping": 0.5}),
    ],
)
def test_logits_are_those_of_the_model_with_all_that_its_head_does(kind, changes, words):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=1, **changes,
    )  # fmt: skip
    trunk = build_trunk(config).eval()
    with torch.no_grad():
        for parameter in trunk.model.lm_head.parameters():
            parameter.normal_()
    token_ids = words[0]
    nothing = torch.zeros(len(token_ids), 0)
    hidden = trunk(nothing[..., None].expand(-1, 0, D), nothing.long(), nothing.bool(), *words)
    expected = trunk.model(input_ids=token_ids).logits
    valid = ~words[1]
    torch.testing.assert_close(trunk.logits(hidden)[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_beams_find_more_probable_sentences_than_greedy(trunk, batch):
    greedy = trunk.generate(*batch, max_new_tokens=6).log_probs.sum()
    beams = trunk.generate(*batch, max_new_tokens=6, num_beams=6, length_penalty=0.0)
    assert beams.log_probs.sum() >= greedy


def test_sampling_depends_on_the_seed_and_temperature_zero_limit_is_greedy(trunk, batch):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return trunk.generate(*batch, max_new_tokens=8, do_sample=True, **options).token_ids

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0, temperature=3.0), sample(1, temperature=3.0))
    greedy = trunk.generate(*batch, max_new_tokens=8).token_ids
    assert torch.equal(sample(0, temperature=1e-4), greedy)
    assert torch.equal(sample(0, top_p=1e-4), greedy)


def test_official_rules_never_repeat_and_reach_the_same_features(trunk, batch):
    for num_beams in (1, 3):
        generation = trunk.generate_official(*batch, max_new_tokens=8, num_beams=num_beams)
        expected = trunk(*batch, generation.token_ids, generation.padding)
        torch.testing.assert_close(generation.hidden, expected)
        assert generation.token_ids.shape[1] <= 9
        last = (tensor[2:] for tensor in batch)
        alone = trunk.generate_official(*last, max_new_tokens=8, num_beams=num_beams)
        assert torch.equal(alone.token_ids[0], generation.token_ids[2, ~generation.padding[2]])
        if num_beams == 1:
            repeated = generation.token_ids[:, 1:] == generation.token_ids[:, :-1]
            assert not repeated[~generation.padding[:, 1:]].any()


def test_generation_ends_with_eos_then_padding(batch):
    """A trunk that says word 7 and then EOS."""
    trunk = t5().eval()
    table = torch.full((V, V), -9.0)
    table[:, trunk.eos_id] = 0.0
    table[trunk.bos_id, 7] = 5.0
    trunk.logits = lambda hidden: hidden  # the features are looked up below
    trunk.decode = lambda prompt, ids, padding=None, cache=None: table[ids]
    generation = trunk._finish(None, torch.tensor([[0, 7, 1, 7], [0, 7, 7, 1]]))
    assert generation.token_ids.tolist() == [[0, 7, 1, 0], [0, 7, 7, 1]]
    assert generation.padding.tolist() == [[False] * 3 + [True], [False] * 4]
    expected = table.log_softmax(-1)
    steps = expected[torch.tensor([0, 7]), torch.tensor([7, 1])]
    torch.testing.assert_close(generation.log_probs[0], torch.tensor([0, *steps, 0]))


@pytest.mark.parametrize(
    ("build", "targets", "num_attentions"),
    [(t5, ("q", "v"), 1 + 2 * 2), (llama, ("q_proj", "v_proj"), 2)],
    ids=["t5", "llama"],
)
def test_lora_starts_as_identity_and_trains_alone(build, targets, num_attentions, batch, words):
    """T5 has one encoder layer and two decoder layers with self- and cross-attention."""
    trunk = build().eval()
    expected = trunk(*batch, *words)
    add_lora(trunk, rank=3, alpha=6, targets=targets)
    torch.testing.assert_close(trunk(*batch, *words), expected)
    trained = [name for name, p in trunk.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trained)
    assert len({name.split(".lora_")[0] for name in trained}) == 2 * num_attentions
    assert trunk.generate(*batch, max_new_tokens=3).token_ids.shape[1] <= 4


def test_flan_t5_xl_has_the_published_sizes():
    """Built without memory: 2.85 G parameters, LoRA on 144 matrices (reference, section 4.1)."""
    with torch.device("meta"):
        trunk = build_t5(32128, 2048, 24, 24, num_heads=32, ff=5120)
        assert sum(p.numel() for p in trunk.parameters()) == 2_849_757_184
        add_lora(trunk, rank=32, alpha=64, targets=("q", "v"))
    trained = [p for p in trunk.parameters() if p.requires_grad]
    assert len(trained) == 2 * 144
    assert sum(p.numel() for p in trained) == 144 * 32 * (2048 + 2048)


def test_every_parameter_gets_a_gradient_from_words_and_points(trunk, batch, words):
    trunk.train()
    hidden = trunk(*batch, *words)
    loss = text_loss(trunk.logits(hidden), words[0], torch.ones(3, dtype=torch.bool), 0, 1)
    (loss + hidden[~words[1]].square().mean()).backward()
    without = [name for name, p in trunk.named_parameters() if p.grad is None]
    assert not without


def test_output_dropout_spares_the_features(batch, words):
    """As in the official code: points read features that only the inner dropout touched."""
    torch.manual_seed(0)
    trunk = build_t5(V, D, 1, 1, num_heads=2, ff=24, dropout=0.5)
    hidden = trunk(*batch, *words)
    assert (hidden == 0).float().mean() < 0.25
    assert not torch.equal(trunk.logits(hidden), trunk.logits(hidden))


def test_logits_stay_float32_under_autocast(trunk, batch, words):
    with torch.autocast("cpu", torch.bfloat16):
        hidden = trunk(*batch, *words)
        logits = trunk.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, trunk.logits(hidden.float()))


def test_vocabulary_head_is_separate_and_starts_at_unit_variance(words):
    torch.manual_seed(0)
    trunk = build_t5(500, 64, 1, 1, num_heads=2, ff=24).eval()
    assert trunk.model.lm_head.weight is not trunk.model.shared.weight
    assert trunk.model.encoder.embed_tokens.weight is trunk.model.shared.weight
    empty = words[0][:, :0]
    hidden = trunk(torch.randn(3, N, 64), empty, empty.bool(), *words)
    assert 0.8 < trunk.logits(hidden).std() < 1.2


@pytest.mark.parametrize("build", [t5, llama])
def test_loading_a_folder_restores_the_trunk(build, tmp_path, batch, words):
    """T5 must come back with its own vocabulary head: the library likes to tie it."""
    torch.manual_seed(0)
    saved = build().eval()
    saved.model.save_pretrained(tmp_path)
    loaded = load_trunk(tmp_path).eval()
    assert type(loaded) is type(saved)
    expected = saved(*batch, *words)
    hidden = loaded(*batch, *words)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(loaded.logits(hidden), saved.logits(expected))


@pytest.mark.parametrize("build", [t5, llama])
def test_a_folder_of_shards_equals_transformers_own_forward(build, tmp_path, words):
    torch.manual_seed(0)
    build().model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    ours, token_ids = load_trunk(tmp_path).eval(), words[0]
    empty = token_ids[:, :0]
    if build is t5:
        theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        expected = theirs(input_ids=token_ids[:, :3], decoder_input_ids=token_ids).logits
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        expected = theirs(input_ids=torch.cat([token_ids[:, :3], token_ids], 1)).logits[:, 3:]
    no_padding = torch.zeros_like(token_ids).bool()
    hidden = ours(ours.embed(token_ids[:, :3]), empty, empty.bool(), token_ids, no_padding)
    torch.testing.assert_close(ours.logits(hidden), expected)


def test_a_folder_that_does_not_fit_is_refused_with_a_list(tmp_path):
    """transformers draws what is missing at random, with a warning among many."""
    t5().model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file) | {"odd": torch.zeros(1)}
    del state["decoder.block.0.layer.2.DenseReluDense.wo.weight"]
    state["encoder.final_layer_norm.weight"] = torch.zeros(3)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_trunk(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(str(tmp_path))
    assert "missing decoder.block.0.layer.2.DenseReluDense.wo.weight" in lines[1]
    assert "unexpected odd" in lines[2]
    assert "encoder.final_layer_norm.weight is (3,), expected (16,)" in lines[3]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable language model"):
        load_trunk(tmp_path)


def test_other_encoder_decoders_are_refused():
    model = t5().model
    model.config.model_type = "bart"
    with pytest.raises(ValueError, match="bart is not of the T5 family"):
        EncoderDecoderLanguage(model)


def test_a_trunk_without_end_token_is_refused():
    model = llama().model
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match="llama model has no end token"):
        DecoderOnlyLanguage(model)


def test_special_tokens_missing_or_several_in_the_config():
    """Chat models list several end tokens; many have no begin or padding token."""
    model = llama().model
    model.config.update({"eos_token_id": [5, 6], "bos_token_id": None, "pad_token_id": None})
    trunk = DecoderOnlyLanguage(model)
    assert (trunk.bos_id, trunk.eos_id, trunk.pad_id) == (5, 5, 5)


def test_generation_settings_of_the_checkpoint_are_ignored(batch):
    """Chat models come with penalties and sampling, which would spoil greedy decoding."""
    torch.manual_seed(0)
    trunk = llama().eval()
    expected = trunk.generate(*batch, max_new_tokens=8).token_ids
    trunk.model.generation_config.repetition_penalty = 50.0
    trunk = DecoderOnlyLanguage(trunk.model)
    assert torch.equal(trunk.generate(*batch, max_new_tokens=8).token_ids, expected)


def test_bfloat16_weights_accept_float32_prefixes(trunk, batch, words):
    trunk.to(torch.bfloat16)
    hidden = trunk(*batch, *words)
    assert trunk.logits(hidden).dtype == torch.float32
    assert trunk.generate(*batch, max_new_tokens=3).log_probs.dtype == torch.float32
    assert list(trunk.stream(*(tensor[:1] for tensor in batch), max_new_tokens=2))
