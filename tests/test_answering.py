"""PerceptionGPT's answers: the official steps, and that the cache and beams change nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, perception_names
from official_perception import official_network
from test_perceptiongpt import BOS, EOS, IMAGE, MARKS, PAD, batch_of, pixels_of, tiny_network
from torch import Tensor, nn
from torch.testing import assert_close

from pixelllm.models.answering import Answers, sampler, write_answers
from pixelllm.models.perceptiongpt import Objects, PerceptionGPTNetwork, Tokens
from pixelllm.models.vis_boxes import BoxDecoder, BoxEncoder
from pixelllm.vis_losses import perception_losses

PROMPTS = (
    [BOS, *IMAGE, 5, 6, 7, 8],
    [BOS, *IMAGE, MARKS.vis, 9],
    [BOS, *IMAGE, 10],
    [BOS, *IMAGE, 11, MARKS.vis, 12, MARKS.vis],
)
PROMPT_BOXES = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.3, 0.3, 0.4, 0.8], [0.0, 0.5, 1.0, 0.6]])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", perception_names("generate"))
def test_golden_generate(name: str, use_cache: bool):
    case = load_perception(name)
    network = official_network(load_perception(name.replace("generate", "forward")))
    prompt, forced = case["in.prompt_ids"], iter(case["in.forced_tokens"])
    answers = write_answers(
        network,
        pixels_of(case["in.images"]),
        prompt,
        torch.zeros_like(prompt, dtype=torch.bool),
        Objects.of_boxes(torch.zeros(0, 4)),
        max_new_tokens=len(case["in.forced_tokens"]),
        choose=lambda logits: next(forced)[None],
        use_cache=use_cache,
    )
    assert torch.equal(torch.cat([prompt, answers.token_ids], dim=1), case["out.sequence"])
    side = answers.masks.shape[-1] // case["out.masks_sub4"].shape[-1]
    starts = (answers.token_ids[0] == network.markers.vis_start).cumsum(0) - 1
    for found, key in (
        (answers.states[0], "last_hidden_per_step"),
        (answers.boxes, "boxes"),
        (answers.masks[:, None, ::side, ::side], "masks_sub4"),
        (starts[answers.token_ids[0] == network.markers.vis], "box_group"),
    ):
        assert_close(found, case[f"out.{key}"], **PERCEPTION_TOLERANCE, msg=lambda m, k=key: k + m)


@pytest.fixture
def network() -> PerceptionGPTNetwork:
    """One that writes an object about every third token, and ends now and then."""
    network = tiny_network(seed=138)
    head = network.language.model.lm_head
    with torch.no_grad():
        head.weight[[MARKS.vis, EOS]] *= torch.tensor([[3.0], [0.9]])
        head.weight[[PAD, *MARKS[1:]]] = 0.0
    return network


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    token_ids = torch.tensor([[PAD] * (length - len(ids)) + ids for ids in prompts])
    padding = torch.tensor([[n < length - len(ids) for n in range(length)] for ids in prompts])
    return token_ids, padding


def answer(network: PerceptionGPTNetwork, images: Tensor, **options) -> Answers:
    inputs = (*left_padded(list(PROMPTS)), Objects.of_boxes(PROMPT_BOXES))
    return write_answers(network, images, *inputs, **({"max_new_tokens": 12} | options))


def assert_same(found: Answers, expected: Answers) -> None:
    """Integers exactly, numbers but for the order of sums; states by the length of each."""
    for name, value in found._asdict().items():
        wanted = getattr(expected, name)
        if name == "states":  # one of their channels may be next to nothing
            assert value.shape == wanted.shape
            assert ((value - wanted).norm(dim=-1) <= 1e-4 * wanted.norm(dim=-1)).all()
            continue
        tolerance = {"atol": 1e-4, "rtol": 1e-4} if value.is_floating_point() else {}
        assert_close(value, wanted, **tolerance, msg=lambda m, n=name: n + m)


SEARCHES = (
    {},
    {"num_beams": 3},
    {"choose": "sample"},
    {"feed_masks": True},
    {"num_beams": 2, "feed_masks": True},
)


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_the_cache_changes_nothing(network: PerceptionGPTNetwork, images: Tensor, options: dict):
    """Token for token and box for box, with several prompts, padding, objects and ends."""
    found = []
    for use_cache in (True, False):
        draw = {"choose": sampler(1.5, 0.9, torch.Generator().manual_seed(3))}
        given = options | draw if "choose" in options else options
        found.append(answer(network, images, use_cache=use_cache, **given))
    assert_same(*found)
    assert found[0].row.unique().numel() >= 3 and len(found[0].row) >= 6
    assert found[0].padding.any() or "feed_masks" in options


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_prompt_is_answered_as_if_it_were_alone(
    network: PerceptionGPTNetwork, images: Tensor, options: dict
):
    together = answer(network, images, **options)
    boxes = Objects.of_boxes(PROMPT_BOXES[1:])
    inputs = (*left_padded([PROMPTS[3]]), boxes)
    alone = write_answers(network, images[3:], *inputs, max_new_tokens=12, **options)
    T = alone.token_ids.shape[1]
    of_row = together.row == 3
    assert torch.equal(together.token_ids[3, :T], alone.token_ids[0])
    assert len(alone.boxes)
    assert_close(together.boxes[of_row], alone.boxes, atol=1e-4, rtol=1e-4)
    assert_close(together.masks[of_row], alone.masks, atol=1e-4, rtol=1e-4)
    assert_close(together.log_probs[3, :T], alone.log_probs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_what_prompts_of_an_image_share_is_read_once(
    network: PerceptionGPTNetwork, images: Tensor, options: dict, monkeypatch: pytest.MonkeyPatch
):
    """Prompts that are padded where they begin to differ, and ones padded on the far left."""
    read, sizes = network.language.read, []

    def watched(inputs: Tensor, valid: Tensor, *cache) -> Tensor:
        sizes.append(inputs.shape[:2])
        return read(inputs, valid, *cache)

    monkeypatch.setattr(network.language, "read", watched)
    token_ids, padding = left_padded(list(PROMPTS))
    begin, length = len(IMAGE) + 1, token_ids.shape[1]
    for row, ids in enumerate(PROMPTS):
        gap = length - len(ids)
        token_ids[row] = torch.tensor(ids[:begin] + [PAD] * gap + ids[begin:])
        padding[row] = torch.tensor([begin <= n < begin + gap for n in range(length)])
    boxes = Objects.of_boxes(PROMPT_BOXES)
    given = {"max_new_tokens": 12} | options
    shared = write_answers(network, images[:2], token_ids, padding, boxes, **given)
    assert sizes[:2] == [(2, begin), (4, length - begin)]
    sizes.clear()
    apart = write_answers(network, images[:2], *left_padded(list(PROMPTS)), boxes, **given)
    assert sizes[0] == (4, length)
    assert_same(shared, apart)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_of_a_parallel_pass(
    network: PerceptionGPTNetwork, images: Tensor, num_beams: int
):
    """With the answers and their boxes given, the network says the same of each: a beam that
    took over another's box would not."""
    found = answer(network, images, num_beams=num_beams)
    prompts, padding = left_padded(list(PROMPTS))
    tokens = Tokens(
        torch.cat([prompts, found.token_ids], dim=1),
        torch.cat([padding, found.padding], dim=1),
        torch.cat([torch.zeros_like(padding), ~found.padding], dim=1),
    )
    prompt_row = (prompts == MARKS.vis).nonzero()[:, 0]
    order = torch.cat([prompt_row * 2, found.row * 2 + 1]).argsort(stable=True)
    objects = Objects.of_boxes(torch.cat([PROMPT_BOXES, found.boxes])[order])
    told = network(images, tokens, objects)
    log_probs = told.logits.log_softmax(-1)
    ids = tokens.token_ids[tokens.is_answer]
    log_probs = log_probs.gather(-1, ids[:, None])[:, 0]
    assert_close(log_probs, found.log_probs[~found.padding], atol=1e-4, rtol=1e-4)
    assert_close(told.boxes, found.boxes, atol=1e-4, rtol=1e-4)


def test_beams_find_answers_at_least_as_probable(network: PerceptionGPTNetwork, images: Tensor):
    greedy, beams = (answer(network, images, num_beams=n, max_new_tokens=5) for n in (1, 8))
    assert not torch.equal(greedy.token_ids, beams.token_ids)
    assert beams.log_probs.sum() > greedy.log_probs.sum()


def test_masks_are_decoded_where_they_are_asked_for(network: PerceptionGPTNetwork, images: Tensor):
    whole, without = answer(network, images), answer(network, images, with_masks=False)
    assert whole.masks.shape == (len(whole.boxes), 32, 32) and len(without.masks) == 0
    assert_close(without.boxes, whole.boxes)


def test_sampling_follows_its_generator(network: PerceptionGPTNetwork, images: Tensor):
    def drawn(seed: int, top_p: float = 1.0) -> Tensor:
        choose = sampler(2.0, top_p, torch.Generator().manual_seed(seed))
        return answer(network, images, choose=choose).token_ids

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert torch.equal(drawn(1, top_p=1e-6), answer(network, images).token_ids)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"num_beams": 0}], ids=str)
def test_no_token_and_no_beam_are_refused(
    network: PerceptionGPTNetwork, images: Tensor, wrong: dict
):
    with pytest.raises(ValueError, match=" 0.*: expected 1 or more"):
        answer(network, images, **wrong)


def test_prompts_padded_on_the_right_are_refused(network: PerceptionGPTNetwork, images: Tensor):
    """Words would go on after the padding."""
    token_ids, padding = left_padded(list(PROMPTS[2:3]))
    token_ids, padding = (
        nn.functional.pad(token_ids, (0, 1)),
        nn.functional.pad(padding, (0, 1), value=True),
    )
    with pytest.raises(ValueError, match="this one in padding: pad it left"):
        none = Objects.of_boxes(torch.zeros(0, 4))
        write_answers(network, images[:1], token_ids, padding, none, max_new_tokens=2)


def test_two_samples_can_be_learnt_and_written(images: Tensor, generator: torch.Generator):
    """The whole way round: what was taught is written, with its boxes and masks."""
    network, images = tiny_network(width=32).train(), images[:2]
    network.box_encoder, network.box_decoder = BoxEncoder(24, 16), BoxDecoder(24, 16)
    rows = [
        (PROMPTS[0], [5, MARKS.vis_start, MARKS.vis, MARKS.vis, MARKS.vis_end, EOS]),
        (PROMPTS[1], [7, MARKS.vis, 8, EOS]),
    ]
    tokens = batch_of(rows)
    low = torch.rand(4, 2, generator=generator) / 2
    boxes = torch.cat([low, low + 0.3], dim=1)
    masks = torch.zeros(4, 32, 32)
    for mask, (x0, y0, x1, y1) in zip(masks, (boxes * 32).int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    every = torch.ones(4, dtype=torch.bool)
    objects = Objects(boxes, masks, every, ~every)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(100):
        losses = perception_losses(network(images, tokens, objects), tokens, objects)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    asked = Objects.of_boxes(boxes[2:3])
    inputs = (*left_padded([question for question, _ in rows]), asked)
    found = write_answers(network.eval(), images, *inputs, max_new_tokens=8)
    for ids, padding, (_, expected) in zip(found.token_ids, found.padding, rows, strict=True):
        assert ids[~padding].tolist() == expected
    assert_close(found.boxes, boxes[[0, 1, 3]], atol=0.05, rtol=0)
    assert ((found.masks > 0) == masks[[0, 1, 3]].bool()).float().mean() > 0.95
