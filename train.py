"""Train a recipe.

    python train.py scenes-tiny --data runs/scenes/train --val runs/scenes/val --out runs/tiny
    python train.py --list

Every field of the recipe is an option, e.g. --train.steps 100 --loss.point 5.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other

import torch
import tyro

from pixelllm.config import Config, Eva02Pretraining, SamPretraining
from pixelllm.devices import choose_device
from pixelllm.recipes import RECIPES
from pixelllm.tables import Table
from pixelllm.training import captioning, naming, promptable
from pixelllm.training.loop import NonFiniteLoss, Stage, train
from pixelllm.training.signals import StopRequest


Recipe = Config | SamPretraining | Eva02Pretraining


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes.

    Args:
        data: tables to train on.
        val: table to validate on.
        out: folder of the run.
        resume: go on from the newest checkpoint in `out`.
        cache_features: keep the features of frozen encoders in this folder.
        device: auto, cpu, cuda or mps.
    """

    data: tuple[Path, ...]
    val: Path
    out: Path
    resume: bool = False
    cache_features: Path | None = None
    device: str = "auto"


def parse(recipe: str, arguments: list[str]) -> tuple[Run, Recipe]:
    """Options of a run and the recipe's configuration with its overrides."""
    config = RECIPES[recipe]()
    # Options at the top, recipe fields by their dotted names.
    kind = Annotated[type(config), tyro.conf.arg(name="")]
    options = make_dataclass("Options", [("run", Annotated[Run, tyro.conf.arg(name="")]), ("config", kind, config)])
    parsed = tyro.cli(options, prog=f"python train.py {recipe}", description=__doc__, args=arguments)
    return parsed.run, parsed.config


def build(run: Run, config: Recipe) -> Stage:
    tables, val = [Table(path) for path in run.data], Table(run.val)
    device = choose_device(run.device)
    if isinstance(config, SamPretraining):
        return promptable.build_stage(config, tables, val, device)
    if isinstance(config, Eva02Pretraining):
        return naming.build_stage(config, tables, val, device)
    return captioning.build_stage(config, tables, val, device, run.cache_features)


def main() -> None:
    arguments = sys.argv[1:]
    recipe, rest = arguments[0], arguments[1:]
    run, config = parse(recipe, rest)
    torch.manual_seed(config.train.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    try:
        train(build(run, config), config.train, run.out, run.resume)
    except StopRequest as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except (ValueError, FileNotFoundError, NonFiniteLoss) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
