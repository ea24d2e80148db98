"""`pixelllm locate`: where in an image expressions point."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from pixelllm.commands.given import check_files, load_any_model
from pixelllm.images import open_image
from pixelllm.locating import Location
from pixelllm.mask_codes import decode_mask
from pixelllm.overlays import FoundObject, write_objects
from pixelllm.perceiving import PerceptionGPT
from pixelllm.pretrained import PixelLLM


@dataclass(frozen=True)
class LocateCommand:
    """Find what expressions mean in an image: a box or a mask each.

    Args:
        image: file to look at.
        texts: expressions, e.g. "the red car left of the tree".
        model: folder of a finished run, or a Hub id.
        mask: also segment what is found (with --json run lengths, and polygons to be filled by the
            even-odd rule: one inside another is a hole).
        caption: also say what the model sees at the place it found. Every expression gets a box:
            where nothing fits, that is another object, which this names.
        snap: take the detected box that fits best (needs a model with a detector).
        json: print one JSON object a line instead of text.
        png: write a picture of all boxes and masks.
        device: auto, cpu, cuda or mps.
        dtype: hold image encoders and language trunk in this precision; as the run says by default.
        int8: hold the trunk's weights in 8 bits (needs torchao).
    """

    image: tyro.conf.Positional[Path]
    texts: tyro.conf.Positional[tuple[str, ...]]
    model: str
    mask: bool = False
    caption: bool = False
    snap: bool = False
    json: bool = False
    png: Path | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    int8: bool = False


def locate(command: LocateCommand) -> None:
    if not command.texts:
        example = f'pixelllm locate {command.image} "the red car on the left"'
        raise ValueError(f"no expression given; try: {example} --model {command.model}")
    empty = [number for number, text in enumerate(command.texts) if not text.strip()]
    if empty:
        raise ValueError(
            f"expression {empty[0]} is empty; say what to look for, e.g. 'the red car'"
        )
    check_files([command.image], [command.png])
    model = load_any_model(command.model, command.device, command.dtype, command.int8)
    image = open_image(command.image)
    if isinstance(model, PerceptionGPT):
        if command.snap:
            raise ValueError(f"--snap: {command.model} is a PerceptionGPT, which has no detector")
        wanted = (command.mask, command.caption)
        locations = model.locate([image], [command.texts], *wanted)[0]
    else:
        warn_of_untaught(model, command.model)
        inputs = model.processor().locating([image], [command.texts])
        inputs = inputs.to(next(model.parameters()).device)
        wanted = {"with_masks": command.mask, "with_captions": command.caption}
        locations = model.locate(**inputs, **wanted, snap=command.snap)
    found = list(zip(command.texts, locations, strict=True))
    about = {"image": str(command.image), "size_hw": [image.height, image.width]}
    for text, location in found:
        shown = {**about, "text": text, **location.to_json()} if command.json else None
        print(json.dumps(shown) if shown else as_text(text, location), flush=True)
    if command.png:
        write_objects(image, [as_object(*item) for item in found], command.png)


def warn_of_untaught(model: PixelLLM, name: str) -> None:
    """Boxes come from any model, but mean something from one that learnt expressions."""
    tasks = sorted({source.task for source in model.config.sources})
    if tasks and "referring" not in tasks:
        learnt = ", ".join(tasks)
        print(
            f"warning: {name} was trained on {learnt}, not on expressions: unless an earlier stage "
            "was, its boxes mean nothing (README: make joint)",
            file=sys.stderr,
        )


def as_text(text: str, location: Location) -> str:
    """The expression, its box and score, what is seen there, and the share of its mask."""
    box = " ".join(f"{value:.3f}" for value in location.box)
    line = f"{text}: box {box}  score {location.score:.3f}"
    if location.caption is not None:
        line += f"  seen: {location.caption}"
    if location.mask is None:
        return line
    return f"{line}  mask {100 * decode_mask(location.mask).mean():.1f} % of the image"


def as_object(text: str, location: Location) -> FoundObject:
    mask: Any = None if location.mask is None else decode_mask(location.mask)
    return FoundObject(location.box, text, mask)
