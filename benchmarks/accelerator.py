"""The published sizes on an accelerator, beside plain libraries and what `pixelllm plan` says.

    python -m benchmarks.accelerator                       # all parts on a GPU: some minutes
    python -m benchmarks.accelerator step --models bert --images 32
    python -m benchmarks.accelerator encoders --device cpu --images 1 --blocks 1

Random weights. Ways to do the same take turns in one process; a time is the median of `--rounds`
calls, each waited for. The peak is the fastest of the encoder's own matrix products, as in
benchmarks/encoders.py, and useful work is counted as there. `step` is a training step of ln-coco-*
with gradient checkpointing, frozen parts in bfloat16 and learned ones in float32 under autocast;
its memory is what the allocator had handed out at most.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

from benchmarks import decoding, encoders, extractor, full_size
from pixelllm.models.prompt import PromptFeatureExtractor
from pixelllm.plan import ACCELERATORS, build_shapes, measure_step, memory_of
from pixelllm.training.objectives import weighted_losses
from pixelllm.training.optimizer import build_optimizer, freeze
from pixelllm.training.parallel import blocks
from pixelllm.training.recompute import recompute_blocks

PARTS = ("encoders", "extractor", "decoding", "step")
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        parts: which.
        models: whose training step.
        images: of a batch.
        blocks: only so many of the encoders'.
        rounds: calls of each way.
        device: where.
        accelerator: whose published peaks the plan takes.
    """

    parts: tyro.conf.Positional[tuple[Literal[PARTS], ...]] = PARTS
    models: tuple[Literal["bert", "t5xl"], ...] = ("bert", "t5xl")
    images: int = 8
    blocks: int | None = None
    rounds: int = 7
    device: str = "cuda"
    accelerator: Literal[tuple(ACCELERATORS)] = "H100 SXM"


def seconds_of(call: Callable[[], object], device: str) -> float:
    """By the clock, with all that the call started."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def take_turns(ways: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Seconds of every way, the median of its rounds after two that warm it up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 2):
        for name, call in ways.items():
            spent[name].append(seconds_of(call, options.device))
    return {name: median(values[2:]) for name, values in spent.items()}


@torch.inference_mode()
def measure_encoders(options: Options) -> None:
    """EVA02-L/14 and SAM ViT-B at 384 pixels."""
    makers = {"eva02": encoders.subject_eva02, "sam": encoders.subject_sam}
    for name, make in makers.items():
        subject = make(384, options.blocks)
        for dtype in (torch.float32, torch.bfloat16):
            plain, ours = subject.plain.to(dtype), subject.ours.to(dtype)
            images = torch.randn(options.images, 3, 384, 384).to(dtype)
            compiled = copy.deepcopy(ours)
            for block in blocks(compiled):
                block.compile()
            ways = {"plain": partial(plain, images), "ours": partial(ours, images)}
            ways["ours, compiled"] = partial(compiled, images)
            products = [product_rate(shape, dtype, options) for shape in subject.shapes]
            useful = options.images * subject.operations
            print(f"{name}, {dtype}: peak {max(products) / 1e12:.1f} TFLOP/s")
            for way, seconds in take_turns(ways, options).items():
                share = useful / seconds / max(products)
                print(f"  {way:16}{1e3 * seconds:9.2f} ms{share:7.1%} of the peak", flush=True)


def product_rate(shape: tuple[int, int, int], dtype: torch.dtype, options: Options) -> float:
    """Operations a second of one product, for all images at once."""
    M, K, N = shape
    x = torch.randn(options.images * M, K).to(dtype)
    weight = torch.randn(N, K).to(dtype)

    def repeat() -> None:
        for _ in range(10):
            F.linear(x, weight)

    return 20 * x.numel() * N / take_turns({"": repeat}, options)[""]


@torch.inference_mode()
def measure_extractor(options: Options) -> None:
    """The paper's size, prompts of one image: the release's arithmetic and ours."""
    channels, width = extractor.IN_CHANNELS, extractor.PROMPT_WIDTH
    full = PromptFeatureExtractor(channels, width, 512, 6, 32, 1024).eval()
    half = PromptFeatureExtractor(channels, width, 512, 6, 32, 1024).eval().bfloat16()
    print("prompts  official ms     ours  ours bfloat16  (times as fast)")
    for count in (1, 32, 300):
        with torch.device("cpu"):  # whose generator draws them
            drawn = [extractor.inputs_of(count, dtype) for dtype in (torch.float32, torch.bfloat16)]
        inputs, halves = ([x.to(options.device) for x in tensors] for tensors in drawn)
        ways = {
            "official": partial(extractor.official, full, inputs, count),
            "ours": partial(full, *inputs),
            "half": partial(half, *halves),
        }
        official, *others = take_turns(ways, options).values()
        print(f"{count:7}{1e3 * official:13.2f}", end="")
        print("".join(f"{1e3 * x:9.2f} ({official / x:.1f})" for x in others), flush=True)


@torch.inference_mode()
def measure_decoding(options: Options) -> None:
    """Whole searches, with cached steps and with all positions anew at each step."""
    model = decoding.build()
    for case in decoding.CASES:
        prompt = decoding.encode(model, case)

        def cached(prompt=prompt, case=case) -> None:
            steps = model.new_steps(prompt, case.beams, case.words)
            decoding.search(model, steps, case)

        def official(prompt=prompt, case=case) -> None:
            decoding.search(model, decoding.Official(model, prompt, case.beams), case)

        spent = take_turns({"official": official, "ours": cached}, options)
        print(f"{case.name}: ", end="")
        print(", ".join(f"{name} {1e3 * x:.0f} ms" for name, x in spent.items()), end="")
        print(f", {spent['official'] / spent['ours']:.1f} times as fast", flush=True)


def measure_training(model_name: str, options: Options) -> None:
    """A step with AdamW, eager and with compiled blocks, and its plan."""
    config = full_size.recipe(model_name)
    with torch.device("cpu"):
        planned = measure_step(config, build_shapes(config), config.sources[-1], options.images)
        memory = memory_of(build_shapes(config), [planned])
        model = full_size.build(config)
        batch = full_size.inputs(config, model, options.images)
    model = model.to(options.device).train()
    batch = batch.to(torch.device(options.device))
    freeze(model, config.train.frozen)
    recompute_blocks(model)
    optimizer = build_optimizer(model, config.train)
    kind = torch.device(options.device).type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16):
            loss = sum(weighted_losses(model, batch, config.loss).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    eager = take_turns({"": step}, options)[""]
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE if kind == "cuda" else float("nan")
    seconds = planned.seconds(ACCELERATORS[options.accelerator])
    print(f"ln-coco-{model_name}, {options.images} images")
    for name, time_taken, held in (
        ("planned", seconds, memory.total / GIBIBYTE),
        ("measured", eager, peak),
    ):
        rate = options.images / time_taken
        print(f"  {name:10}{rate:8.1f} images/s{held:8.1f} GiB", flush=True)
    for block in blocks(model):
        block.compile()
    compiled = take_turns({"": step}, options)[""]
    print(f"  blocks compiled{options.images / compiled:8.1f} images/s", flush=True)


def main(options: Options) -> None:
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.images} images", flush=True)
    parts = {"encoders": measure_encoders, "extractor": measure_extractor}
    parts["decoding"] = measure_decoding
    for part in options.parts:
        if part == "step":
            for model in options.models:
                measure_training(model, options)
        else:
            parts[part](options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
