"""`pixelllm ask`: questions about an image, and answers with the objects they mention."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from pixelllm.commands.given import (
    check_files,
    holds_perception,
    load_any_model,
    search_options,
)
from pixelllm.commands.locate import as_object, as_text
from pixelllm.images import open_image
from pixelllm.locating import Location
from pixelllm.models.answering import sampler
from pixelllm.overlays import write_objects
from pixelllm.perceiving import PerceptionGPT
from pixelllm.written import Answer


@dataclass(frozen=True)
class AskCommand:
    """Ask a PerceptionGPT about an image; what an answer mentions has a box and a mask.

    Args:
        image: file to look at.
        questions: of any form, each answered on its own; without one, the image is described and
            its objects are marked.
        in_turn: the questions are one conversation: each is read after the answers before it.
        model: folder of a finished run, or a Hub id.
        task: how questions are worded: "pointed" asks for an answer that points at what it
            mentions, "question" for one in a word or two, "conversation" for one of any length,
            "referring" for the place of what is named. By default "pointed" if the model was
            taught it, else "question"; of questions in turn, "conversation".
        beams: beam search width; 1 is greedy.
        sample: draw words at random instead of taking the likeliest.
        temperature: of --sample; below 1 likelier words, above 1 rarer ones.
        top_p: of --sample; draw among the likeliest words that have this probability together.
        seed: of --sample; the same seed gives the same answers.
        json: print one JSON object per question instead of text.
        png: write a picture of all boxes and masks.
        device: auto, cpu, cuda or mps.
        dtype: hold the language trunk in this precision; as the run says by default.
        int8: hold the trunk's weights in 8 bits (needs torchao).
    """

    image: tyro.conf.Positional[Path]
    model: str
    questions: tyro.conf.Positional[tuple[str, ...]] = ()
    in_turn: bool = False
    task: Literal["pointed", "question", "conversation", "referring"] | None = None
    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    json: bool = False
    png: Path | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    int8: bool = False


def ask(command: AskCommand) -> None:
    check_files([command.image], [command.png])
    search = answer_search(search_options(command))
    if not holds_perception(command.model):
        raise ValueError(f"{command.model} is no PerceptionGPT; only those answer questions")
    model = load_any_model(command.model, command.device, command.dtype, command.int8)
    image = open_image(command.image)
    task = command.task or usual_task(model, command.in_turn)
    asked = [model.question(task, question) for question in command.questions]
    torch.manual_seed(command.seed)
    asked = asked or [model.question("grounded")]
    answers = model.ask([image], [asked], in_turn=command.in_turn, **search)[0]
    shown = []
    for question, answer in zip(command.questions or ("",), answers, strict=True):
        unnamed = question if task == "referring" else ""
        found = _named_objects(answer, unnamed)
        shown += found
        if command.json:
            about = {"image": str(command.image), "size_hw": [image.height, image.width]}
            print(json.dumps({**about, "question": question, **answer.to_json()}))
        else:
            print("\n".join([answer.text, *(f"  {as_text(*item)}" for item in found)]))
    if command.png:
        write_objects(image, [as_object(*item) for item in shown], command.png)


def usual_task(model: PerceptionGPT, in_turn: bool) -> str:
    """How questions are worded where nobody says."""
    if in_turn:
        return "conversation"
    taught = {source.task for source in model.config.sources}
    return "pointed" if "pointed" in taught else "question"


def answer_search(search: dict[str, Any]) -> dict[str, Any]:
    """How `PerceptionGPT.ask` chooses words, by what `PixelLLM.generate` is told."""
    if "num_beams" in search:
        return search
    return {"choose": sampler(search["temperature"], search["top_p"])}


def _named_objects(answer: Answer, unnamed: str) -> list[tuple[str, Location]]:
    """Every object with the words that mention it, or `unnamed` where none do."""
    names = [unnamed] * len(answer.objects)
    for mention in answer.mentions:
        for number in mention.objects:
            names[number] = answer.text[mention.start : mention.end]
    return list(zip(names, answer.objects, strict=True))
