"""How time grows with words, prompts, image size and records, as slopes and as a picture.

    python benchmarks/growth.py runs/quickstart --table runs/quickstart/data/narrations_train \
        --out growth.png

A slope is that of a straight line through the second half of a curve in log-log axes, where what a
call costs at least no longer counts: 1 is proportional growth, 2 quadratic. Times are processor
time, the least of some calls, on one thread.

Words are written by the run's own language model, greedily, and never end; "recomputed" reads all
words anew at each. Prompts are boxes of one image, captioned with four words each. Image sizes are
sides of what the small SAM and EVA02 read; the quadratic part of their attention is in sight only
at the end. Records are those of a table that are read and turned into Python objects.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from regions import random_boxes
from torch import Tensor

from pixelllm.decoding import greedy_search
from pixelllm.models.build import build_eva02_branch, build_sam_branch
from pixelllm.models.trunk import Steps
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table
from pixelllm.views import open_record_image

REPEATS = 3


class Curve(NamedTuple):
    """Seconds of processor time by a count, and the slope that there should be."""

    name: str
    of: str
    counts: list[int]
    seconds: list[float]
    expected: str

    @property
    def slope(self) -> float:
        half = len(self.counts) // 2
        x, y = np.log(self.counts[half:]), np.log(self.seconds[half:])
        return float(np.polyfit(x, y, 1)[0])


def measure(
    name: str, of: str, counts: Iterable[int], expected: str, call: Callable[[int], object]
) -> Curve:
    """Time the call at every count; prints them."""
    counts, seconds = list(counts), []
    call(counts[0])  # the first call of a kind builds what later ones find
    for count in counts:
        spent = []
        for _ in range(REPEATS):
            begin = time.process_time()
            call(count)
            spent.append(time.process_time() - begin)
        seconds.append(min(spent))
    curve = Curve(name, of, counts, seconds, expected)
    times = "  ".join(f"{c}: {1e3 * s:.1f}" for c, s in zip(counts, seconds, strict=True))
    print(f"{name:32} slope {curve.slope:.2f} (expected {expected})\n    ms  {times}", flush=True)
    return curve


class Recomputed:
    """Steps without a cache."""

    def __init__(self, language: torch.nn.Module, prompt: tuple[Tensor, ...]):
        self.language, self.prompt = language, prompt

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        hidden = self.language.decode(self.prompt, token_ids[:, : t + 1])
        return self.language.logits(hidden[:, -1])


def write(steps: Steps | Recomputed, num_words: int, bos_id: int, eos_id: int) -> None:
    """A caption of exactly so many words."""

    def endless(token_ids: Tensor, t: int) -> Tensor:
        logits = steps(token_ids, t)
        logits[:, eos_id] = -torch.inf
        return logits

    start = torch.full((1, num_words + 2), eos_id)
    start[:, 0] = bos_id
    greedy_search(endless, start, eos_id)


def word_curves(model: PixelLLM) -> list[Curve]:
    language = model.language.eval()
    nothing = torch.zeros(1, 0, dtype=torch.long)
    prompt = language.encode(torch.randn(1, 32, language.width), nothing, nothing.bool())
    ids = (language.bos_id, language.eos_id)
    return [
        measure(
            "words, with a cache", "words", (16, 32, 64, 128, 256, 512), "1",
            lambda n: write(language.new_steps(prompt, 1, n), n, *ids),
        ),
        measure(
            "words, recomputed", "words", (16, 32, 64, 128, 256), "1 to 3",
            lambda n: write(Recomputed(language, prompt), n, *ids),
        ),
    ]  # fmt: skip


def prompt_curve(model: PixelLLM, table: Table) -> Curve:
    counts = (1, 4, 16, 64, 256)
    image, boxes = open_record_image(table[0]), random_boxes(max(counts))
    processor = model.processor()
    return measure(
        "prompts of one image", "prompts", counts, "1",
        lambda n: model.generate(**processor([image], [boxes[:n]]), max_new_tokens=4),
    )  # fmt: skip


def size_curves(model: PixelLLM) -> list[Curve]:
    """Sides of the encoders' square input; cost should grow with the number of pixels and up."""
    sizes = model.config.model
    curves = []
    for name, build, config in (
        ("SAM", build_sam_branch, sizes.sam),
        ("EVA02", build_eva02_branch, sizes.eva02),
    ):
        sides = (80, 160, 320, 480, 640)
        branches = {side: build(replace(config, table_size=side), side).eval() for side in sides}

        def encode(side: int, branches=branches) -> Tensor:
            images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
            return branches[side](images, torch.tensor([[side, side]]))

        curves.append(measure(f"side of {name}'s image", "px", sides, "2 to 4", encode))
    return curves


def record_curve(table: Table) -> Curve:
    counts = [n for n in (100, 300, 1000, 3000, 10000) if n <= len(table)]
    return measure(
        "records read", "records", counts, "1", lambda n: [table[i].phrases for i in range(n)]
    )


def plot(curves: list[Curve], out: Path) -> None:
    kinds = list(dict.fromkeys(curve.of for curve in curves))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(3.4 * len(kinds), 3.4), layout="constrained"
    )
    for axis, kind in zip(axes, kinds, strict=True):
        for curve in (curve for curve in curves if curve.of == kind):
            label = f"{curve.name}: {curve.slope:.2f}"
            axis.plot(curve.counts, curve.seconds, marker="o", markersize=3, label=label)
        axis.set(xlabel=kind, xscale="log", yscale="log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("seconds of processor time")
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


@torch.inference_mode()
def main(run: Path, table: Path, out: Path) -> None:
    torch.set_num_threads(1)
    model, records = PixelLLM.from_pretrained(run), Table(table)
    curves = [
        *word_curves(model),
        prompt_curve(model, records),
        *size_curves(model),
        record_curve(records),
    ]
    plot(curves, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    main(**vars(parser.parse_args()))
