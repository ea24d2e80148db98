"""Plans count what a step computes and holds, and say what to change where it does not fit."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import make_tiny_joint_config, short_training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pixelllm.cli import main
from pixelllm.config import Config, Source
from pixelllm.models.perceptiongpt import Objects, Tokens
from pixelllm.perception_recipes import perceptiongpt_7b, scenes_perceptiongpt
from pixelllm.plan import (
    Accelerator,
    Meter,
    Operation,
    StepCosts,
    build_shapes,
    make_batch,
    measure_step,
    memory_of,
    parameters_by_part,
)
from pixelllm.plan_perception import build_perception_model, text_length
from pixelllm.pretrained import PixelLLM
from pixelllm.recipes import RECIPES
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.objectives import weighted_losses
from pixelllm.training.optimizer import freeze
from pixelllm.training.parallel import SHARDED_PARTS, blocks
from pixelllm.vis_losses import perception_losses


@cache
def tiny(frozen: tuple[str, ...] = ("sam", "prompt_encoder"), recompute: bool = False) -> Config:
    config = make_tiny_joint_config(train=short_training(2, frozen=frozen, recompute=recompute))
    return replace(config, max_tokens=12)


def costs_of(config: Config, images: int = 4, source: int = 0) -> StepCosts:
    return measure_step(config, build_shapes(config), config.sources[source], images)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_the_planned_step_is_the_real_one(source: int):
    """The peak without values is that of the same step with them, as its hooks see it."""
    config = tiny()
    costs = costs_of(config, source=source)
    torch.manual_seed(0)
    model = PixelLLM(config, train_tokenizer(["a caption"], 100)).train()
    freeze(model, config.train.frozen)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = make_batch(config, config.sources[source], 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(weighted_losses(model, batch, config.loss).values())
    loss.backward()
    saved = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert saved < costs.peak < 2 * saved


def test_arithmetic_follows_the_images_and_what_learns():
    """Frozen encoders cost a forward pass and no backward."""
    forward, backward = costs_of(tiny()).gflops_per_image
    again, _ = costs_of(tiny(), images=8).gflops_per_image
    assert again == pytest.approx(forward, rel=1e-3) and forward > 0
    frozen = costs_of(tiny(("sam", "prompt_encoder", "eva02"))).gflops_per_image
    assert frozen[0] == pytest.approx(forward) and frozen[1] < 0.9 * backward


def test_recomputing_costs_arithmetic_and_saves_memory():
    kept, recomputed = costs_of(tiny()), costs_of(tiny(recompute=True))
    assert recomputed.gflops_per_image[1] > 1.2 * kept.gflops_per_image[1]
    assert recomputed.peak < 0.8 * kept.peak


def test_a_roofline_takes_the_slowest_of_three():
    device = Accelerator(half=4.0, full=2.0, bandwidth=1.0, memory=0.0, launch=0.5)
    operations = {
        Operation(flops=8.0, traffic=1, is_half=True): 1,  # 2 s of arithmetic
        Operation(flops=8.0, traffic=1, is_half=False): 1,  # 4 s
        Operation(flops=0.0, traffic=3, is_half=False): 2,  # 3 s of traffic each
        Operation(flops=0.0, traffic=0, is_half=False): 1,  # its launch
    }
    costs = StepCosts(1, Counter(operations), Counter(), peak=0, forward_peak=0)
    assert costs.seconds(device) == 2 + 4 + 6 + 0.5


def test_memory_is_counted_by_what_learns_and_is_shared_out():
    config = tiny()
    model = build_shapes(config)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    counts = parameters_by_part(model)
    assert tuple(map(sum, zip(*counts.values(), strict=True))) == (learned, frozen)
    late = StepCosts(1, Counter(), Counter(), peak=4 * learned + 1000, forward_peak=10)
    whole = memory_of(model, [late])
    assert whole == (4 * (learned + frozen), 4 * learned, 8 * learned, 1000)
    shared = memory_of(model, [late], gpus=4)
    assert shared.activations == 1000
    assert shared.optimizer == 2 * shared.gradients < whole.optimizer
    in_blocks = sum(
        p.numel()
        for name in SHARDED_PARTS
        for block in blocks(getattr(model, name, nn.Module()))
        for p in block.parameters()
        if p.requires_grad
    )
    assert shared.gradients == 4 * (learned - in_blocks) + 4 * in_blocks // 4
    early = StepCosts(1, Counter(), Counter(), peak=4 * learned, forward_peak=4 * learned)
    assert memory_of(model, [early]).activations == 0
    held = memory_of(model, [early], gpus=4)
    assert held.activations + held.gradients == 4 * learned


def test_shared_tensors_and_weights_are_counted_once():
    """T5's three embeddings are one, and a transposed weight takes no memory of its own."""
    config = tiny()
    model = build_shapes(config)
    before = parameters_by_part(model)
    measure_step(config, model, config.sources[0], 1)
    assert parameters_by_part(model) == before
    with FakeTensorMode():
        weight = torch.zeros(100, 100)
        with Meter([weight]) as meter:
            product = torch.zeros(1, 100) @ weight.T
    assert meter.peak == 2 * product.numel() * 4


def run(capsys, *arguments: str) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


def test_a_plan_is_printed_as_text_and_json(capsys):
    asked = ("scenes-tiny", "--images", "2", "--tokens", "10", "--gpus", "2")
    text = run(capsys, *asked)
    assert "texts of at most 10 tokens" in text and "80 GiB: fits with whole weights" in text
    found = json.loads(run(capsys, *asked, "--json"))
    assert found["images"] == 2 and set(found["memory"]) == {"whole", "sharded"}
    assert found["learned_and_frozen"]["sam"] == [0, 675_584]
    speeds = found["images_per_second"]
    assert speeds["H100 SXM"] > speeds["this processor"] > 0


def test_a_small_published_trunk_has_its_own_sizes():
    """Catches those of Flan-T5-XL, the paper's."""
    learned, frozen = parameters_by_part(build_shapes(RECIPES["scenes-smollm2"]()))["language"]
    assert 134.5e6 < frozen < 135e6 and learned == 16 * 30 * (2 * 576 + 576 + 192)


def test_the_other_model_has_its_released_sizes():
    counts = parameters_by_part(build_shapes(perceptiongpt_7b()))
    assert counts["language"][0] == 8_388_608 + 2 * 32_000 * 4096  # the markers fit in
    assert counts["clip"][0] == 48


@pytest.mark.parametrize("mask_weight", [0.0, 1.0])
def test_the_other_models_planned_step_computes_what_the_real_one_does(mask_weight: float):
    config = scenes_perceptiongpt()
    source = Source("referring", phrases_per_image=3, mask_weight=mask_weight)
    planned = measure_step(config, build_shapes(config), source, 2).gflops_per_image
    model = build_perception_model(config).train()
    freeze(model, config.train.frozen)
    N, K, T = model.clip.num_tokens(config.model.frame), 3, text_length(config, model, source)
    ids = torch.full((2, T), 5)
    ids[:, :N], ids[:, T - K :] = model.markers.image, model.markers.vis
    is_answer = (torch.arange(T) >= (N + T) // 2).expand(2, T)
    branches = torch.zeros_like(ids)
    side, has_mask = config.model.vis.mask_size, torch.full((2 * K,), mask_weight > 0)
    masks = torch.zeros(int(has_mask.sum()), side, side)
    objects = Objects(torch.rand(2 * K, 4), masks, has_mask, torch.zeros_like(has_mask))
    tokens = Tokens(ids, torch.zeros_like(is_answer), is_answer, branches)
    images = torch.zeros(2, 3, config.model.frame, config.model.frame, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        found = perception_losses(model(images, tokens, objects), tokens, objects)
        sum(found.values()).backward()
    assert sum(planned) == pytest.approx(counter.get_total_flops() / 2e9, rel=0.02)


def test_a_plan_that_does_not_fit_says_what_would(capsys):
    text = run(capsys, "scenes-tiny", "--images", "64", "--tokens", "40", "--memory", "0.2")
    assert "recompute" in re.search(r"0.2 GiB: to fit: (.*)", text).group(1)
    text = run(capsys, "scenes-tiny", "--images", "2", "--tokens", "10", "--memory", "0.001")
    assert "does not fit" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scenes-tny"], "no recipe 'scenes-tny'"),
        (["scenes-sam"], "scenes-sam trains eyes alone"),
        (["scenes-tiny", "--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["scenes-tiny", "--images", "0"], "--images 0: expected 1 or more"),
        (["scenes-tiny", "--memory", "-1"], "--memory -1.0: expected GiB above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        main(["plan", *arguments])
