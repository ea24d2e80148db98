"""The prompt feature extractor beside the official arithmetic, in one process, taking turns.

    python benchmarks/extractor.py [--prompts 32] [--rounds 3]

The paper's size (6 layers, 512 wide, 8 heads, 27 x 27 cells, 32 tokens), random weights, one
thread, no gradients. The official arithmetic repeats the image for every prompt and projects all of
it in every layer, in float32, through `segment_anything`'s own transformer: all prompts as one
batch, as the release does, and in parts as ours, which is faster here. Times are processor
seconds, which other jobs on the machine change less than wall time; the median of the rounds and
their range.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from pixelllm.models.prompt import CELLS_AT_ONCE, PromptFeatureExtractor

CURVE = (1, 3, 10, 30, 100, 300)
IN_CHANNELS, PROMPT_WIDTH, SIDE = 1280, 256, 27
PART = CELLS_AT_ONCE // SIDE**2  # prompts that ours reads at once

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # of the extractor


def inputs_of(num_prompts: int, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (1, IN_CHANNELS, SIDE, SIDE),
        (1, num_prompts, 5, PROMPT_WIDTH),
        (PROMPT_WIDTH,),
        (1, PROMPT_WIDTH, SIDE, SIDE),
    ]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def official(extractor: PromptFeatureExtractor, inputs: Inputs, at_once: int) -> Tensor:
    """The release: each prompt has its own copy of the image, projected anew in every layer."""
    features, prompts, dense, image_pe = inputs
    keys = extractor.image_projection(features.flatten(2).mT) + extractor.prompt_projection(dense)
    key_pe = extractor.position_projection(image_pe.flatten(2).mT)
    outputs = []
    for part in extractor.prompt_projection(prompts[0]).split(at_once):
        tokens = torch.cat([extractor.output_tokens.expand(len(part), -1, -1), part], dim=1)
        maps = (x.expand(len(part), -1, -1).mT.unflatten(2, (SIDE, SIDE)) for x in (keys, key_pe))
        tokens, _ = extractor.transformer(*maps, tokens)
        tokens = tokens[:, : len(extractor.output_tokens)]
        heads = torch.einsum("rnd,ndo->rno", tokens, extractor.head_weight)
        outputs.append(heads + extractor.head_bias)
    return torch.cat(outputs)[None]


def unshared(extractor: PromptFeatureExtractor, inputs: Inputs) -> Tensor:
    """Ours where every prompt brings its own cells: the fused kernels alone."""
    features, prompts, dense, image_pe = inputs
    parts = prompts.split(PART, dim=1)
    own = (dense.expand(1, part.shape[1], SIDE**2, -1) for part in parts)
    outputs = [
        extractor(features, part, cells, image_pe) for part, cells in zip(parts, own, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def take_turns(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every call in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    return seconds


def peak_memory() -> float:
    """MB of this process at its peak since the peak was last reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def print_curve(extractor: PromptFeatureExtractor, half: PromptFeatureExtractor) -> None:
    print(f"\n{'prompts':>8}{'float32 s':>11}{'x one':>7}{'peak MB':>9}", end="")
    print(f"{'bfloat16 s':>12}{'x one':>7}{'peak MB':>9}")
    ones: dict[torch.dtype, float] = {}
    for count in CURVE:
        print(f"{count:8}", end="")
        for model, dtype in ((extractor, torch.float32), (half, torch.bfloat16)):
            inputs = inputs_of(count, dtype)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            seconds = min(take_turns({"": partial(model, *inputs)}, 3 if count < 30 else 1)[""])
            ones.setdefault(dtype, seconds)
            print(f"{seconds:11.3f}{seconds / ones[dtype]:8.1f}{peak_memory():9.0f}", end="")
        print(flush=True)


def main(num_prompts: int, rounds: int) -> None:
    torch.manual_seed(0)
    extractor = PromptFeatureExtractor(IN_CHANNELS, PROMPT_WIDTH, 512, 6, 32, 1024).eval()
    half = copy.deepcopy(extractor).bfloat16()
    inputs, half_inputs = inputs_of(num_prompts), inputs_of(num_prompts, torch.bfloat16)
    calls = {
        "official, float32, one batch": partial(official, extractor, inputs, num_prompts),
        f"official, float32, {PART} at once": partial(official, extractor, inputs, PART),
        "fused kernels": partial(unshared, extractor, inputs),
        "ours: and sharing": partial(extractor, *inputs),
        f"official, bfloat16, {PART} at once": partial(official, half, half_inputs, PART),
        "ours, bfloat16": partial(half, *half_inputs),
    }
    expected, *others = [call() for call in calls.values()]
    errors = [0.0, *(float((x.float() - expected).std() / expected.std()) for x in others)]
    seconds = take_turns(calls, rounds)
    base = median(list(seconds.values())[0])
    best = min(median(values) for name, values in seconds.items() if "official, float32" in name)
    print(f"{num_prompts} prompts of one image, {torch.get_num_threads()} thread(s)")
    print(f"{'':34}{'seconds':>9}{'range':>15}{'x batch':>9}{'x best':>8}{'error':>10}")
    for (name, values), error in zip(seconds.items(), errors, strict=True):
        middle = median(values)
        spread = f"{min(values):.2f} … {max(values):.2f}"
        print(
            f"{name:34}{middle:9.2f}{spread:>15}"
            f"{base / middle:9.2f}{best / middle:8.2f}{error:10.1e}"
        )
    print(
        "x batch, x best: against the official arithmetic in float32, as one batch and at its best"
    )
    print("error: root mean square of the difference, in standard deviations of the output")
    print_curve(extractor, half)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        main(arguments.prompts, arguments.rounds)
