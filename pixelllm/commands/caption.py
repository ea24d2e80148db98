"""`pixelllm caption`: captions whose words point, as text, JSON and pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from PIL.Image import Image
from tqdm import tqdm

from pixelllm.commands.given import (
    check_at_least_one,
    check_files,
    load_any_model,
    search_options,
)
from pixelllm.generation import Caption
from pixelllm.images import open_image
from pixelllm.perceiving import PerceptionGPT
from pixelllm.pictures import write_gif, write_still
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Box
from pixelllm.viewer import write_html


@dataclass(frozen=True)
class CaptionCommand:
    """Caption images, with a point for every word.

    Args:
        images: files to caption.
        model: folder of a finished run, or a Hub id.
        box: x0 y0 x1 y1 of what to caption, in [0, 1] of each image; may be given several times.
        pixels: boxes are in pixels of each image.
        context: text given to the model; the recipe's own by default.
        beams: beam search width; 1 is greedy.
        sample: draw words at random instead of taking the likeliest.
        temperature: of --sample; below 1 likelier words, above 1 rarer ones.
        top_p: of --sample; draw among the likeliest words that have this probability together.
        seed: of --sample; the same seed gives the same captions.
        batch_size: images at a time.
        json: print one JSON object a line instead of text.
        html: write a page that plays the captions.
        gif: write an animation (of the first caption).
        png: write a still picture (of the first caption).
        device: auto, cpu, cuda or mps.
        dtype: hold image encoders and language trunk in this precision; as the run says by default.
        int8: hold the trunk's weights in 8 bits (needs torchao).
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    model: str
    box: tyro.conf.UseAppendAction[tuple[tuple[float, float, float, float], ...]] = ()
    pixels: bool = False
    context: str | None = None
    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    json: bool = False
    html: Path | None = None
    gif: Path | None = None
    png: Path | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    int8: bool = False


def caption(command: CaptionCommand) -> None:
    if not command.images:
        raise ValueError("no image given; try: pixelllm caption photo.jpg --model runs/quickstart")
    check_at_least_one("--batch-size", command.batch_size)
    check_files(command.images, [command.html, command.gif, command.png])
    search = search_options(command)
    if command.pixels and not command.box:
        raise ValueError("--pixels says what the numbers of --box are; there is no --box")
    if not command.pixels:  # those in pixels are checked when the image is read
        boxes_for(command, command.images[0], (1, 1))
    model = load_any_model(command.model, command.device, command.dtype, command.int8)
    if isinstance(model, PerceptionGPT):
        check_perception(command)
    torch.manual_seed(command.seed)
    results = []
    for result in caption_images(model, command, search):
        results.append(result)
        print(json.dumps(result) if command.json else as_text(result), flush=True)
    for file in (command.gif, command.png):
        if file and len(results) > 1:
            first = f"{file} shows the first of {len(results)} captions"
            print(f"{first}; --html FILE shows all", file=sys.stderr)
    if command.html:
        write_html(results, command.html)
    if command.gif:
        write_gif(results[0], command.gif)
    if command.png:
        write_still(results[0], command.png)


def check_perception(command: CaptionCommand) -> None:
    """Raise ValueError for what a PerceptionGPT, whose words have no points, cannot do."""
    if command.html or command.gif or command.png:
        raise ValueError("--html, --gif and --png show words that point; a PerceptionGPT's do not")
    if command.sample or command.context is not None:
        raise ValueError("--sample and --context: a PerceptionGPT is asked as its recipe asks")


def caption_images(
    model: PixelLLM | PerceptionGPT, command: CaptionCommand, search: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One dictionary per image and box, in the order given; images go through in batches."""
    starts = range(0, len(command.images), command.batch_size)
    for start in tqdm(starts, desc="images", unit="batch", disable=len(starts) == 1):
        paths = command.images[start : start + command.batch_size]
        images = [open_image(path) for path in paths]
        sizes = [(image.height, image.width) for image in images]
        boxes = [boxes_for(command, *item) for item in zip(paths, sizes, strict=True)]
        if isinstance(model, PerceptionGPT):
            captions = iter(perception_captions(model, images, boxes, **search))
        else:
            inputs = model.processor()(images, boxes if command.box else None, command.context)
            inputs = inputs.to(next(model.parameters()).device)
            captions = iter(model.generate(**inputs, **search))
        for path, size, prompts in zip(paths, sizes, boxes, strict=True):
            for prompt in prompts or [None]:
                result = {"image": str(path), "size_hw": list(size), **next(captions).to_json()}
                yield result if prompt is None else {**result, "prompt_box": list(prompt)}


def perception_captions(
    model: PerceptionGPT, images: Sequence[Image], boxes: Sequence[Sequence[Box]], **search: int
) -> list[Caption]:
    """Of the boxes, or of whole images where there are none."""
    if not boxes[0]:
        return model.caption_images(images, **search)
    return list(chain.from_iterable(model.describe_boxes(images, boxes, **search)))


def boxes_for(command: CaptionCommand, path: Path, size: tuple[int, int]) -> list[Box]:
    """The command's boxes in [0, 1] of the image. Raises ValueError naming the image and box."""
    height, width = size if command.pixels else (1, 1)
    unit = f"pixels of {width} x {height}" if command.pixels else "[0, 1]; pixels need --pixels"
    for box in command.box:
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"{path}: box {' '.join(map(str, box))}: expected x0 < x1 and y0 < y1 in {unit}"
            )
    return [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in command.box]


def as_text(result: dict[str, Any]) -> str:
    """The caption, after its box if it is of one, and a line per word."""
    box = " ".join(f"{value:.3f}" for value in result.get("prompt_box", ()))
    about = f"{result['image']} [{box}]" if box else result["image"]
    lines = [f"{about}: {result['caption']}"]
    for word in result["words"]:
        x, y = word["point"]
        lines.append(f"  {word['text']:16} ({x:.3f}, {y:.3f})  log p {word['log_prob']:.2f}")
    return "\n".join(lines)
