"""Training checkpoints: everything a run needs to go on, in safetensors and JSON.

A checkpoint is a folder `step-00000500` with the trainable weights and the optimizer's moments.
It is written beside and renamed, so a folder of that name is complete. The last few are kept,
and the one with the best validation score.

Whole weights are one file that the first process writes. Sharded ones are a file a process, by
`torch.distributed.checkpoint` in its safetensors layout: where each piece lies is in the headers,
so the pickled `.metadata` of its own format does not exist. Both are read through that package,
by any number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pixelllm.checkpoints import WEIGHTS_FILE, own_tensors, write_tensors
from pixelllm.files import written_whole
from pixelllm.training.parallel import ALONE, PeerFailed, Processes
from pixelllm.weights import read_weights, require_fit

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_FILE = "state.json"
START_FOLDER = "start"  # of a run: the model before the first step


@dataclass
class TrainingState:
    """What changes while training.

    `scores` are the last validation's; `loader` says where streamed data stand, as JSON; `order`
    are the settings that a run cannot go on without, since its batches follow from them.
    """

    model: nn.Module
    optimizer: Optimizer
    order: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """Trainable parameters, and buffers such as the running statistics of a norm."""
        tensors = own_tensors(self.model)
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in tensors.items() if name not in frozen}

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments under flat names; they share the memory of the originals."""
        tensors = {}
        for name, weight in self.weights().items():
            tensors[f"weight.{name}"] = weight.detach()
            for moment, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"{moment}.{name}"] = value
        return tensors

    def load(self, folder: Path, stored: dict[str, Tensor]) -> None:
        """Read a checkpoint of `stored_tensors`. Raises ValueError listing keys that do not fit."""
        weights = self.weights()
        found = {key[7:]: tensor for key, tensor in stored.items() if key[:7] == "weight."}
        require_fit(found, weights, "the checkpoint")
        for name, weight in weights.items():
            if f"exp_avg.{name}" in stored:
                moments = {moment: torch.zeros_like(weight) for moment in MOMENTS}
                # The fused AdamW keeps its step count, a float32, beside the weight.
                step = torch.zeros((), device=weight.device)
                self.optimizer.state[weight] = {"step": step, **moments}
        read_into(self.tensors(), folder)


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: holds `step-*` folders.
        keep: how many of the newest stay.
        processes: all of them call the methods that take or give a state; the first looks into
            the folder, which all can read.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.keep = keep
        self.processes = processes

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-????????"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: TrainingState) -> None:
        """Write the checkpoint, then remove what need not be kept."""
        tensors = state.tensors()
        shards = self.folder / "shards.partial"
        is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        try:
            if is_sharded:
                self._write_shards(step, tensors, shards)
            with self.processes.together(), self._explained(step):
                if self.processes.is_first:
                    with written_whole(self.path(step)) as beside:
                        if is_sharded:
                            shards.rename(beside)
                        else:
                            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                            write_tensors(whole, beside / "state.safetensors")
                        facts = {"step": step, "scores": state.scores, "loader": state.loader}
                        facts["order"] = state.order
                        facts["files"] = len(list(beside.glob("*.safetensors")))
                        (beside / STATE_FILE).write_text(json.dumps(facts))
                    self._remove_old()
        except (OSError, PeerFailed):
            if self.processes.is_first:
                shutil.rmtree(shards, ignore_errors=True)  # they hold the room that is missing
            raise

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path(step)} could not be written ({error}); checkpoints before it are "
                "intact: make room and go on with --resume"
            ) from error

    def _write_shards(self, step: int, tensors: dict[str, Tensor], folder: Path) -> None:
        """Every process writes a file of what it holds."""
        with self.processes.together():
            if self.processes.is_first:
                shutil.rmtree(folder, ignore_errors=True)  # of processes that were killed
        with self.processes.together(), self._explained(step):
            try:
                writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
                dcp.save(tensors, storage_writer=writer)
            except CheckpointException as error:  # on all processes, by rank whose fault it was
                if self.processes.rank in error.failures:
                    raise OSError(str(error.failures[self.processes.rank][0])) from error

    def require_none(self) -> None:
        """Raise ValueError where an earlier run left checkpoints, lest two runs mix."""
        if newest := self.newest():
            raise ValueError(
                f"{self.folder} holds a run at step {newest}; go on with --resume, "
                "or choose another --out"
            )

    def newest(self) -> int:
        """The step of the newest checkpoint as the first process sees it; 0: there is none."""
        return self.processes.gather([0, *self.steps()][-1])[0]

    def load_newest(self, state: TrainingState) -> int:
        """Load the newest checkpoint, however many processes wrote it; returns its step or 0.

        Raises ValueError naming a damaged file and what is left, or keys that do not fit.
        """
        step = self.newest()
        if step:
            with self.processes.together():
                try:
                    stored, facts = stored_tensors(self.path(step)), stored_facts(self.path(step))
                except ValueError as error:
                    before = [0, *self.steps()][-2]
                    remedy = f"remove {self.path(step)} to go on from step {before}"
                    raise ValueError(f"{error}; {remedy}") from error
                self._require_order(step, facts.get("order", {}), state.order)
                state.load(self.path(step), stored)
            state.scores = facts["scores"]
            state.loader = facts.get("loader", {})  # absent in runs from before data were streamed
        return step

    def _require_order(self, step: int, before: dict[str, int], now: dict[str, int]) -> None:
        for name, value in before.items():
            if now.get(name, value) == value:
                continue
            raise ValueError(
                f"{self.path(step)} was made with train.{name} {value}, now {now[name]}: other "
                f"batches would follow. Give --train.{name.replace('_', '-')} {value}, or start a "
                "run of its own from it (--start.run, another --out)"
            )

    def best(self) -> int | None:
        """The step with the lowest first validation score."""
        scored = []
        for step in self.steps():
            scores = stored_facts(self.path(step))["scores"]
            if scores and math.isfinite(next(iter(scores.values()))):
                scored.append((next(iter(scores.values())), step))
        return min(scored)[1] if scored else None

    def _remove_old(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            if step not in kept:  # half removed, it must not look like a checkpoint
                self.path(step).rename(self.path(step).with_suffix(".old"))
        for old in self.folder.glob("*.old"):
            shutil.rmtree(old)


def stored_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors. Raises ValueError naming a file that is damaged."""
    file = folder / STATE_FILE
    try:
        return json.loads(file.read_text())
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{file}: missing or damaged ({error})") from error


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes in a checkpoint, as tensors without memory.

    Raises ValueError naming a file that is damaged, or saying how many are gone.
    """
    files = sorted(folder.glob("*.safetensors"))
    expected = stored_facts(folder).get("files", 1)
    if len(files) < expected:
        raise ValueError(f"{folder}: {len(files)} of its {expected} .safetensors files are there")
    for file in files:
        read_weights(file)
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
    }


def read_into(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors, whole or shards, with what a checkpoint has under their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that each process reads for itself
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def convert_checkpoint(run: Path, step: int | None, out: Path) -> int:
    """Write the model of a checkpoint into `out`: the run's start with the weights of `step`.

    None takes the newest; returns the step.

    Raises:
        FileNotFoundError: the run has no such checkpoint, or not its start.
        ValueError: the run's models do not have the checkpoint's weights.
    """
    checkpoints, start = CheckpointFolder(run / "checkpoints", keep=1), run / START_FOLDER
    steps = checkpoints.steps()
    step = [0, *steps][-1] if step is None else step
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{run}: no checkpoint of step {step}; there are: {there}")
    if not (start / WEIGHTS_FILE).exists():
        raise FileNotFoundError(f"{start} is missing: go on with --resume once, which writes it")
    model = read_weights(start / WEIGHTS_FILE)
    folder = checkpoints.path(step)
    stored = stored_tensors(folder)
    trained = {name: stored[key] for name in model if (key := f"weight.{name}") in stored}
    if not trained:
        raise ValueError(f"{run}: its models are saved in parts; only the end of training does so")
    require_fit({name: model[name] for name in trained}, trained, str(start))
    trained = {name: torch.empty_like(tensor, device="cpu") for name, tensor in trained.items()}
    read_into({f"weight.{name}": tensor for name, tensor in trained.items()}, folder)
    shutil.copytree(start, out, ignore=shutil.ignore_patterns(WEIGHTS_FILE), dirs_exist_ok=True)
    write_tensors(model | trained, out / WEIGHTS_FILE)
    return step
