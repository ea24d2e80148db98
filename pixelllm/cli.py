"""The `pixelllm` command: caption images and look into runs.

    pixelllm caption photo.jpg --model runs/quickstart --html photo.html
    pixelllm info runs/quickstart

Points are (x, y) and boxes (x0, y0, x1, y1), in [0, 1] of the image.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other

import tyro
from tqdm import tqdm

from pixelllm.devices import choose_device
from pixelllm.images import open_image
from pixelllm.pictures import write_gif, write_still
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Box
from pixelllm.viewer import write_html

MAIN_SCORES = (
    "object_precision",
    "object_recall",
    "generated_point_in_box",
    "object_point_in_box",
    "object_point_l1",
    "point_l1",
    "lbm_k0",
    "cider_d",
)


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
        batch_size: images at a time.
        json: print one JSON object a line instead of text.
        html: write a page that plays the captions.
        gif: write an animation (of the first caption).
        png: write a still picture (of the first caption).
        device: auto, cpu, cuda or mps.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    model: str
    box: tyro.conf.UseAppendAction[tuple[tuple[float, float, float, float], ...]] = ()
    pixels: bool = False
    context: str | None = None
    beams: int = 1
    batch_size: int = 16
    json: bool = False
    html: Path | None = None
    gif: Path | None = None
    png: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class InfoCommand:
    """Print what a run is: recipe, sizes, parameters and its main scores.

    Args:
        model: folder of a finished run, or a Hub id.
    """

    model: tyro.conf.Positional[str]


def caption(command: CaptionCommand) -> None:
    if not command.images:
        raise ValueError("no image given; try: pixelllm caption photo.jpg --model runs/quickstart")
    for path in command.images:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image")
    if command.batch_size < 1:
        raise ValueError(f"--batch-size {command.batch_size}: expected 1 or more")
    for file in (command.html, command.gif, command.png):
        if file is not None and file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; name the file to write")
    model = PixelLLM.from_pretrained(command.model).to(choose_device(command.device))
    results = []
    for result in caption_images(model, command):
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


def caption_images(model: PixelLLM, command: CaptionCommand) -> Iterator[dict[str, Any]]:
    """One dictionary per image and box, in the order given; images go through in batches."""
    processor = model.processor()
    starts = range(0, len(command.images), command.batch_size)
    for start in tqdm(starts, desc="images", unit="batch", disable=len(starts) == 1):
        paths = command.images[start : start + command.batch_size]
        images = [open_image(path) for path in paths]
        sizes = [(image.height, image.width) for image in images]
        boxes = [boxes_for(command, *item) for item in zip(paths, sizes, strict=True)]
        inputs = processor(images, boxes if command.box else None, command.context)
        captions = iter(
            model.generate(**inputs.to(next(model.parameters()).device), num_beams=command.beams)
        )
        for path, size, prompts in zip(paths, sizes, boxes, strict=True):
            for prompt in prompts or [None]:
                result = {"image": str(path), "size_hw": list(size), **next(captions).to_json()}
                yield result if prompt is None else {**result, "prompt_box": list(prompt)}


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
    """The caption and a line per word."""
    lines = [f"{result['image']}: {result['caption']}"]
    for word in result["words"]:
        x, y = word["point"]
        lines.append(f"  {word['text']:16} ({x:.3f}, {y:.3f})  log p {word['log_prob']:.2f}")
    return "\n".join(lines)


def info(command: InfoCommand) -> None:
    model = PixelLLM.from_pretrained(command.model)
    config = model.config
    print(f"{config.name}: frame {config.model.frame} px, {len(model.tokenizer)} tokens")
    for name, part in model.named_children():
        print(f"  {name:16}{sum(p.numel() for p in part.parameters()):>14,} parameters")
    for file in sorted(Path(command.model).glob("eval/*.json")):
        result = json.loads(file.read_text())
        print(f"{file.stem}, {result['num_examples']} examples{'model':>19}{'trivial':>10}")
        for name in (name for name in MAIN_SCORES if name in result["metrics"]):
            trivial = result["baselines"].get(name)
            shown = "-" if trivial is None else f"{trivial:.3f}"
            print(f"  {name:32}{result['metrics'][name]:10.3f}{shown:>10}")


def main(arguments: Sequence[str] | None = None) -> None:
    commands = (
        Annotated[CaptionCommand, tyro.conf.subcommand("caption")]
        | Annotated[InfoCommand, tyro.conf.subcommand("info")]
    )
    command = tyro.cli(commands, prog="pixelllm", description=__doc__, args=arguments)
    try:
        caption(command) if isinstance(command, CaptionCommand) else info(command)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
