"""Training checkpoints: everything a run needs to go on, in safetensors and JSON.

A checkpoint is a folder `step-00000500` with the trainable weights, the optimizer's moments and
the random state. It is written beside and renamed, so a folder of that name is complete. The
last few are kept, and the one with the best validation score.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pixelllm.checkpoints import misfits
from pixelllm.weights import read_weights

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TrainingState:
    """What changes while training. `scores` are the last validation's."""

    model: nn.Module
    optimizer: Optimizer
    scores: dict[str, float] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """Trainable parameters, and buffers such as the running statistics of a norm."""
        saved = self.model.state_dict().keys()
        buffers = {name: b for name, b in self.model.named_buffers() if name in saved}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad} | buffers

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments and random state under flat names."""
        tensors = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        for name, weight in self.weights().items():
            tensors[f"weight.{name}"] = weight.detach().contiguous()
            for moment, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"{moment}.{name}"] = value
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises ValueError naming the keys that do not fit."""
        weights = self.weights()
        _check_weights(weights, tensors)
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        for name, weight in weights.items():
            with torch.no_grad():
                weight.copy_(tensors[f"weight.{name}"])
            if f"exp_avg.{name}" in tensors:
                moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
                self.optimizer.state[weight] = {
                    # AdamW keeps its step count on the CPU.
                    moment: value if moment == "step" else value.to(weight.device)
                    for moment, value in moments.items()
                }


def _check_weights(weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    stored = {key.removeprefix("weight."): t for key, t in tensors.items() if key[:7] == "weight."}
    problems = misfits(stored, weights)
    if problems:
        raise ValueError("the checkpoint does not fit the recipe: " + "; ".join(problems))


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: holds `step-*` folders.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-????????"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: TrainingState) -> None:
        """Write the checkpoint, then remove what need not be kept."""
        beside = self.folder / f"partial-{step:08d}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            save_file(state.tensors(), beside / "state.safetensors")
            (beside / "state.json").write_text(json.dumps({"step": step, "scores": state.scores}))
            shutil.rmtree(self.path(step), ignore_errors=True)
            os.replace(beside, self.path(step))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.path(step)} could not be written ({error}); checkpoints before it are "
                "intact: make room and go on with --resume"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._remove_old()

    def require_none(self) -> None:
        """Raise ValueError where an earlier run left checkpoints, lest two runs mix."""
        if self.steps():
            raise ValueError(
                f"{self.folder} holds a run at step {self.steps()[-1]}; go on with --resume, "
                "or choose another --out"
            )

    def load_newest(self, state: TrainingState) -> int:
        """Load the newest checkpoint into `state`; returns its step, 0 where there is none."""
        steps = self.steps()
        if not steps:
            return 0
        folder = self.path(steps[-1])
        state.load(read_weights(folder / "state.safetensors"))
        facts = json.loads((folder / "state.json").read_text())
        state.scores = facts["scores"]
        return facts["step"]

    def best(self) -> int | None:
        """The step with the lowest first validation score."""
        scored = []
        for step in self.steps():
            scores = json.loads((self.path(step) / "state.json").read_text())["scores"]
            if scores:
                scored.append((next(iter(scores.values())), step))
        return min(scored)[1] if scored else None

    def _remove_old(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))
