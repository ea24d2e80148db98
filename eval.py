"""Evaluate a run.

    python eval.py runs/quickstart --data runs/quickstart/data/narrations_val
    python eval.py runs/joint-refseg --task dense --data runs/scenes/regions_val --limit 100

Prints one table, writes RUN/eval/TASK.json and the predictions in the formats of public tools.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other

import tyro

from data.scene_expressions import parse_region
from data.scene_narrations import object_mentions
from pixelllm.commands.given import load_any_model
from pixelllm.evaluation.answers import evaluate_answers, evaluate_grounded
from pixelllm.evaluation.boxes import evaluate_dense, evaluate_regions
from pixelllm.evaluation.described import evaluate_captions
from pixelllm.evaluation.expressions import evaluate_expressions
from pixelllm.evaluation.meteor import unavailable_reason
from pixelllm.evaluation.meteor_data import MeteorUnavailable
from pixelllm.evaluation.objects import find_truth, load_truth
from pixelllm.evaluation.report import Evaluation, Limits
from pixelllm.evaluation.trace import evaluate_trace
from pixelllm.perceiving import PerceptionGPT
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table
from pixelllm.training.captioning import BASELINE_FILE

Task = Literal[
    "trace", "caption", "referring", "segmentation", "region", "dense", "grounded", "vqa", "pointed"
]


@dataclass(frozen=True)
class Options:
    """What to evaluate.

    Args:
        run: folder of a finished run, or a Hub id.
        task: what is scored.
        data: table with the references.
        limit: at most this many narrations, expressions or regions; images of dense captions.
        beams: beam search width; 1 is greedy.
        batch_size: images at a time.
        max_detections: objects per image of dense captions.
        in_turn: the questions about an image are rounds of one conversation.
        snap: locate expressions at the detected box that fits best.
        truth: what the images show, by image id; found beside the annotations of scenes.
        out: where to write; by default RUN/eval, of a Hub id eval/NAME.
        device: auto, cpu, cuda or mps.
        dtype: hold image encoders and language trunk in this precision; as the run says by default.
        int8: hold the trunk's weights in 8 bits (needs torchao).
    """

    run: Annotated[Path, tyro.conf.Positional]
    data: Path
    task: Task = "trace"
    limit: int | None = None
    beams: int = 1
    batch_size: int = 50
    max_detections: int = 100
    in_turn: bool = False
    snap: bool = False
    truth: Path | None = None
    out: Path | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    int8: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "beams", "batch_size", "max_detections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.truth is not None and not self.truth.is_file():
            raise FileNotFoundError(f"--truth {self.truth}: no such file")


def evaluate(options: Options) -> None:
    model = load_any_model(str(options.run), options.device, options.dtype, options.int8)
    is_local = options.run.is_dir()
    out = options.out or (options.run / "eval" if is_local else Path("eval") / options.run.name)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is known before the work
    found = score(options, model)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    found.write(out, options.task, {**config, "recipe": model.config.name})
    found.print_table(options.task)


def score(options: Options, model: PixelLLM | PerceptionGPT) -> Evaluation:
    """The task's predictions and scores."""
    table = Table(options.data)
    limits = Limits(options.limit, options.beams, options.batch_size)
    task = (model, table, limits)
    check_task(options, model)
    if options.task in ("vqa", "pointed"):
        return evaluate_answers(*task, options.in_turn, options.task)
    if options.task == "caption":
        return evaluate_captions(*task, training_captions(options.run, "caption"))
    if options.task == "grounded":
        return evaluate_grounded(*task, training_captions(options.run, "grounded"))
    if options.task in ("region", "dense"):
        captions = training_captions(options.run, "region")
        if options.task == "region":
            return evaluate_regions(*task, captions, parse_region)
        return evaluate_dense(*task, captions, options.max_detections)
    truth_file = options.truth or find_truth(table)
    known = load_truth(truth_file) if truth_file else None
    if options.task == "trace":
        captions = training_captions(options.run, "narration")
        return evaluate_trace(*task, captions, known, object_mentions)
    labels = {k: v for truth in (known or {}).values() for k, v in truth.expressions.items()}
    return evaluate_expressions(*task, labels, options.task == "segmentation", options.snap)


def check_task(options: Options, model: PixelLLM | PerceptionGPT) -> None:
    """Raise ValueError for a task that the run's kind of model does not do."""
    is_perception = isinstance(model, PerceptionGPT)
    others = ("trace", "dense") if is_perception else ("grounded", "vqa", "pointed")
    if options.task in others:
        raise ValueError(
            f"{options.run} is a {type(model).__name__}, which has no task {options.task!r}"
        )
    if options.task in ("region", "dense") and (reason := unavailable_reason()):
        raise ValueError(f"--task {options.task} needs METEOR: {reason}")
    if options.in_turn and options.task != "vqa":
        raise ValueError(f"--in-turn is for --task vqa, not {options.task!r}")
    if options.snap and options.task not in ("referring", "segmentation"):
        raise ValueError(f"--snap is for referring and segmentation, not {options.task!r}")
    if options.snap and is_perception:
        raise ValueError(f"--snap: {options.run} is a PerceptionGPT, which has no detector")


def training_captions(run: Path, task: str) -> list[str]:
    """The run's sample of its training captions of a task, empty where it has none."""
    file = run / BASELINE_FILE
    return json.loads(file.read_text()).get(task, []) if file.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        evaluate(tyro.cli(Options, prog="python eval.py", description=__doc__, args=arguments))
    except (ValueError, OSError, MeteorUnavailable) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # nothing is written before the last score


if __name__ == "__main__":
    main()
