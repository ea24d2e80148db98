"""What `pixelllm plan` says of this processor, against the step itself.

    python -m benchmarks.plan scenes-tiny --images 16 --tokens 36

Each source of the recipe, random weights and random captions of the given length: time is processor
time on one thread, the best of several steps; memory is what the process has held at most during a
step, beyond what it held before.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pixelllm.config import Config
from pixelllm.plan import build_shapes, make_batch, measure_cpu, measure_step
from pixelllm.pretrained import PixelLLM
from pixelllm.recipes import RECIPES
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.objectives import weighted_losses
from pixelllm.training.optimizer import freeze
from pixelllm.training.recompute import recompute_blocks


@dataclass(frozen=True)
class Options:
    """What to compare.

    Args:
        recipe: its name.
        images: of a micro batch.
        tokens: of a caption.
        recompute: with gradient checkpointing.
        steps: how many to take.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "scenes-tiny"
    images: int = 16
    tokens: int = 36
    recompute: bool = False
    steps: int = 4


def measured(config: Config, model: PixelLLM, options: Options) -> list[tuple[float, float]]:
    """Seconds and GiB of a step of every source."""
    found = []
    for source in config.sources:
        batch = make_batch(config, source, options.images)
        batch.boxes[..., 2:] = 1.0
        times, memory = [], 0.0
        for _ in range(options.steps):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed is held no more
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, start = held("VmRSS:"), time.process_time()
            sum(weighted_losses(model, batch, config.loss).values()).backward()
            times.append(time.process_time() - start)
            memory = max(memory, held("VmHWM:") - before)
            model.zero_grad()
        found.append((min(times), memory))
    return found


def held(name: str) -> float:
    """GiB of this process."""
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 2**20


def main(options: Options) -> None:
    torch.set_num_threads(1)
    config = replace(RECIPES[options.recipe](), max_tokens=options.tokens)
    config = replace(config, train=replace(config.train, recompute=options.recompute))
    device = measure_cpu()
    shapes = build_shapes(config)
    steps = [measure_step(config, shapes, source, options.images) for source in config.sources]
    model = PixelLLM(config, train_tokenizer(["a caption"], 100)).train()
    freeze(model, config.train.frozen)
    if options.recompute:
        recompute_blocks(model)
    print(f"{options.recipe}, {options.images} images, captions of {options.tokens} tokens")
    print(f"{device.full / 1e9:.0f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s, ", end="")
    print(f"{device.launch * 1e6:.1f} us a launch")
    print("source       images/s: planned  measured  ratio   GiB: planned  measured  ratio")
    for source, costs, step in zip(
        config.sources, steps, measured(config, model, options), strict=True
    ):
        planned, real = options.images / costs.seconds(device), options.images / step[0]
        peak = costs.peak / 2**30
        print(f"{source.task:12}{planned:18.1f}{real:10.1f}{real / planned:7.2f}", end="")
        print(f"{peak:15.3f}{step[1]:10.3f}{step[1] / peak:7.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
