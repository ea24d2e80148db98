"""`pixelllm import`: parameters of the official release as a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from pixelllm.config import Config
from pixelllm.pretrained import PixelLLM
from pixelllm.recipes import RECIPES
from pixelllm.scenic import load_scenic
from pixelllm.training.captioning import load_tokenizer


@dataclass(frozen=True)
class ImportCommand:
    """Make a run of a parameter file of the official release.

    Args:
        file: a flat .npz or a Flax msgpack file.
        recipe: of the same stage, e.g. joint-bert; train.py --list prints all.
        out: folder of the run to write.
        tokenizer: Hub id or folder; the recipe's by default.
        absent: parts that this stage of the release lacks, e.g. point_head; theirs stay random.
    """

    file: tyro.conf.Positional[Path]
    recipe: str
    out: Path
    tokenizer: str | None = None
    absent: tuple[str, ...] = ()


def import_weights(command: ImportCommand) -> None:
    config = RECIPES[command.recipe]() if command.recipe in RECIPES else None
    if not isinstance(config, Config):
        raise ValueError(f"{command.recipe!r} is no recipe of a whole model; train.py --list")
    language = config.model.language
    name = command.tokenizer or language.trunk or language.tokenizer
    if name is None:
        raise ValueError(f"{command.recipe} trains a tokenizer of its own; give one: --tokenizer")
    tokenizer = load_tokenizer(name)
    model = PixelLLM(as_released(config), tokenizer)
    load_scenic(model, command.file, command.absent)
    model.save_pretrained(command.out)
    print(f"{command.out}: {config.name} with the parameters of {command.file}")


def as_released(config: Config) -> Config:
    """The recipe with all weights in the run, and with the detector's strides of the release."""
    model = config.model
    if model.detector is not None:
        model = replace(model, detector=replace(model.detector, nominal_strides=True))
    return replace(config, model=model, include_frozen=True)
