"""What an evaluation of a model on a table comes to: scores, trivial scores and predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelllm.files import write_text

Scores = dict[str, float]


@dataclass(frozen=True)
class Limits:
    """How an evaluation goes through a table.

    Args:
        limit: at most this many examples; None takes all.
        beams: beam search width; 1 is greedy.
        batch_size: images at a time.
    """

    limit: int | None = None
    beams: int = 1
    batch_size: int = 50


@dataclass(frozen=True)
class Evaluation:
    """The outcome of a task.

    Args:
        metrics: of the model.
        baselines: of what `trivial` says, as far as a score of it makes sense.
        num_examples: that were scored.
        trivial: what the baselines are, for people.
        predictions: contents of files by their name, in the formats of public evaluators.
    """

    metrics: Scores
    baselines: Scores
    num_examples: int
    trivial: str
    predictions: dict[str, str]

    def write(self, folder: Path, task: str, config: Mapping[str, Any]) -> None:
        """Write `<task>.json` and the predictions into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.predictions.items():
            write_text(folder / name, text)
        result = {
            "metrics": without_nan(self.metrics),
            "baselines": without_nan(self.baselines),
            "config": config,
            "num_examples": self.num_examples,
        }
        write_text(folder / f"{task}.json", json.dumps(result, indent=2) + "\n")

    def print_table(self, task: str) -> None:
        """One line a score, beside the trivial one."""
        print(f"\n{f'{task}, {self.num_examples} examples':34}{'model':>10}{'baseline':>10}")
        for name, score in self.metrics.items():
            known = name in self.baselines
            print(f"{name:34}{score:10.3f}" + (f"{self.baselines[name]:10.3f}" if known else ""))
        print(f"baseline: {self.trivial}")


def without_nan(scores: Scores) -> dict[str, float | None]:
    """JSON has no NaN: what could not be measured becomes null."""
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def mean_of_known(values: Any) -> float:
    """Mean of what is not NaN; NaN where all is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
