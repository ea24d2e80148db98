"""`pixelllm info`: what a run is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from pixelllm.commands.given import load_any_model

TASKS = (
    "trace",
    "caption",
    "referring",
    "segmentation",
    "region",
    "dense",
    "grounded",
    "vqa",
    "pointed",
)
MAIN_SCORES = (
    "object_precision",
    "object_recall",
    "generated_point_in_box",
    "object_point_in_box",
    "object_point_l1",
    "point_l1",
    "lbm_k0",
    "box_precision",
    "mask_ciou",
    "meteor",
    "cider_d",
    "map",
    "map_detection",
    "phrase_precision",
    "exact_answers",
)


@dataclass(frozen=True)
class InfoCommand:
    """Print what a run is: sizes, parameters and its main scores.

    Args:
        model: folder of a finished run, or a Hub id.
    """

    model: tyro.conf.Positional[str]


def info(command: InfoCommand) -> None:
    model = load_any_model(command.model, "cpu")
    config = model.config
    print(f"{config.name}: frame {config.model.frame} px, {len(model.tokenizer)} tokens")
    for name, part in model.named_children():
        print(f"  {name:16}{sum(p.numel() for p in part.parameters()):>14,} parameters")
    for task in TASKS:
        file = Path(command.model) / "eval" / f"{task}.json"
        if file.exists():
            print_scores(task, json.loads(file.read_text()))


def print_scores(task: str, result: dict[str, Any]) -> None:
    """The main scores of an evaluation; null is what could not be measured."""
    print(f"{task}, {result['num_examples']} examples{'model':>19}{'trivial':>10}")
    for name in (name for name in MAIN_SCORES if name in result["metrics"]):
        scores = (result["metrics"][name], result["baselines"].get(name))
        shown = ("-" if score is None else f"{score:.3f}" for score in scores)
        print(f"  {name:32}" + "".join(f"{score:>10}" for score in shown))
