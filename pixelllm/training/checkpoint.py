"""Training checkpoints: everything a run needs to go on, in safetensors and JSON.

A checkpoint is a folder `step-00000500` with the trainable weights, the optimizer's moments and
the random state. It is written beside and renamed, so a folder of that name is complete. The
last few are kept, and the one with the best validation score.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pixelllm.checkpoints import own_tensors, write_tensors
from pixelllm.files import written_whole
from pixelllm.weights import read_weights, require_fit

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TrainingState:
    """What changes while training.

    `scores` are the last validation's; `loader` says where streamed data stand, as JSON.
    """

    model: nn.Module
    optimizer: Optimizer
    scores: dict[str, float] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """Trainable parameters, and buffers such as the running statistics of a norm."""
        tensors = own_tensors(self.model)
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in tensors.items() if name not in frozen}

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
        stored = {key[7:]: tensor for key, tensor in tensors.items() if key[:7] == "weight."}
        require_fit(stored, weights, "the checkpoint")
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        for name, weight in weights.items():
            with torch.no_grad():
                weight.copy_(stored[name])
            if f"exp_avg.{name}" in tensors:
                for moment in MOMENTS:
                    # AdamW keeps its step count on the CPU.
                    device = "cpu" if moment == "step" else weight.device
                    self.optimizer.state[weight][moment] = tensors[f"{moment}.{name}"].to(device)


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
        facts = {"step": step, "scores": state.scores, "loader": state.loader}
        try:
            with written_whole(self.path(step)) as beside:
                write_tensors(state.tensors(), beside / "state.safetensors")
                (beside / "state.json").write_text(json.dumps(facts))
        except OSError as error:
            raise OSError(
                f"{self.path(step)} could not be written ({error}); checkpoints before it are "
                "intact: make room and go on with --resume"
            ) from error
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
        state.loader = facts.get("loader", {})  # absent in runs from before data were streamed
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
