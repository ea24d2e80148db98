"""The training loop: one explicit loop for every stage.

A stage says what a batch is, what its loss terms are and how a finished model is saved; the
loop does the rest: accumulate, clip, step, log, validate, checkpoint, resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset

from pixelllm.config import TrainConfig
from pixelllm.training.checkpoint import CheckpointFolder, TrainingState
from pixelllm.training.loader import loader, named_deaths
from pixelllm.training.logs import RunLog
from pixelllm.training.optimizer import build_optimizer, freeze, set_learning_rate
from pixelllm.training.schedule import learning_rate
from pixelllm.training.signals import StopRequest


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
    """A loss term became infinite or NaN."""


def train(stage: Stage, config: TrainConfig, out: Path, resume: bool) -> None:
    """Run the stage to its last step and export the model to `out`.

    Checkpoints lie in `out/checkpoints`; `resume` goes on from the newest, bit for bit as if
    never interrupted. Ctrl-C and SIGTERM write a checkpoint and raise `StopRequest`.
    """
    checkpoints = CheckpointFolder(out / "checkpoints", config.keep)
    if not resume:
        checkpoints.require_none()
    device = next(stage.model.parameters()).device
    freeze(stage.model, config.frozen)
    optimizer = build_optimizer(stage.model, config)
    state = TrainingState(stage.model, optimizer)
    step = checkpoints.load_newest(state) if resume else 0
    log = RunLog(out, step, config.steps)
    batches = loader(stage.batches, step, config, saved=state.loader)
    stage.model.train()
    with log, named_deaths(config.workers), StopRequest.on_signals() as stop:
        while step < config.steps:
            lr = learning_rate(step, config.lr, config.warmup, config.steps)
            set_learning_rate(optimizer, lr)
            terms, num_images = accumulate_gradients(stage, batches, config, step, device)
            grad_norm = clip_grad_norm_(stage.model.parameters(), config.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            log.step(step, terms, num_images)
            if step % config.log_every == 0:
                log.write(step, lr=lr, grad_norm=float(grad_norm))
            if step % config.eval_every == 0 or step == config.steps:
                state.scores = validate(stage)
                log.write(step, **{f"val_{name}": score for name, score in state.scores.items()})
            if step % config.save_every == 0 or step == config.steps or stop.requested:
                state.loader = batches.state_dict()
                checkpoints.save(step, state)
            stop.raise_if_requested(out, step)
    stage.export(out)


def accumulate_gradients(
    stage: Stage, batches: Iterator[Any], config: TrainConfig, step: int, device: torch.device
) -> tuple[dict[str, float], int]:
    """Add up the gradients of one optimizer step; returns the mean terms and images seen."""
    sums: dict[str, float] = {}
    num_images = 0
    for _ in range(config.accumulate):
        batch = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            terms = stage.loss(batch)
        for name, term in terms.items():
            if not torch.isfinite(term):
                ids = ", ".join(name for name in batch.ids if name)
                raise NonFiniteLoss(
                    f"step {step}: the {name} loss is {term.item()}; phrases of the batch: {ids}. "
                    "Lower train.lr, set train.clip, or look at these records."
                )
            sums[name] = sums.get(name, 0.0) + term.item() / config.accumulate
        (sum(terms.values()) / config.accumulate).backward()
        num_images += len(batch)
    return sums, num_images


def validate(stage: Stage) -> dict[str, float]:
    """Scores of the model in evaluation mode, without gradients and without touching the RNG."""
    random_state = torch.get_rng_state()
    stage.model.eval()
    with torch.no_grad():
        scores = stage.validate()
    stage.model.train()
    torch.set_rng_state(random_state)
    return scores
