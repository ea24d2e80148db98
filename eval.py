"""Evaluate a run.

    python eval.py runs/quickstart --data runs/quickstart/data/narrations_val
    python eval.py runs/quickstart --data runs/quickstart/data/narrations_val --beams 4 --limit 100

Prints one table, writes RUN/eval/trace.json and RUN/eval/trace_predictions.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other

import numpy as np
import tyro

from data.scene_narrations import object_mentions
from pixelllm.checkpoints import write_text
from pixelllm.devices import choose_device
from pixelllm.evaluation import narrations as trace
from pixelllm.evaluation import objects
from pixelllm.evaluation.meteor import score_meteor, unavailable_reason
from pixelllm.evaluation.narrations import Narration, narrative_line
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import REPORT_FILE, Table
from pixelllm.training.captioning import BASELINE_FILE

Scores = dict[str, float]


@dataclass(frozen=True)
class Options:
    """What to evaluate.

    Args:
        run: folder of a finished run, or a Hub id.
        task: what is scored.
        data: table with the references.
        limit: at most this many narrations.
        beams: beam search width; 1 is greedy.
        batch_size: images at a time.
        truth: what the images show, by image id; found beside the annotations of scenes.
        out: where to write; RUN/eval by default.
        device: auto, cpu, cuda or mps.
    """

    run: Annotated[Path, tyro.conf.Positional]
    data: Path
    task: Literal["trace"] = "trace"
    limit: int | None = None
    beams: int = 1
    batch_size: int = 50
    truth: Path | None = None
    out: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("limit", "beams", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.truth is not None and not self.truth.is_file():
            raise FileNotFoundError(f"--truth {self.truth}: no such file")


def evaluate(options: Options) -> None:
    model = PixelLLM.from_pretrained(options.run).to(choose_device(options.device))
    table = Table(options.data)
    limits = {"limit": options.limit, "batch_size": options.batch_size}
    found = list(trace.predict_narrations(model, table, num_beams=options.beams, **limits))
    captions = training_captions(options.run, found)
    metrics = trace.score_narrations(found) | meteor(found)
    baselines = trace.score_baselines(found, captions)
    truth_file = options.truth or find_truth(table)
    if truth_file is not None:
        truths = truths_of(found, objects.load_truth(truth_file))
        metrics |= object_scores(found, truths)
        unseen = [pair for pair in zip(found, truths, strict=True) if pair[1].is_held_out]
        if unseen:
            scores = object_scores(*zip(*unseen, strict=True))
            metrics |= {f"held_out_{name}": score for name, score in scores.items()}
        baselines |= object_baselines(found, truths, captions)
    out = options.out or options.run / "eval"
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(narrative_line(narration)) + "\n" for narration in found)
    write_text(out / "trace_predictions.jsonl", "".join(lines))
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    result = {
        "metrics": without_nan(metrics),
        "baselines": without_nan(baselines),
        "config": {**config, "recipe": model.config.name},
        "num_examples": len(found),
    }
    write_text(out / "trace.json", json.dumps(result, indent=2) + "\n")
    print_table(metrics, baselines, len(found))


def without_nan(scores: Scores) -> dict[str, float | None]:
    """JSON has no NaN: what could not be measured becomes null."""
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def find_truth(table: Table) -> Path | None:
    """The truth file that data.scenes writes beside the annotations a table was made from."""
    report = json.loads((table.path / REPORT_FILE).read_text())
    for file in map(Path, report.get("files", [])):
        truth = file.with_name(file.name.split("_localized_narratives")[0] + "_truth.jsonl")
        if truth.exists():
            return truth
    return None


def training_captions(run: Path, found: list[Narration]) -> list[str]:
    """Captions for the baseline: the run's sample of its training data, else the references."""
    file = run / BASELINE_FILE
    return json.loads(file.read_text()) if file.exists() else [n.phrase.caption for n in found]


def meteor(found: list[Narration]) -> Scores:
    reason = unavailable_reason()
    if reason is not None:
        print(f"METEOR is left out: {reason}", file=sys.stderr)
        return {}
    hypotheses = {n.phrase.id: n.generated.text for n in found}
    return {"meteor": score_meteor(hypotheses, {n.phrase.id: [n.phrase.caption] for n in found})}


def truths_of(
    found: list[Narration], known: dict[str, objects.ObjectTruth]
) -> list[objects.ObjectTruth]:
    """The truth of every narration's image. Raises ValueError where there is none."""
    names = [narration.record.id.rpartition("/")[2] for narration in found]
    absent = [name for name in names if name not in known]
    if absent:
        raise ValueError(f"the truth says nothing of image {absent[0]}; is it of the same scenes?")
    return [known[name] for name in names]


def object_scores(found: Sequence[Narration], truths: Sequence[objects.ObjectTruth]) -> Scores:
    forced = objects.score_forced(found, truths, [n.word_boxes for n in found])
    generated = [n.generated for n in found]
    return forced | objects.score_generated(generated, truths, object_mentions)


def object_baselines(
    found: list[Narration], truths: list[objects.ObjectTruth], captions: list[str]
) -> Scores:
    middle = [np.full_like(n.word_boxes, 0.5) for n in found]
    drawn = trace.random_captions(len(found), captions)
    forced = objects.score_forced(found, truths, middle)
    return forced | objects.score_generated(drawn, truths, object_mentions)


def print_table(metrics: Scores, baselines: Scores, count: int) -> None:
    print(f"\n{'trace, ' + str(count) + ' narrations':34}{'model':>10}{'baseline':>10}")
    for name, score in metrics.items():
        baseline = f"{baselines[name]:10.3f}" if name in baselines else f"{'-':>10}"
        print(f"{name:34}{score:10.3f}{baseline}")
    print("baseline: a point in the image centre, a random training caption")


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        evaluate(tyro.cli(Options, prog="python eval.py", description=__doc__, args=arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # nothing is written before the last score


if __name__ == "__main__":
    main()
