"""What many boxes and many expressions of one image cost: time and memory by their number.

    python benchmarks/regions.py runs/quickstart runs/quickstart/data/narrations_val

captions random boxes of one image greedily, the image encoded once, then as many images with one
box each, then locates expressions. Ratios compare processor time, which other jobs on the machine
hardly change. Memory is the peak of the whole process during a call (Linux).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image

from pixelllm.pretrained import PixelLLM
from pixelllm.records import Box
from pixelllm.tables import Table
from pixelllm.views import open_record_image

COUNTS = (1, 3, 10, 30, 100, 300)
REPEATS = 3  # the fastest counts, where it is short
LONG = 3.0  # seconds
IMAGES_AT_ONCE = 16


def peak_memory() -> float:
    """MB of this process at its peak since the peak was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(call: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds and processor seconds, each the least of some calls, and MB at the peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wall, busy = [], []
    while len(wall) < REPEATS and sum(wall) < LONG:
        begin, begin_busy = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - begin)
        busy.append(time.process_time() - begin_busy)
    return min(wall), min(busy), peak_memory()


def random_boxes(count: int) -> list[Box]:
    """Boxes of a quarter to all of the image's sides."""
    draw = random.Random(0)
    boxes = []
    for _ in range(count):
        w, h = draw.uniform(0.25, 1), draw.uniform(0.25, 1)
        x, y = draw.uniform(0, 1 - w), draw.uniform(0, 1 - h)
        boxes.append((x, y, x + w, y + h))
    return boxes


def caption_boxes(model: PixelLLM, image: Image, boxes: list[Box]) -> int:
    return len(model.generate(**model.processor()([image], [boxes])))


def caption_images(model: PixelLLM, image: Image, boxes: list[Box]) -> int:
    processor, found = model.processor(), 0
    for start in range(0, len(boxes), IMAGES_AT_ONCE):
        part = boxes[start : start + IMAGES_AT_ONCE]
        found += len(model.generate(**processor([image] * len(part), part)))
    return found


def locate(model: PixelLLM, image: Image, expressions: list[str]) -> int:
    return len(model.locate(**model.processor().locating([image], [expressions])))


def print_curve(title: str, call: Callable[[int], object]) -> None:
    call(1)  # the first call of a kind builds what later ones find
    print(f"\n{title}\n{'':>6}{'seconds':>10}{'processor':>11}{'x one':>8}{'peak MB':>9}")
    one = None
    for count in COUNTS:
        seconds, busy, peak = measure(lambda count=count: call(count))
        one = one or busy
        print(f"{count:6}{seconds:10.3f}{busy:11.3f}{busy / one:8.1f}{peak:9.0f}")


def main(run: Path, table: Path) -> None:
    model = PixelLLM.from_pretrained(run)
    record = Table(table)[0]
    image, boxes = open_record_image(record), random_boxes(max(COUNTS))
    words = record.phrases[0].caption.split()
    texts = [" ".join(words[i % len(words) :][:5]) for i in range(max(COUNTS))]
    print(f"{run}, frames of {model.config.model.frame} px, {torch.get_num_threads()} thread(s)")
    print_curve("captions of boxes of one image", lambda k: caption_boxes(model, image, boxes[:k]))
    print_curve(
        "captions of a box each of images", lambda k: caption_images(model, image, boxes[:k])
    )
    print_curve("expressions in one image", lambda k: locate(model, image, texts[:k]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
