"""`pixelllm dense`: the objects of images, each with a box and a caption."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from pixelllm.commands.given import check_at_least_one, check_files, holds_perception, load_model
from pixelllm.dense_page import write_dense_html
from pixelllm.images import open_image
from pixelllm.overlays import FoundObject, write_objects


@dataclass(frozen=True)
class DenseCommand:
    """Find the objects of images and caption each, the surest first.

    Args:
        images: files to look at.
        model: folder of a finished run, or a Hub id.
        max_detections: objects per image at most.
        min_score: leave out what scores less.
        beams: beam search width of the captions; 1 is greedy.
        json: print one JSON object per image instead of text.
        html: write a page of all images with their objects.
        png: write a picture with the objects (of the first image).
        device: auto, cpu, cuda or mps.
        dtype: hold image encoders and language trunk in this precision; as the run says by default.
        int8: hold the trunk's weights in 8 bits (needs torchao).
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    model: str
    max_detections: int = 100
    min_score: float = 0.0
    beams: int = 1
    json: bool = False
    html: Path | None = None
    png: Path | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    int8: bool = False


def dense(command: DenseCommand) -> None:
    if not command.images:
        raise ValueError(f"no image given; try: pixelllm dense photo.jpg --model {command.model}")
    check_at_least_one("--max-detections", command.max_detections)
    check_at_least_one("--beams", command.beams)
    check_files(command.images, [command.html, command.png])
    if holds_perception(command.model):
        raise ValueError(f"{command.model} is a PerceptionGPT, which has no detector")
    model = load_model(command.model, command.device, command.dtype, command.int8)
    processor, device = model.processor(), next(model.parameters()).device
    results = []
    for path in command.images:
        image = open_image(path)
        inputs = processor(image).to(device)
        (found,) = model.describe(
            inputs["images"],
            inputs["sizes"],
            max_detections=command.max_detections,
            num_beams=command.beams,
        )
        results.append(
            {
                "image": str(path),
                "size_hw": [image.height, image.width],
                "detections": [o.to_json() for o in found if o.score >= command.min_score],
            }
        )
        print(json.dumps(results[-1]) if command.json else as_text(results[-1]), flush=True)
    write_files(command, results)


def write_files(command: DenseCommand, results: list[dict[str, Any]]) -> None:
    if command.html:
        write_dense_html(results, command.html)
    if command.png:
        if len(results) > 1:
            first = f"{command.png} shows the first of {len(results)} images"
            print(f"{first}; --html FILE shows all", file=sys.stderr)
        found = [FoundObject(d["box"], d["caption"]) for d in results[0]["detections"]]
        write_objects(open_image(results[0]["image"]), found, command.png)


def as_text(result: dict[str, Any]) -> str:
    """The image and a line per object."""
    lines = [f"{result['image']}: {len(result['detections'])} found"]
    for item in result["detections"]:
        box = " ".join(f"{value:.3f}" for value in item["box"])
        lines.append(f"  {item['score']:.3f}  ({box})  {item['caption']}")
    return "\n".join(lines)
