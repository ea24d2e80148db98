"""PerceptionGPT as a product: trained from tables, saved, loaded, and asked about images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Tables, run_stage
from PIL import Image
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import eval as command
import train
from data import coco, flickr30k, llava, shikra
from pixelllm import cli, templates
from pixelllm.asked_images import roomy_box
from pixelllm.box_text import spell_box
from pixelllm.commands.ask import usual_task
from pixelllm.config import Config, LanguageConfig, Source, TrainConfig
from pixelllm.conversations import Conversation
from pixelllm.evaluation.answers import normalised, score_phrases
from pixelllm.evaluation.meteor import unavailable_reason
from pixelllm.images import open_image
from pixelllm.locating import Location
from pixelllm.marked_text import VIS, Mention
from pixelllm.markers import add_markers
from pixelllm.mask_codes import decode_mask, encode_mask
from pixelllm.models.answering import Answers, sampler
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import (
    ClipConfig,
    ClipPretraining,
    PerceptionConfig,
    PerceptionLoss,
    PerceptionModelConfig,
    PerceptionStart,
    VisConfig,
)
from pixelllm.perception_recipes import (
    ASKED,
    DESCRIBED,
    GROUNDED,
    LOCATED,
    POINTED,
    SEGMENTED,
    perceptiongpt_7b,
)
from pixelllm.records import Phrase, Piece
from pixelllm.tables import Table
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training import perceiving
from pixelllm.training.optimizer import freeze
from pixelllm.written import Answer, read_answer

CLIP = ClipConfig(
    image_size=32, patch_size=16, width=32, depth=3, num_heads=2, ff_width=32, fine_patch=8,
    weights=None,
)  # fmt: skip
LANGUAGE = LanguageConfig(
    trunk=None, architecture="llama", lora_rank=0, width=32, num_decoder_layers=2, num_heads=2,
    ff_width=48, dropout=0.0, vocab_size=400,
)  # fmt: skip
CONFIG = PerceptionConfig(
    "tiny-perception",
    PerceptionModelConfig(
        frame=32,
        clip=CLIP,
        vis=VisConfig(box_hidden=16, mask_size=32, mask_bottleneck=8, num_heads=2, ff_width=16),
        language=LANGUAGE,
    ),
    sources=(LOCATED, SEGMENTED, DESCRIBED, GROUNDED, ASKED),
    train=TrainConfig(
        steps=6, batch_size=4, lr=1e-2, warmup=0, frozen=(), eval_batches=1, log_every=1
    ),
    max_tokens=512,
    max_new_tokens=20,
    include_frozen=True,
)


@pytest.fixture(scope="module")
def perception_tables(tiny_scenes: Path, tiny_tables: Tables, tmp_path_factory) -> list[Path]:
    """Training tables of all four tasks."""
    folder, annotations = tmp_path_factory.mktemp("tables"), tiny_scenes / "annotations"
    archive = annotations / "flickr30k/annotations.zip"
    split = annotations / "flickr30k/train.txt"
    flickr30k.convert(archive, tiny_scenes / "train", folder / "grounded", split)
    llava.convert([annotations / "llava_train.json"], tiny_scenes, folder / "questions")
    made = [folder / "grounded", folder / "questions"]
    return [tiny_tables.train_referring, tiny_tables.train_described, *made]


@pytest.fixture(scope="module")
def run(perception_tables: list[Path], tmp_path_factory) -> Path:
    """A finished run of a few steps."""
    out = tmp_path_factory.mktemp("runs") / "perception"
    return run_stage(CONFIG, perception_tables, perception_tables, out)


@pytest.fixture(scope="module")
def model(run: Path) -> PerceptionGPT:
    return PerceptionGPT.from_pretrained(run)


@pytest.fixture(scope="module")
def images(perception_tables: list[Path]) -> list[Image.Image]:
    """One of them is wide, the other high."""
    table = Table(perception_tables[0])
    first, second = (open_image(table[n].path) for n in range(2))
    width, height = first.size
    return [first.crop((0, 0, width, height // 2)), second.crop((0, 0, width // 2, height))]


def test_every_source_is_drawn_and_batches_depend_on_their_number_alone(perception_tables):
    tables = [Table(path) for path in perception_tables]
    longer = replace(CONFIG, train=replace(CONFIG.train, steps=20))
    one, other = (
        perceiving.build_stage(longer, tables, tables, torch.device("cpu")).batches
        for _ in range(2)
    )
    tasks = set()
    for number in (13, *range(20)):
        mine, again = one[number], other[number]
        tasks |= {name.split("/")[0].split("+")[0] for name in mine.ids}
        assert mine.ids == again.ids and torch.equal(mine.images, again.images)
        assert torch.equal(mine.chats.tokens.token_ids, again.chats.tokens.token_ids)
        assert len(mine.images) == len(mine.ids) == len(mine) == 4
    assert tasks == {"referring", "region", "grounded", "question"}


def test_validation_tells_tasks_and_terms_apart(perception_tables):
    tables = [Table(path) for path in perception_tables]
    stage = perceiving.build_stage(CONFIG, tables, tables[:2], torch.device("cpu"))
    with torch.no_grad():
        scores = stage.validate()
    boxes = {f"referring_{name}" for name in ("text", "l1", "giou", "bce", "dice")}
    assert set(scores) == {"loss", "region_text", *boxes}
    assert next(iter(scores)) == "loss"


def test_a_saved_model_answers_as_it_did(run, model, images, tmp_path):
    model.save_pretrained(tmp_path)
    again = PerceptionGPT.from_pretrained(tmp_path)
    texts = [["the red car", "a tree"], ["the boat"]]
    assert again.locate(images, texts, True) == model.locate(images, texts, True)
    assert again.config == model.config
    assert json.loads((run / "config.json").read_text())["kind"] == "PerceptionConfig"


def test_files_are_opened_upright(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.effect_noise((40, 24), 60).convert("RGB")
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    asked = [[model.question("grounded")]]
    assert model.ask([tmp_path / "turned.png"], asked) == model.ask([upright], asked)


def test_expressions_are_located_each_on_its_own(model, images):
    """Catches padding that counts, rows of another image, and masks of another size."""
    texts = [["the red car left of the little tree", "a tree"], ["the boat"]]
    together = model.locate(images, texts, with_masks=True)
    assert [len(found) for found in together] == [2, 1]
    for image, of_image, found in zip(images, texts, together, strict=True):
        for text, location in zip(of_image, found, strict=True):
            (alone,) = model.locate([image], [[text]], with_masks=True)[0]
            assert location.box == pytest.approx(alone.box, abs=1e-5)
            assert location.score == pytest.approx(alone.score, rel=1e-4)
            x0, y0, x1, y1 = location.box
            assert 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 and 0 < location.score < 1
            assert decode_mask(location.mask).shape == (image.height, image.width)
    assert model.locate(images[:1], texts[:1])[0][0].mask is None


def test_what_is_found_is_described_by_itself(model, images):
    texts = [["the red car", "a tree"], ["a moon"]]
    plain, told = model.locate(images, texts), model.locate(images, texts, with_captions=True)
    boxes = [[found.box for found in of_image] for of_image in plain]
    expected = model.describe_boxes(images, boxes)
    for of_image, others, captions in zip(plain, told, expected, strict=True):
        assert [found.box for found in of_image] == [found.box for found in others]
        assert [found.caption for found in others] == [caption.text for caption in captions]
    assert plain[0][0].caption is None and "caption" not in plain[0][0].to_json()
    assert roomy_box((1.0, 0.2, 1.0, 0.2)) == pytest.approx((0.999, 0.2, 1.0, 0.201))


def test_a_source_takes_part_in_the_losses_it_has_a_weight_for(perception_tables):
    """Masks that no loss compares are not decoded either."""
    tables = [Table(perception_tables[0])]
    boxes = Source("referring", contexts=templates.LOCATE)
    masks = replace(boxes, point_weight=0.0, mask_weight=2.0)
    terms, found = {}, {}
    for name, source in (
        ("boxes", boxes),
        ("masks", masks),
        ("both", replace(boxes, mask_weight=1)),
    ):
        loss = PerceptionLoss(l1=10.0 if name == "both" else 1.0)
        config = replace(CONFIG, sources=(source,), loss=loss)
        torch.manual_seed(0)
        stage = perceiving.build_stage(config, tables, tables, torch.device("cpu"))
        found[name] = stage.batches[0].chats.objects.has_mask.any()
        terms[name] = stage.loss(stage.batches[0])
    assert (bool(found["boxes"]), bool(found["masks"])) == (False, True)
    assert terms["boxes"].keys() == {"text", "l1", "giou"}
    assert terms["masks"].keys() == {"text", "bce", "dice"}
    assert torch.allclose(terms["masks"]["dice"], 2 * terms["both"]["dice"])
    assert torch.allclose(10 * terms["boxes"]["l1"], terms["both"]["l1"])


@pytest.mark.parametrize("form", ["numbers", "tokens"])
def test_boxes_in_words_are_written_and_read(form, perception_tables, images, tmp_path):
    """Shikra's and Kosmos-2's way, through the same data, training and commands."""
    vis = replace(CONFIG.model.vis, form=form)
    config = replace(CONFIG, model=replace(CONFIG.model, vis=vis))
    out = run_stage(config, perception_tables, perception_tables, tmp_path / "run")
    last = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][-2]
    assert last["loss_text"] > 0 == last.get("loss_l1", 0)
    model = PerceptionGPT.from_pretrained(out)
    text = f"Answer:<obj_vis_s>{spell_box((0.25, 0.25, 0.5, 0.75), form)}<obj_vis_e>.</s>"
    ids = torch.tensor([model.tokenizer(text).input_ids])
    assert model.tokenizer.unk_token_id not in ids and ids.max() < model.language.vocab_size
    nothing = torch.zeros(0)
    written = Answers(ids, ids < 0, -torch.ones(ids.shape), nothing, nothing, nothing, nothing)
    answer = read_answer(written, 0, (50, 100), model.tokenizer, form)
    (found,) = answer.objects
    assert answer.text == "Answer:."
    assert torch.allclose(torch.tensor(found.box), torch.tensor([0.25, 0.0, 0.5, 1.0]), atol=0.04)
    assert model.describe_boxes(images, [[(0.1, 0.1, 0.6, 0.6)], [(0.0, 0.0, 1.0, 1.0)]])
    assert model.locate(images[:1], [["a car"]])[0][0].score == 0.0  # it writes no box as yet
    with pytest.raises(ValueError, match=f"boxes as {form} has no masks"):
        model.locate(images[:1], [["a car"]], with_masks=True)


def test_the_model_card_shows_code_that_runs(run, images, tmp_path, monkeypatch, capsys):
    card = (run / "README.md").read_text()
    monkeypatch.chdir(run)
    images[0].save(run / "image.jpg")
    exec(compile(card.split("```python")[1].split("```")[0], "model card", "exec"), {})
    assert capsys.readouterr().out


def test_boxes_are_described_and_questions_answered_in_the_order_given(model, images):
    boxes = [[(0.1, 0.1, 0.5, 0.9)], [(0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 1.0, 1.0)]]
    captions = model.describe_boxes(images, boxes)
    assert [len(found) for found in captions] == [1, 2]
    (alone,) = model.describe_boxes(images[1:], [boxes[1][1:]])[0]
    assert captions[1][1].text == alone.text
    assert captions[1][1].log_prob == pytest.approx(alone.log_prob, abs=1e-3) and alone.words == ()
    asked = [[model.question("question", "How many cars?")], [model.question("grounded")]]
    answers = model.ask(images, asked)
    assert [len(found) for found in answers] == [1, 1] and "<" not in answers[0][0].text


def test_a_model_that_reads_masks_is_given_them(model, run, images, monkeypatch):
    """Before, it was told of a box through an encoder that its training never used."""
    config = replace(model.config.model, vis=replace(model.config.model.vis, read="mask"))
    reader = PerceptionGPT.from_pretrained(run)
    reader.config = replace(model.config, model=config)
    box, size = (0.25, 0.25, 0.75, 0.75), (images[0].height, images[0].width)
    halves = np.zeros((2, *size), bool)
    halves[0, : size[0] // 2] = halves[1, size[0] // 2 :] = True
    masks = [encode_mask(half) for half in halves]
    read = []
    reader.mask_encoder.register_forward_hook(lambda _, given, __: read.append(given[0]))
    reader.describe_boxes(images[:1], [[box, box]], masks=[masks])
    assert len(read) == 1 and len(read[0]) == 2 and not torch.equal(*read[0])
    with pytest.raises(ValueError, match="this model reads masks: every box needs one"):
        reader.describe_boxes(images[:1], [[box]])
    with pytest.raises(ValueError, match=r"mask of .* for an image of"):
        model.describe_boxes(images[1:], [[box]], masks=[masks[:1]])


def test_sampled_answers_depend_on_the_seed(model, images):
    asked = [[model.question("conversation", "Why?")]]

    def answer(seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        choose = sampler(temperature=3.0, generator=generator)
        return model.ask(images[:1], asked, choose=choose)[0][0].text

    answers = [answer(seed) for seed in range(4)]
    assert answers[0] == answer(0) and len(set(answers)) > 1


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda m, images: m.locate(images[:1], [[" "]]), "empty expression; say what"),
        (lambda m, images: m.locate(images[:1], [["a"], ["b"]]), "2 lists of expressions for 1"),
        (lambda m, images: m.locate(images[:1], ["a"]), "image 0: expected a list of expressions"),
        (lambda m, images: m.ask([], []), "0 lists of questions for 0 images"),
        (lambda m, images: m.question("question", ""), "empty question"),
        (lambda m, images: m.question("regio"), "no task 'regio'; there are: referring, region"),
        (lambda m, images: m.describe_boxes(images[:1], [[(1, 2, 3, 4)]]), "divide pixels by"),
        (lambda m, images: m.describe_boxes(images[:1], [[(0, 0, 1)]]), "expected x0 < x1"),
    ],
)
def test_what_cannot_be_asked_is_named(ask, reason, model, images):
    with pytest.raises(ValueError, match=reason):
        ask(model, images)


def test_answers_carry_the_objects_they_mention(model, images, monkeypatch):
    """With a head that writes `<vis>` alone: every one has its box, mask and probability."""
    num_tokens = model.language.vocab_size

    def always_vis(states: torch.Tensor) -> torch.Tensor:
        logits = states.new_zeros(*states.shape[:-1], num_tokens)
        logits[..., model.markers.vis] = 100.0
        return logits

    monkeypatch.setattr(model.language, "logits", always_vis)
    (answer,) = model.ask(images[:1], [[model.question("grounded")]])[0]
    assert len(answer.objects) == CONFIG.max_new_tokens and answer.text == ""
    assert all(found.score > 0.99 for found in answer.objects) and answer.mentions == ()
    size = (images[0].height, images[0].width)
    assert all(tuple(found.mask["size"]) == size for found in answer.objects)
    assert len(answer.to_json()["objects"]) == len(answer.objects)


def test_questions_in_turn_are_read_after_the_answers_before_them(model, images, monkeypatch):
    """Against the whole conversation asked at once; images may have fewer rounds."""
    asked: list[list[Conversation]] = []

    def answer_with_object(images, given, *options):
        asked.extend(given)
        box = Location((0.1, 0.2, 0.3, 0.4), 0.9)
        marked = f"a car{templates.ANSWER.removeprefix('Answer:')}"
        return [[Answer("a car.", (box,), (), -1.0, marked)] for _ in given]

    words = [model.question("question", text) for text in ("What is it?", "Where?", "Why?")]
    monkeypatch.setattr(model, "_write", answer_with_object)
    answers = model.ask(images, [words, words[:1]], in_turn=True)
    assert [len(of_image) for of_image in answers] == [3, 1]
    (last,), said = asked[-1], f"a car{templates.ANSWER.removeprefix('Answer:')}"
    bare = [text.replace("<image>", "").strip() for text in words]
    assert last.rounds == ((words[0], said), (bare[1], said), (bare[2], ""))
    assert [found.box for found in last.objects] == [(0.1, 0.2, 0.3, 0.4)] * 2


def test_what_was_said_before_changes_answers(model, images):
    one, two = (model.question("question", text) for text in ("What is it?", "Where is it?"))
    (first, second) = model.ask(images[:1], [[one, two]], in_turn=True)[0]
    (alone, other) = model.ask(images[:1], [[one, two]])[0]
    assert first.text == alone.text and abs(first.log_prob - alone.log_prob) < 1e-4
    assert abs(second.log_prob - other.log_prob) > 1e-3
    long = [one] * 60
    with pytest.raises(ValueError, match="512 tokens do not hold"):
        model.ask(images[:1], [long], in_turn=True, with_masks=False)


def test_rounds_are_trained_in_the_order_of_the_table(perception_tables):
    """Catches conversations whose questions are shuffled, or stand behind the image each."""
    rounds = replace(ASKED, in_turn=True, contexts=templates.CONVERSE[:1])
    config, table = replace(CONFIG, sources=(rounds,)), Table(perception_tables[3])
    stage = perceiving.build_stage(config, [table], [table], torch.device("cpu"))
    tokens, tokenizer = stage.batches[0].chats.tokens, stage.model.tokenizer
    texts = [tokenizer.decode(row).replace(" ", "") for row in tokens.token_ids]
    told = {p.id: (r, p) for r in map(table.__getitem__, range(len(table))) for p in r.phrases}
    for text, name in zip(texts, stage.batches[0].ids, strict=True):
        said = [p for p in told[name][0].phrases if p.task == "question"]
        places = [text.find(p.context.replace(" ", "")) for p in said[: ASKED.phrases_per_image]]
        assert places == sorted(places) and min(places) >= 0
    assert tokens.branches.max() <= 1


def test_the_losses_of_the_release_are_options(perception_tables):
    tables = [Table(path) for path in perception_tables]
    found = {}
    for name in ("", "centre_reading", "whole_batch_dice"):
        loss = replace(CONFIG.loss, **({name: True} if name else {}))
        config = replace(CONFIG, loss=loss, sources=(SEGMENTED,))
        torch.manual_seed(0)
        stage = perceiving.build_stage(config, tables, tables, torch.device("cpu"))
        terms = stage.loss(stage.batches[0])
        found[name] = {term: value.item() for term, value in terms.items()}
    own, centre, whole = found.values()
    assert own.pop("giou") != centre.pop("giou") and own == centre
    assert own.pop("dice") != whole.pop("dice") and whole.pop("giou") and own == whole


def test_pixelllm_takes_no_rounds():
    with pytest.raises(ValueError, match="question.*in_turn"):
        Config("talk", sources=(Source("question", in_turn=True),))


def test_a_named_trunk_is_not_saved_but_its_embeddings_are(perception_tables, images, tmp_path):
    """Catches markers that come back untrained, because they lie in a published trunk."""
    trunk = tmp_path / "trunk"
    tokenizer = train_tokenizer(["a red car"], 300)
    tokenizer.save_pretrained(trunk)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).save_pretrained(trunk)
    language = LanguageConfig(trunk=str(trunk), lora_rank=2, lora_alpha=4)
    config = replace(
        CONFIG, model=replace(CONFIG.model, language=language), include_frozen=False,
        train=replace(CONFIG.train, steps=3), sources=CONFIG.sources[:1],
    )  # fmt: skip
    out = run_stage(config, perception_tables[:1], perception_tables[0], tmp_path / "run")
    with safe_open(out / "model.safetensors", "pt") as stored:
        saved = {name for name in stored.keys() if name.startswith("language.")}
        embeddings = stored.get_tensor("language.model.model.embed_tokens.weight")
    assert all("lora_" in n or n.endswith(("embed_tokens.weight", "lm_head.weight")) for n in saved)
    assert any("lm_head" in name for name in saved) and any("lora_" in name for name in saved)
    start, model = (PerceptionGPT.from_pretrained(path) for path in (out / "start", out))
    assert torch.equal(model.language.model.get_input_embeddings().weight, embeddings)
    assert not torch.equal(start.language.model.get_input_embeddings().weight, embeddings)
    assert model.locate(images, [["a car"], ["a tree"]])[0][0].score > 0


def test_a_pretrained_clip_is_where_training_starts(perception_tables, tiny_tables, tmp_path):
    stage = ClipPretraining("tiny-clip", 32, CLIP, train=replace(CONFIG.train, steps=2))
    tables = (tiny_tables.train_regions, tiny_tables.val_regions)
    eyes = run_stage(stage, tables[:1], tables[1], tmp_path / "clip")
    config = replace(CONFIG, start=PerceptionStart(clip=str(eyes)))
    tokenizer = train_tokenizer(["a"], 300)
    add_markers(tokenizer)
    language = replace(LANGUAGE, vocab_size=len(tokenizer))
    config = replace(config, model=replace(config.model, language=language))
    weight = perceiving.build_model(config, tokenizer).clip.vit.embeddings.patch_embedding.weight
    with safe_open(eyes / "model.safetensors", "pt") as stored:
        (name,) = (n for n in stored.keys() if n.endswith("patch_embedding.weight"))
        assert torch.equal(weight, stored.get_tensor(name))
    other = replace(config, model=replace(config.model, clip=replace(CLIP, ff_width=64)))
    with pytest.raises(ValueError, match="ff_width is 32 there, 64 here"):
        perceiving.build_model(other, tokenizer)


def test_the_trunk_is_held_in_fewer_bits(run, images, tmp_path):
    """What is computed of boxes stays float32, and answers stay nearly as probable."""
    texts = [["the red car"], ["a tree"]]
    exact = [one.score for (one,) in PerceptionGPT.from_pretrained(run).locate(images, texts)]
    half = PerceptionGPT.from_pretrained(run, torch.bfloat16)
    assert half.language.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.box_decoder.parameters()} == {torch.float32}
    assert [one.score for (one,) in half.locate(images, texts)] == pytest.approx(exact, rel=0.05)
    assert half.ask(images, [["<image> What?"]] * 2)
    pytest.importorskip("torchao")
    small = PerceptionGPT.from_pretrained(run, int8=True)
    scores = [one.score for (one,) in small.locate(images, texts)]
    assert scores == pytest.approx(exact, rel=0.05) and scores != exact
    with pytest.raises(ValueError, match="held in 8 bits; load the model without int8 to save"):
        small.save_pretrained(tmp_path)


def test_a_run_goes_on_from_another(run, perception_tables, tmp_path):
    config = replace(CONFIG, start=PerceptionStart(run=str(run)))
    tables = [Table(path) for path in perception_tables]
    stage = perceiving.build_stage(config, tables, tables, torch.device("cpu"))
    given, trained = stage.model.state_dict(), PerceptionGPT.from_pretrained(run).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in given.items())


def test_features_are_not_cached(tmp_path):
    options = ["--data", "a", "--val", "b", "--out", str(tmp_path), "--cache-features", "c"]
    with pytest.raises(SystemExit, match="--cache-features: scenes-perceptiongpt"):
        train.main(["scenes-perceptiongpt", *options])


def test_a_trunk_is_worded_as_the_recipe_has_it(model):
    assert "red car" in model.question("referring", "red car")
    assert model.question("region").count(VIS) == 1
    assert model.question("referring", "x") == templates.LOCATE[0].replace("{}", "x")


def test_runs_are_told_apart_by_their_config(run, perception_tables, tmp_path, capsys):
    """The commands of PixelLLM take a PerceptionGPT, and its own refuse what it cannot do."""
    image = Table(perception_tables[0])[0].path
    model = ["--model", str(run), "--device", "cpu"]
    picture = tmp_path / "found.png"
    cli.main(["locate", image, "the red car", "a tree", "--mask", "--json", "--png", str(picture),
              *model])  # fmt: skip
    located = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found["text"] for found in located] == ["the red car", "a tree"]
    assert all(found["mask"]["size"] == found["size_hw"] for found in located)
    assert picture.stat().st_size
    box = ["--box", "0.1", "0.2", "0.5", "0.9"]
    cli.main(["locate", image, "the red car", "--caption", *model])
    assert "  seen: " in capsys.readouterr().out
    cli.main(["caption", image, *box, "--json", *model])
    captioned = json.loads(capsys.readouterr().out)
    assert captioned["prompt_box"] == [0.1, 0.2, 0.5, 0.9] and captioned["words"] == []
    cli.main(["caption", image, "--json", *model])
    captioned = json.loads(capsys.readouterr().out)
    assert captioned["caption"] and "prompt_box" not in captioned
    cli.main(["ask", image, "How many cars?", "Why?", "--json", *model])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found["question"] for found in answers] == ["How many cars?", "Why?"]
    cli.main(["ask", image, "a car", "--task", "referring", "--sample", "--seed", "3", *model])
    cli.main(["ask", image, *model])
    cli.main(["info", str(run)])
    assert "tiny-perception" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["locate", "{}", "a car", "--snap"], "--snap: .* is a PerceptionGPT"),
        (["caption", "{}", "--box", "0", "0", "1", "1", "--gif", "a.gif"], "do not"),
        (["ask", "{}", ""], "empty question"),
        (["ask", "{}", "Why?", "--seed", "1"], "do nothing without --sample"),
        (["dense", "{}"], "is a PerceptionGPT, which has no detector"),
    ],
)
def test_what_a_perceptiongpt_cannot_do_is_refused(arguments, reason, run, perception_tables):
    image = Table(perception_tables[0])[0].path
    with pytest.raises(SystemExit, match=f"(?s)error: .*{reason}"):
        cli.main([*(a.format(image) for a in arguments), "--model", str(run), "--device", "cpu"])


def test_pixelllm_answers_no_questions(tiny_run, perception_tables):
    image = Table(perception_tables[0])[0].path
    with pytest.raises(SystemExit, match="is no PerceptionGPT"):
        cli.main(["ask", image, "Why?", "--model", str(tiny_run.main)])


def evaluate(run: Path, task: str, table: Path, out: Path, **changes) -> dict:
    options = {"run": run, "task": task, "data": table, "out": out, "device": "cpu", **changes}
    command.evaluate(command.Options(**options))
    return json.loads((out / f"{task}.json").read_text())


def test_every_task_is_evaluated(run, perception_tables, tmp_path):
    referring, described, grounded, questions = perception_tables
    for task, table, score in (
        ("referring", referring, "box_precision"),
        ("segmentation", referring, "mask_ciou"),
        ("grounded", grounded, "phrase_precision"),
        ("vqa", questions, "exact_answers"),
    ):
        of_task = "referring" if task == "segmentation" else {"vqa": "question"}.get(task, task)
        known = [p for record in Table(table) for p in record.phrases if p.task == of_task]
        result = evaluate(run, task, table, tmp_path, batch_size=5)
        assert result["num_examples"] == len(known) and 0 <= result["metrics"][score] <= 1
        assert len(json.loads((tmp_path / f"{task}_results.json").read_text())) == len(known)
    assert evaluate(run, "vqa", questions, tmp_path, limit=4)["num_examples"] == 4


def test_answers_that_point_are_scored_by_words_and_boxes(run, tiny_scenes, tmp_path):
    lines = tiny_scenes / "annotations/shikra_train.jsonl"
    shikra.convert([lines], tiny_scenes, tmp_path / "pointed")
    config = replace(CONFIG, start=PerceptionStart(run=str(run)), sources=(POINTED,))
    taught = run_stage(config, [tmp_path / "pointed"], tmp_path / "pointed", tmp_path / "run")
    found = evaluate(taught, "pointed", tmp_path / "pointed", tmp_path)
    assert set(found["metrics"]) == {"exact_answers", "phrase_precision", "phrase_recall"}
    assert found["num_examples"] == sum(len(r.phrases) for r in Table(tmp_path / "pointed"))
    assert usual_task(PerceptionGPT.from_pretrained(taught), False) == "pointed"
    assert usual_task(PerceptionGPT.from_pretrained(run), False) == "question"


def test_conversations_are_evaluated_by_the_answers_of_the_model_itself(
    run, tiny_scenes, tmp_path, capsys
):
    llava.convert([tiny_scenes / "annotations/talks_train.json"], tiny_scenes, tmp_path / "talks")
    asked: list[int] = []
    write = PerceptionGPT._write

    def counted(self, images, talks, *options):
        asked.extend(len(talk.rounds) for (talk,) in talks)
        return write(self, images, talks, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerceptionGPT, "_write", counted)
        found = evaluate(run, "vqa", tmp_path / "talks", tmp_path, in_turn=True)
    rounds = [len(record.phrases) for record in Table(tmp_path / "talks")]
    assert found["num_examples"] == sum(rounds) == len(asked) and max(asked) == max(rounds) > 1
    with pytest.raises(ValueError, match="--in-turn is for --task vqa, not 'grounded'"):
        evaluate(run, "grounded", tmp_path / "talks", tmp_path, in_turn=True)
    capsys.readouterr()
    image = Table(tmp_path / "talks")[0].path
    cli.main(["ask", image, "What is it?", "Why?", "--in-turn", "--json", "--model", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["question"] for line in lines] == ["What is it?", "Why?"]


def test_images_are_captioned_and_scored_against_all_that_was_written(
    run, tiny_run, tiny_scenes, tmp_path
):
    """By either model; COCO's own tools find the images of the results."""
    file = tiny_scenes / "annotations/captions_val.json"
    content = json.loads(file.read_text())
    doubled = [{**a, "id": a["id"] + 10**9, "caption": "a car"} for a in content["annotations"]]
    more = tmp_path / "captions_more.json"
    more.write_text(json.dumps({**content, "annotations": content["annotations"] + doubled}))
    coco.convert([more], tiny_scenes / "val", tmp_path / "captions")
    for trained in (run, tiny_run.main):
        found = evaluate(trained, "caption", tmp_path / "captions", tmp_path, batch_size=3)
        assert found["num_examples"] == len(content["images"])
        assert found["metrics"]["rouge_l"] >= 0 and found["baselines"]["cider_d"] > 0
        results = json.loads((tmp_path / "caption_results.json").read_text())
        assert {e["image_id"] for e in results} == {image["id"] for image in content["images"]}
    with pytest.raises(ValueError, match="no 'caption' phrases; make the table with data.coco"):
        evaluate(run, "caption", Path(tiny_scenes.parent / "val"), tmp_path)


def test_an_image_is_captioned_as_the_model_was_taught(model, images):
    """Grounded captions without their marks, where captions were no task."""
    (caption, _) = model.caption_images(images)
    (grounded,) = model.ask(images[:1], [[model.question("grounded")]])[0]
    assert caption.text == grounded.text and caption.words == ()


@pytest.mark.skipif(unavailable_reason() is not None, reason="no METEOR tables")
def test_regions_are_evaluated(run, perception_tables, tmp_path):
    metrics = evaluate(run, "region", perception_tables[1], tmp_path, limit=3)["metrics"]
    assert {"meteor", "all_attributes_right"} <= set(metrics)


@pytest.mark.parametrize("changes", [{"task": "trace"}, {"task": "dense"}, {"snap": True}])
def test_evaluations_of_another_kind_of_model_are_refused(
    changes, run, perception_tables, tmp_path
):
    with pytest.raises(ValueError, match="PerceptionGPT, which has no"):
        evaluate(run, **({"task": "referring"} | changes), table=perception_tables[0], out=tmp_path)


def test_phrases_are_right_where_words_and_box_are():
    """Catches boxes scored against phrases of other words, and objects without any phrase."""
    caption, left, right = "a cat and a dog", (0.0, 0.0, 0.4, 1.0), (0.5, 0.0, 1.0, 1.0)
    truth = Phrase(
        "1", "grounded", caption, pieces=(Piece(0, 5, box=left), Piece(10, 15, box=right))
    )
    objects = tuple(Location(box, 1.0) for box in (left, left, right, right))
    mentions = (Mention(0, 5, (0,)), Mention(10, 15, (1, 2)))
    scores = score_phrases([(truth, Answer(caption, objects, mentions, 0.0))])
    assert scores == {"phrase_precision": 0.5, "phrase_recall": 1.0}
    nothing = score_phrases([(truth, Answer("nothing", (), (), 0.0))])
    assert nothing == {"phrase_precision": 0.0, "phrase_recall": 0.0}


def test_answers_are_compared_without_case_and_full_stop():
    assert normalised(" Red. ") == normalised("red") != normalised("red car")


def test_the_released_run_has_the_published_sizes():
    """Reference of PerceptionGPT, section 3.4."""
    tokenizer = train_tokenizer(["a"], 200)
    add_markers(tokenizer)
    vicuna = LlamaConfig(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, pad_token_id=0)
    with torch.device("meta"):
        model = PerceptionGPT(perceptiongpt_7b(), tokenizer, trunk=vicuna)
    freeze(model, model.config.train.frozen)
    counts = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in model.named_children()
    }
    assert counts == {
        "clip": 48,
        "projector": 1025 * 4096,
        "language": 8_388_608 + 2 * 32_000 * 4096,
        "box_encoder": 2_366_464,
        "box_decoder": 2_362_372,
        "mask_encoder": 4_322_912,
        "mask_head": 4_195_328 + 3_148_800 + 32_358_144,
    }
