"""Training steps with and without cached features, in turns in one process, on one thread.

    python benchmarks/feature_cache.py runs/quickstart

takes the data and the pretrained halves of a finished quickstart; then the same with a SAM of
ViT-B's width and depth in the place of the small one (random weights, frames of 160 px).
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from pixelllm.config import Config, StartConfig
from pixelllm.scene_recipes import scenes_tiny
from pixelllm.tables import Table
from pixelllm.training.captioning import build_stage
from pixelllm.training.loop import Stage

STEPS = 12


def step(stage: Stage, number: int) -> tuple[float, float]:
    """One forward and backward pass; returns its processor seconds and its loss."""
    torch.manual_seed(number)
    begin = time.process_time()
    total = sum(stage.loss(stage.batches[number]).values())
    total.backward()
    return time.process_time() - begin, total.item()


def with_vit_b(config: Config) -> Config:
    """The same model with a frozen SAM of ViT-B's size."""
    sam = replace(config.model.sam, width=768, depth=12, num_heads=12, global_blocks=(2, 5, 8, 11))
    prompt = replace(config.model.prompt, from_sam=False)
    model = replace(config.model, sam=sam, prompt=prompt)
    return replace(config, model=model, start=replace(config.start, sam=None))


def compare(config: Config, table: Table) -> None:
    """Print images per processor second of steps without and with a cache, and their losses.

    The first step of each is left out.
    """
    stages: dict[str, Stage] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (("without", None), ("with", Path(folder))):
            torch.manual_seed(0)
            stages[name] = build_stage(config, [table], [table], torch.device("cpu"), cache)
            stages[name].model.train()
        steps = [
            {name: step(stage, number) for name, stage in stages.items()}
            for number in range(STEPS + 1)
        ]
    seconds = {name: median(both[name][0] for both in steps[1:]) for name in stages}
    for name, spent in seconds.items():
        print(f"{name:8} a cache: {config.train.batch_size / spent:7.1f} images/s")
    print(f"ratio {seconds['without'] / seconds['with']:.2f}")
    worst = max(abs(both["without"][1] - both["with"][1]) for both in steps)
    print(f"largest difference of a loss: {worst:.1e}")


def main(run: Path) -> None:
    torch.set_num_threads(1)
    config = scenes_tiny()
    start = StartConfig(sam=str(run / "sam"), eva02=str(run / "eva02"))
    narrations = replace(config.sources[-1], window=(0.0, 1.0))
    config = replace(config, start=start, sources=(narrations,))
    table = Table(run / "data" / "narrations_val")
    for name, sized in (("small SAM", config), ("SAM of ViT-B's size", with_vit_b(config))):
        print(name)
        compare(sized, table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
