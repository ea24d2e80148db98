"""Train a recipe.

    python train.py scenes-tiny --data runs/scenes/train --val runs/scenes/val --out runs/tiny
    python train.py --list

Tables come from the readers, e.g. python -m data.localized_narratives. Every field of a recipe is
an option by its dotted name, e.g. --train.steps 100 --loss.point 5; all of them:

    python train.py scenes-tiny --help

On several devices, with the same curve (docs/cluster.md):

    torchrun --nproc-per-node 8 train.py scenes-tiny --train.accumulate 8 ...
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other

import torch
import tyro
from safetensors import SafetensorError

from pixelllm.config import Config, Eva02Pretraining, SamPretraining
from pixelllm.devices import choose_device
from pixelllm.perception_config import ClipPretraining, PerceptionConfig
from pixelllm.recipes import RECIPES, Recipe
from pixelllm.shards import open_table
from pixelllm.tables import Table
from pixelllm.training import captioning, naming, perceiving, promptable
from pixelllm.training.loop import NonFiniteLoss, Stage, train
from pixelllm.training.parallel import PeerFailed, join, own_device
from pixelllm.training.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes.

    Args:
        data: tables to train on: folders, or Parquet shards anywhere (docs/data.md).
        val: tables to validate on.
        out: folder of the run.
        resume: go on from the newest checkpoint in `out`.
        cache_features: keep the features of frozen encoders in this folder.
        device: auto, cpu, cuda or mps.
        parallel: under torchrun, whether every process holds all weights (ddp) or a share (fsdp).
    """

    data: tuple[str, ...]
    val: tuple[str, ...]
    out: Path
    resume: bool = False
    cache_features: Path | None = None
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"


def recipe_named(name: str) -> Recipe:
    """The recipe. Raises ValueError with the nearest names where there is none."""
    if name not in RECIPES:
        near = ", ".join(difflib.get_close_matches(name, RECIPES) or RECIPES)
        raise ValueError(f"there is no recipe {name!r}; nearest: {near}")
    return RECIPES[name]()


def list_recipes() -> str:
    """The recipes with what they are for, a line each."""
    lines = (f"  {name:25}{(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items())
    return "recipes:\n" + "\n".join(lines)


def parse(recipe: str, arguments: Sequence[str]) -> tuple[Run, Recipe]:
    """Options of a run and the recipe's configuration with its overrides."""
    config = recipe_named(recipe)
    # Options at the top, recipe fields by their dotted names.
    flat = tyro.conf.arg(name="")
    kind = tyro.conf.AvoidSubcommands[type(config)]  # a part that a recipe lacks is no option
    fields = [("run", Annotated[Run, flat]), ("config", Annotated[kind, flat], config)]
    options = make_dataclass("Options", fields)
    prog = f"python train.py {recipe}"
    parsed = tyro.cli(options, prog=prog, description=__doc__, args=arguments)
    return parsed.run, parsed.config


def build(run: Run, config: Recipe, device: torch.device) -> Stage:
    if run.cache_features and not isinstance(config, Config):
        raise ValueError(f"--cache-features: {config.name} has no frozen encoders that it caches")
    # The stages that make a recipe's eyes need all of a table at once.
    opened = open_table if isinstance(config, Config | PerceptionConfig) else Table
    tables, val = ([opened(path) for path in paths] for paths in (run.data, run.val))
    if isinstance(config, SamPretraining):
        return promptable.build_stage(config, tables, val, device)
    if isinstance(config, Eva02Pretraining | ClipPretraining):
        return naming.build_stage(config, tables, val, device)
    if isinstance(config, PerceptionConfig):
        return perceiving.build_stage(config, tables, val, device)
    return captioning.build_stage(config, tables, val, device, run.cache_features)


def run_training(run: Run, config: Recipe) -> None:
    """Train to the last step and export the model to `run.out`."""
    if files := [path for path in (run.out, *run.out.parents) if path.is_file()]:
        raise NotADirectoryError(f"--out {run.out}: {files[0]} is a file; name a folder")
    torch.manual_seed(config.train.seed)
    # Points of a few words leave gradients that fade into denormals: 5 times slower on CPUs.
    torch.set_flush_denormal(True)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = own_device(choose_device(run.device))
    with join(run.parallel, device) as processes:
        stage = processes.first_alone(lambda: build(run, config, device))
        train(stage, config.train, run.out, run.resume, processes)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "--list"):
        listing = list_recipes()
        print(listing if arguments and arguments[0] == "--list" else f"{__doc__}\n{listing}")
        return
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    try:
        run_training(*parse(arguments[0], arguments[1:]))
    except StopRequest as stop:
        if is_first:
            print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except PeerFailed as failure:
        sys.exit(f"error: {failure}" if is_first else 1)
    except KeyboardInterrupt:  # before the first step; what was written so far is complete
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, NonFiniteLoss) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
