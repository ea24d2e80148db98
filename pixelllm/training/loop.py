"""The training loop: one explicit loop for every stage.

A stage says what a batch is, what its loss terms are and how a finished model is saved; the
loop does the rest: accumulate, clip, step, log, validate, checkpoint, resume. What is random in
a micro batch (dropout, sampled proposals) follows from the seed and its number, as its records
do: resuming needs no state of generators, and any number of processes draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pixelllm.config import TrainConfig
from pixelllm.files import written_whole
from pixelllm.training.checkpoint import START_FOLDER, CheckpointFolder, TrainingState
from pixelllm.training.loader import loader, named_deaths
from pixelllm.training.logs import RunLog
from pixelllm.training.optimizer import build_optimizer, freeze, set_learning_rate
from pixelllm.training.parallel import (
    ALONE,
    Processes,
    RunningStatistics,
    average_gradients,
    clip_gradients,
    distribute,
    gather_weights,
)
from pixelllm.training.schedule import learning_rate
from pixelllm.training.signals import StopRequest, stop_signals


@dataclass(frozen=True)
class Stage:
    """What distinguishes one kind of training from another.

    Args:
        model: on its device; parts to be frozen are named in the configuration.
        batches: map-style, one item per micro batch, with `.to(device)`, `.ids` and a length of
            steps * accumulate.
        loss: the weighted terms of a batch; their sum is minimised.
        validate: scores of the current model; the first one decides which checkpoint is best
            (lower is better).
        export: writes the finished model into a folder.
    """

    model: nn.Module
    batches: Dataset
    loss: Callable[[Any], dict[str, Tensor]]
    validate: Callable[[], dict[str, float]]
    export: Callable[[Path], None]


class NonFiniteLoss(ArithmeticError):
    """A loss term or a gradient became infinite or NaN."""


def train(
    stage: Stage, config: TrainConfig, out: Path, resume: bool, processes: Processes = ALONE
) -> None:
    """Run the stage to its last step and export the model to `out`.

    Checkpoints lie in `out/checkpoints`; `resume` goes on from the newest, bit for bit as if
    never interrupted. `out/start` is the model before the first step. Ctrl-C and SIGTERM, to any
    of the processes, write a checkpoint and raise `StopRequest`.
    """
    num_own = processes.share_of(config.accumulate)
    checkpoints = CheckpointFolder(out / "checkpoints", config.keep, processes)
    if not resume:
        checkpoints.require_none()
    device = next(stage.model.parameters()).device
    freeze(stage.model, config.frozen)
    is_new = not resume or checkpoints.newest() == 0
    write_start(stage, out / START_FOLDER, is_new, processes)
    loss = distribute(stage.model, stage.loss, processes, config.bfloat16)
    stage = replace(stage, loss=loss)
    optimizer = build_optimizer(stage.model, config)
    order = {name: getattr(config, name) for name in ("seed", "batch_size", "accumulate")}
    state = TrainingState(stage.model, optimizer, order)
    step = checkpoints.load_newest(state) if resume else 0
    log = RunLog(out, step, config.steps, writes=processes.is_first)
    streams = state.loader
    batches = loader(stage.batches, step, config, processes.rank, processes.count, streams)
    stage.model.train()
    stopping = stop_signals(at_once_again=processes.count == 1)
    with named_deaths(config.workers), log, stopping as came:
        while step < config.steps:
            lr = learning_rate(step, config.lr, config.warmup, config.steps)
            set_learning_rate(optimizer, lr)
            with processes.together():
                own = list(islice(batches, num_own))
            terms, num_images = accumulate_gradients(stage, own, config, step, device, processes)
            average_gradients(stage.model, processes)
            grad_norm = clip_gradients(stage.model, config.clip)
            if not math.isfinite(grad_norm):  # on all processes: it is the norm of their mean
                ids = ", ".join(name for batch in own for name in batch.ids if name)
                phrases = f"phrases of the step here: {ids}. Lower train.lr, or look at these"
                raise NonFiniteLoss(f"step {step}: the gradient is {grad_norm}; {phrases}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            log.step(terms, num_images)
            if step % config.log_every == 0:
                log.write(step, lr=lr, grad_norm=grad_norm)
            if step % config.eval_every == 0 or step == config.steps:
                state.scores = processes.gather(validate(stage, config, device))[0]
                log.write(step, **{f"val_{name}": score for name, score in state.scores.items()})
            asked = [number for signals in processes.gather(came) for number in signals]
            if step % config.save_every == 0 or step == config.steps or asked:
                state.loader = merged(streams, processes.gather(batches.state_dict()))
                checkpoints.save(step, state)
            if asked:
                raise StopRequest(asked[0], out, step)
    gather_weights(stage.model, processes)
    with processes.together():
        if processes.is_first:
            stage.export(out)


def merged(before: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A dictionary after processes changed their own entries of it, each in its copy."""
    changes = {k: v for part in parts for k, v in part.items() if before.get(k) != v}
    return before | changes


def write_start(stage: Stage, folder: Path, is_new: bool, processes: Processes) -> None:
    """Export the model as it starts, which `pixelllm convert` completes with a checkpoint."""
    with processes.together():
        if processes.is_first and (is_new or not folder.exists()):
            with written_whole(folder) as beside:
                beside.mkdir()
                stage.export(beside)


def accumulate_gradients(
    stage: Stage,
    batches: Iterable[Any],
    config: TrainConfig,
    step: int,
    device: torch.device,
    processes: Processes = ALONE,
) -> tuple[dict[str, float], int]:
    """Add up the gradients of this process's micro batches of one optimizer step.

    Returns:
        The mean terms and the number of images seen, over all processes.
    """
    num_own = processes.share_of(config.accumulate)
    first = step * config.accumulate + processes.rank
    statistics = RunningStatistics(stage.model)
    sums: dict[str, float] = {}
    num_images, fault = 0, None
    for turn, batch in enumerate(batches):
        seed_generators(config.seed, 2, first + turn * processes.count)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            terms = stage.loss(batch)
        (sum(terms.values()) / num_own).backward()
        statistics.take()
        for name, term in terms.items():
            if not torch.isfinite(term):
                ids = ", ".join(name for name in batch.ids if name)
                fault = fault or (
                    f"step {step}: the {name} loss is {term.item()}; phrases of the batch: {ids}. "
                    "Lower train.lr, set train.clip, or look at these records."
                )
            sums[name] = sums.get(name, 0.0) + term.item() / config.accumulate
        num_images += len(batch)
    statistics.step(processes, config.accumulate)
    with processes.together():  # not at once: in a sharded backward pass the others wait for us
        if fault is not None:
            raise NonFiniteLoss(fault)
    shares = processes.gather((sums, num_images))
    names = dict.fromkeys(name for terms, _ in shares for name in terms)
    means = {name: sum(terms.get(name, 0.0) for terms, _ in shares) for name in names}
    return means, sum(count for _, count in shares)


def seed_generators(*numbers: int) -> None:
    """Make all that is random on any device follow from the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def validate(stage: Stage, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Scores of the model in evaluation mode, without gradients; each time with the same draws.

    In the precision of training, which blocks that are sharded have in any case.
    """
    seed_generators(config.seed, 3)
    stage.model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
        scores = stage.validate()
    stage.model.train()
    return scores
