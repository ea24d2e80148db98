"""Gradient checkpointing: the backward pass computes the insides of blocks anew.

Ours: what a block of EVA02, the extractor or the trunk computes is dropped after its forward pass
but for its input, so that a step of the published model needs the memory of one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pixelllm.training.parallel import blocks


def recompute_blocks(module: nn.Module) -> None:
    """Checkpoint every block of the module's stacks of blocks, in place."""
    for block in blocks(module):
        block.forward = partial(_run, block.forward)


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
