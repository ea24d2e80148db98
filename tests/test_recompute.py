"""Gradient checkpointing changes the memory of a step, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import joint_tables, make_tiny_joint_config, short_training

from pixelllm.tables import Table
from pixelllm.training.captioning import build_stage


def step(config, tables) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name of a training step with dropout, and the bytes kept for its backward."""
    torch.manual_seed(0)
    stage = build_stage(config, tables, tables, torch.device("cpu"))
    stage.model.train()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(stage.loss(stage.batches[0]).values())
    loss.backward()
    gradients = {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}
    weights = {p.untyped_storage().data_ptr() for p in stage.model.parameters()}
    return gradients, sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("architecture", ["t5", "git", "llama"])
def test_recomputing_gives_the_same_gradients_with_less_memory(architecture, tiny_tables):
    """Dropout drawn anew in the backward pass would give those of another network."""
    tables = [Table(path) for path in joint_tables(tiny_tables)[0]]
    train = short_training(2, frozen=("sam", "prompt_encoder"))
    config = make_tiny_joint_config(train=train)
    language = replace(config.model.language, architecture=architecture, width=24, dropout=0.3)
    config = replace(config, model=replace(config.model, language=language))
    expected, kept = step(config, tables)
    found, kept_less = step(replace(config, train=replace(train, recompute=True)), tables)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert kept_less < 0.8 * kept
