"""Saved models come back the same; generation agrees with itself and with teacher forcing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_config, run_stage
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from pixelllm.batches import encode_context
from pixelllm.checkpoints import own_tensors
from pixelllm.config import Config, Eva02Config
from pixelllm.contexts import default_contexts
from pixelllm.generation import Caption, pointing_token
from pixelllm.models.build import build_eva02_branch
from pixelllm.pretrained import PUBLISHED, PixelLLM
from pixelllm.processor import Processor
from pixelllm.tokenizer import train_tokenizer, words_of_tokens

BOXES = [(0.0, 0.0, 0.5, 1.0), (0.25, 0.1, 1.0, 0.9)]


def picture(number: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size[::-1])


@pytest.fixture
def generated(tiny_model) -> list[Caption]:
    inputs = tiny_model.processor()([picture(0), picture(1, (60, 40))])
    return tiny_model.generate(**inputs, max_new_tokens=20)


def assert_captions_close(found: list[Caption], expected: list[Caption]) -> None:
    assert [caption.text for caption in found] == [caption.text for caption in expected]
    for first, second in zip(found, expected, strict=True):
        assert first.log_prob == pytest.approx(second.log_prob, abs=1e-4)
        for a, b in zip(first.words, second.words, strict=True):
            assert a.point == pytest.approx(b.point, abs=1e-5)
            assert a.box == pytest.approx(b.box, abs=1e-5)
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


# --- saving and loading ---


def test_a_saved_model_writes_the_same(tiny_model, generated, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    loaded = PixelLLM.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == tiny_model.config
    inputs = Processor.from_pretrained(tmp_path)([picture(0), picture(1, (60, 40))])
    assert loaded.generate(**inputs, max_new_tokens=20) == generated


def test_a_run_has_the_layout_of_the_hub(tiny_run):
    names = {path.name for path in tiny_run.main.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "processor_config.json", "README.md",
    }  # fmt: skip
    assert not [name for name in names if "partial" in name]
    card = (tiny_run.main / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pixelllm") and "included" in card
    assert json.loads((tiny_run.main / "config.json").read_text())["model_type"] == "pixelllm"


def test_saving_keeps_every_tensor_once(tiny_model, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == own_tensors(tiny_model).keys()
    assert "language.model.shared.weight" in stored


# --- published trunks ---


def t5_folder(folder: Path, tokenizer) -> Path:
    """As Flan-T5: its own vocabulary head, more rows than the tokenizer has tokens."""
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer) + 28, d_model=32, d_kv=8, d_ff=48, num_layers=1,
            num_decoder_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0,
        )
    )  # fmt: skip
    model.lm_head = torch.nn.Linear(32, len(tokenizer) + 28, bias=False)
    model.all_tied_weights_keys.pop("lm_head.weight")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama_folder(folder: Path, tokenizer) -> Path:
    """As most chat models: no padding token."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red car and a very small blue ball"] * 3, 120)


def trunk_config(folder: Path, rank: int, **changes) -> Config:
    config = make_tiny_config(include_frozen=False, **changes)
    language = replace(
        config.model.language, trunk=str(folder), lora_rank=rank, lora_alpha=2 * rank, width=9999
    )
    return replace(config, model=replace(config.model, language=language))


def shaken(model: PixelLLM) -> PixelLLM:
    """As after training: LoRA's second factor begins at 0."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("make", [t5_folder, llama_folder])
def test_a_referenced_trunk_is_left_out_but_its_lora_kept(make, tokenizer, tmp_path: Path):
    config = trunk_config(make(tmp_path / "trunk", tokenizer), rank=2)
    model = shaken(PixelLLM(config, tokenizer, PUBLISHED))
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    ours = {name for name in stored if name.startswith("language.")}
    assert ours == {n for n, _ in model.named_parameters() if "lora_" in n}
    loaded = PixelLLM.from_pretrained(tmp_path / "saved")
    inputs = model.processor()(picture(0))
    expected = model.generate(**inputs, max_new_tokens=8)
    assert loaded.generate(**inputs, max_new_tokens=8) == expected
    assert "language: loaded from their source" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.parametrize("make", [t5_folder, llama_folder])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_included_trunk_needs_its_source_no_more(make, rank, tokenizer, tmp_path: Path):
    """Its sizes are not those of the config, which describe a T5 from random weights."""
    trunk = make(tmp_path / "trunk", tokenizer)
    config = replace(trunk_config(trunk, rank), include_frozen=rank > 0)
    model = shaken(PixelLLM(config, tokenizer, PUBLISHED))
    model.save_pretrained(tmp_path / "saved")
    for file in trunk.iterdir():
        file.unlink()
    trunk.rmdir()
    loaded = PixelLLM.from_pretrained(tmp_path / "saved")
    inputs = model.processor()(picture(0))
    expected = model.generate(**inputs, max_new_tokens=8)
    assert loaded.generate(**inputs, max_new_tokens=8) == expected


@pytest.mark.parametrize("make", [t5_folder, llama_folder])
def test_a_published_trunk_learns_through_its_lora_alone(
    make, tokenizer, tiny_tables, tmp_path: Path
):
    """With the trunk's own tokenizer, without a padding token for the Llama, and a resume."""
    if make is llama_folder:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = None
    config = trunk_config(make(tmp_path / "trunk", tokenizer), rank=2)
    tables = [tiny_tables.train], tiny_tables.val
    before = PixelLLM(config, tokenizer, PUBLISHED).state_dict()
    run_stage(config, *tables, tmp_path / "run")
    run_stage(config, *tables, tmp_path / "run", resume=True)
    trained = PixelLLM.from_pretrained(tmp_path / "run")
    assert trained.tokenizer.get_vocab() == tokenizer.get_vocab()
    for name, tensor in trained.state_dict().items():
        if name.startswith("language.") and "lora_" not in name:
            assert torch.equal(tensor, before[name]), name
    assert any(t.any() for n, t in trained.state_dict().items() if "lora_B" in n)
    assert trained.generate(**trained.processor()(picture(0)), max_new_tokens=5)


def official_sam(path: Path, model: PixelLLM) -> None:
    """A .pth in the layout of the official checkpoints, with other weights than the model's."""
    state = {f"image_encoder.{k}": v + 0.01 for k, v in model.sam.encoder.state_dict().items()}
    state |= {f"prompt_encoder.{k}": v + 0.01 for k, v in model.prompt_encoder.state_dict().items()}
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 16)}, path)


def test_published_sam_weights_are_loaded_and_referenced(tokenizer, tmp_path: Path):
    config = make_tiny_config(include_frozen=False)
    sam = replace(config.model.sam, conv_stem=False)
    config = replace(config, model=replace(config.model, sam=sam))
    language = replace(config.model.language, vocab_size=len(tokenizer))
    config = replace(config, model=replace(config.model, language=language))
    first = PixelLLM(config, tokenizer)
    official_sam(tmp_path / "sam.pth", first)
    sam = replace(config.model.sam, weights=str(tmp_path / "sam.pth"))
    config = replace(config, model=replace(config.model, sam=sam))
    model = PixelLLM(config, tokenizer, PUBLISHED).eval()
    for ours, theirs in ((model.sam, first.sam), (model.prompt_encoder, first.prompt_encoder)):
        state = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, state[name] + 0.01), name
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {n.split(".")[0] for n in stored} == {
        "eva02", "extractor", "projection", "language", "point_head",
    }  # fmt: skip
    inputs = model.processor()(picture(0))
    loaded = PixelLLM.from_pretrained(tmp_path / "saved")
    assert loaded.generate(**inputs) == model.generate(**inputs)
    (tmp_path / "sam.pth").unlink()
    with pytest.raises(FileNotFoundError, match="sam.pth"):
        PixelLLM.from_pretrained(tmp_path / "saved")


def test_sam_weights_of_another_size_are_named(tokenizer, tmp_path: Path):
    config = make_tiny_config()
    official_sam(tmp_path / "sam.pth", PixelLLM(config, tokenizer))
    sam = replace(config.model.sam, weights=str(tmp_path / "sam.pth"), depth=3)
    config = replace(config, model=replace(config.model, sam=sam))
    with pytest.raises(ValueError, match=r"sam.pth: .*\n.*missing .*blocks.2"):
        PixelLLM(config, tokenizer, PUBLISHED)


def test_eva02_weights_are_a_timm_name_of_the_same_sizes():
    sizes = {"patch_size": 14, "width": 192, "depth": 12, "num_heads": 3}
    name = "eva02_tiny_patch14_224.mim_in22k"
    branch = build_eva02_branch(Eva02Config(**sizes, weights=name), 42)
    assert branch.encoder.out_channels == 192
    with pytest.raises(ValueError, match="depth is 12, not 6"):
        build_eva02_branch(Eva02Config(**{**sizes, "depth": 6}, weights=name), 42)
    with pytest.raises(
        ValueError, match="'eva02_tiny_patch14' is neither .*; nearest: eva02_tiny_"
    ):
        build_eva02_branch(Eva02Config(**sizes, weights="eva02_tiny_patch14"), 42)


# --- generation ---


def test_a_batch_equals_single_images(tiny_model):
    """Images of other shapes, contexts of other lengths, captions of other lengths."""
    processor = tiny_model.processor()
    images = [picture(0), picture(1, (60, 40)), picture(2, (30, 90))]
    contexts = ["", "a red car and a blue", "red"]
    together = tiny_model.generate(**processor(images, contexts=contexts), max_new_tokens=20)
    alone = [
        tiny_model.generate(**processor(image, contexts=[context]), max_new_tokens=20)[0]
        for image, context in zip(images, contexts, strict=True)
    ]
    assert_captions_close(together, alone)


def test_several_boxes_of_an_image_equal_each_alone(tiny_model):
    processor = tiny_model.processor()
    images = [picture(0), picture(1, (60, 40))]
    together = tiny_model.generate(**processor(images, [BOXES, BOXES[::-1]]), max_new_tokens=12)
    alone = [
        tiny_model.generate(**processor(image, [box]), max_new_tokens=12)[0]
        for image, boxes in zip(images, (BOXES, BOXES[::-1]), strict=True)
        for box in boxes
    ]
    assert len(together) == 4
    assert_captions_close(together, alone)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_cached_equals_uncached(tiny_model, num_beams):
    inputs = tiny_model.processor()([picture(0), picture(1, (60, 40))])
    captions = [
        tiny_model.generate(**inputs, max_new_tokens=12, num_beams=num_beams, use_cache=cached)
        for cached in (True, False)
    ]
    assert_captions_close(*captions)


def test_more_beams_never_find_a_less_likely_caption(tiny_model):
    """With scores of whole captions, not divided by their length, and no pruning."""
    inputs = tiny_model.processor()(picture(0))
    settings = {"max_new_tokens": 6, "length_penalty": 0.0}
    greedy = tiny_model.generate(**inputs, max_new_tokens=6)[0]
    wide = tiny_model.generate(**inputs, num_beams=8, **settings)[0]
    assert wide.log_prob >= greedy.log_prob - 1e-5


def test_official_rules_are_an_option(tiny_model):
    inputs = tiny_model.processor()([picture(0), picture(1, (60, 40))])
    captions = tiny_model.generate(**inputs, max_new_tokens=12, official_rules=True)
    for caption in captions:  # never the same token twice in a row
        ids = tiny_model.tokenizer(caption.text).input_ids
        assert all(a != b for a, b in zip(ids, ids[1:], strict=False))


def forced_outputs(model: PixelLLM, inputs: dict, text: str):
    """Teacher-forced corners float[T, 2, 2] and log-probabilities float[T] of a caption."""
    words = model.tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([[model.language.bos_id, *words, model.language.eos_id]])
    padding = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        prefix = model.prefix(
            model.encode(inputs["images"], inputs["sizes"], {}), inputs["sizes"], inputs["boxes"]
        )
        context = inputs["context_ids"], inputs["context_padding"]
        hidden = model.language(prefix.flatten(0, 1), *context, ids, padding)
        scores = model.language.logits(hidden).log_softmax(-1)[0]
        log_probs = scores[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        return ids[0].tolist(), model.point_head(hidden)[0], torch.cat([torch.zeros(1), log_probs])


def test_points_and_probabilities_are_those_of_teacher_forcing(tiny_model, tiny_scenes):
    image = sorted((tiny_scenes / "val").iterdir())[0]
    inputs = tiny_model.processor()(image)
    caption = tiny_model.generate(**inputs)[0]
    ids, corners, log_probs = forced_outputs(tiny_model, inputs, caption.text)
    words = words_of_tokens(tiny_model.tokenizer, ids)
    assert [word.text for word in caption.words] == [word.text for word in words]
    for placed, word in zip(caption.words, words, strict=True):
        token = corners[pointing_token(word, ids, tiny_model.tokenizer)].clamp(0, 1)
        x, y = token.mean(0).tolist()
        assert placed.point == pytest.approx((x, y), abs=1e-5)
        assert placed.log_prob == pytest.approx(float(log_probs[word.tokens].sum()), abs=1e-4)
    x0, y0, x1, y1 = np.array([word.box for word in caption.words]).T
    assert (0 <= x0).all() and (x0 <= x1).all() and (x1 <= 1).all() and (y0 <= y1).all()


def test_streamed_words_are_those_of_greedy_generation(tiny_model):
    for number, size in ((0, (48, 64)), (3, (60, 40))):
        inputs = tiny_model.processor()(picture(number, size))
        caption = tiny_model.generate(**inputs, max_new_tokens=20)[0]
        words = list(tiny_model.stream(**inputs, max_new_tokens=20))
        assert len(words) == len(caption.words) > 0
        for (text, point, log_prob), word in zip(words, caption.words, strict=True):
            assert text == word.text
            assert point == pytest.approx(word.point, abs=1e-5)
            assert log_prob == pytest.approx(word.log_prob, abs=1e-4)


def test_words_are_streamed_before_the_caption_ends(tiny_model, monkeypatch):
    steps = []
    stream = tiny_model.language.stream

    def counted(*arguments):
        for token in stream(*arguments):
            steps.append(token)
            yield token

    monkeypatch.setattr(tiny_model.language, "stream", counted)
    inputs = tiny_model.processor()(picture(0))
    words = tiny_model.stream(**inputs, max_new_tokens=20)
    next(words)
    first = len(steps)
    list(words)
    assert first < len(steps)


@pytest.mark.parametrize("length", [0, -1])
def test_captions_have_a_word_or_more(tiny_model, length):
    inputs = tiny_model.processor()(picture(0))
    with pytest.raises(ValueError, match=f"max_new_tokens {length}: expected 1 or more"):
        tiny_model.generate(**inputs, max_new_tokens=length)
    with pytest.raises(ValueError, match=f"max_new_tokens {length}: expected 1 or more"):
        next(tiny_model.stream(**inputs, max_new_tokens=length))


def test_the_official_rules_do_not_sample(tiny_model):
    inputs = tiny_model.processor()(picture(0))
    with pytest.raises(ValueError, match="do_sample, top_p: the official rules are greedy or beam"):
        tiny_model.generate(**inputs, official_rules=True, do_sample=True, top_p=0.5)


def test_stream_takes_one_row(tiny_model):
    inputs = tiny_model.processor()([picture(0), picture(1)])
    with pytest.raises(ValueError, match="one image with one box"):
        next(tiny_model.stream(**inputs))


def test_a_caption_without_words(tiny_model, monkeypatch):
    """A model that ends at once gives an empty caption, not an error."""
    head = tiny_model.language.model.lm_head.weight
    before = head.detach().clone()
    inputs = tiny_model.processor()(picture(0))
    with torch.no_grad():
        monkeypatch.setattr(
            tiny_model.language,
            "logits",
            lambda hidden: (
                torch.nn.functional.one_hot(
                    torch.ones(hidden.shape[:-1], dtype=torch.long), before.shape[0]
                ).float()
                * 50
            ),
        )
        assert list(tiny_model.stream(**inputs)) == []


# --- the processor ---


def test_the_processor_prepares_rows(tiny_model):
    processor = tiny_model.processor()
    inputs = processor([picture(0), picture(1, (60, 40))], [BOXES, BOXES])
    assert inputs["images"].shape == (2, 3, 48, 48) and inputs["images"].dtype == torch.uint8
    assert inputs["sizes"].tolist() == [[36, 48], [48, 32]]
    torch.testing.assert_close(inputs["boxes"], torch.tensor([BOXES, BOXES]))
    region = default_contexts(tiny_model.config)[1]
    ids, _ = encode_context([region], tiny_model.tokenizer, 8)
    assert torch.equal(inputs["context_ids"], ids.expand(4, -1))
    whole = processor(picture(0))
    assert whole["boxes"].tolist() == [[[0, 0, 1, 1]]] and whole["context_ids"].shape == (1, 0)


@pytest.mark.parametrize(
    ("boxes", "contexts", "message"),
    [
        ([(0.6, 0.1, 0.2, 0.9)], None, r"box \(0.6, 0.1, 0.2, 0.9\): expected x0 < x1"),
        ([(0.1, 0.1, 0.2, 1.2)], None, r"in \[0, 1\] of the image"),
        ([(10, 10, 40, 30)], None, "divide pixels by"),
        ([(0.1, 0.1, float("nan"), 0.2)], None, "expected x0 < x1"),
        ([(0.1, 0.2, 0.3)], None, r"box \(0.1, 0.2, 0.3\)"),
        ([None, None], None, "2 entries of boxes for 1 images"),
        (None, ["a", "b"], "2 contexts for 1 images with 1 prompts each"),
        ([[]], None, "at least one box"),
    ],
)
def test_bad_prompts_are_named(tiny_model, boxes, contexts, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.processor()(picture(0), boxes, contexts)


def test_images_need_the_same_number_of_boxes(tiny_model):
    with pytest.raises(ValueError, match=r"same number of boxes, not \[1, 2\]"):
        tiny_model.processor()([picture(0)] * 2, [BOXES, BOXES[0]])


def test_boxes_may_be_arrays(tiny_model):
    processor = tiny_model.processor()
    expected = processor(picture(0), [BOXES[0]])["boxes"]
    found = processor(picture(0), [np.array(BOXES[0])])["boxes"]
    torch.testing.assert_close(found, expected)


def test_no_image_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="no image"):
        tiny_model.processor()([])


def test_a_folder_without_processor_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="processor_config.json is missing"):
        Processor.from_pretrained(tmp_path)
