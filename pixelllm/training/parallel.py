"""Training on many processes, wrapped around code for one device.

Process r of W takes the micro batches r, r + W, ... of a step, and gradients are averaged over
all, so a step computes the same whatever W is. Two ways to hold the weights: `ddp`, every
process has all of them, and `fsdp`, the transformer blocks are divided among the processes
(FSDP2, `fully_shard`) while what is small, or what only some sources use, stays whole.

Torch's own DDP is not used: gradients of a step are averaged once, after all its micro batches,
which needs none of its hooks and treats parameters that a source does not reach as one process
does: without a gradient, AdamW leaves them alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

# Parts whose blocks run once for every batch of every source, as FSDP demands of what it shards:
# a block that one process alone runs would wait for the others.
SHARDED_PARTS = ("sam", "eva02", "image_encoder", "language")
BUCKET = 2**26  # gradients that are averaged at a time, 256 MB in float32
# The first process may fill a cache of features while the others wait for it.
TIMEOUT = timedelta(hours=12)

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """Another process met an error, and so this one stops; the message names it."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        rank: of this one.
        count: of all.
        sharded: divide the blocks among them.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """The one that writes, prints and decides."""
        return self.rank == 0

    def share_of(self, accumulate: int) -> int:
        """Micro batches of a step for each. Raises ValueError where they do not come out even."""
        if accumulate % self.count:
            raise ValueError(
                f"train.accumulate {accumulate} cannot be divided among {self.count} processes: "
                f"make it a multiple of {self.count}; batch_size counts all images of a step"
            )
        return accumulate // self.count

    def gather(self, value: Any) -> list[Any]:
        """The value that each process calls this with, by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block on all processes, or by an error on all: `PeerFailed` on the others."""
        if self.count == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:  # whatever it is, the others must not wait for us
            error = caught
        faults = self.gather(error and (str(error) or type(error).__name__))
        if error is not None:
            raise error
        for rank, fault in enumerate(faults):
            if fault is not None:
                raise PeerFailed(f"process {rank}: {fault}")

    def first_alone(self, build: Callable[[], T]) -> T:
        """The result of `build`, which the others run after the first: they find its files."""
        for first in (True, False):
            with self.together():
                if self.is_first == first:
                    result = build()
        return result

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over all processes, in place."""
        for tensor in tensors if self.count > 1 else ():
            dist.all_reduce(tensor)


ALONE = Processes()


@contextmanager
def join(kind: Literal["ddp", "fsdp"], device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone.

    Raises ValueError for `fsdp` without torchrun.
    """
    if not dist.is_torchelastic_launched():
        if kind == "fsdp":
            raise ValueError(
                "--parallel fsdp needs processes: torchrun --nproc-per-node N train.py"
            )
        yield ALONE
        return
    # What processes tell each other goes over the CPU, so that no GPU is waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), kind == "fsdp")
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs, the one of this process of torchrun's."""
    if device.type != "cuda" or not dist.is_torchelastic_launched():
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


class _Whole(nn.Module):
    """The loss as a module: FSDP prepares and ends a pass in the hooks of the outermost one."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self.loss(batch)


def distribute(
    model: nn.Module,
    loss: Callable[[Any], dict[str, Tensor]],
    processes: Processes,
    bfloat16: bool,
) -> Callable[[Any], dict[str, Tensor]]:
    """Start all processes from the first one's weights, and shard the model where wanted.

    Args:
        bfloat16: sharded blocks are gathered and computed in bfloat16; their gradients are
            summed in float32.

    Returns:
        The loss to train with; parameters keep their names.
    """
    if processes.count > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
    if not processes.sharded:
        return loss
    # T5's blocks pass the position bias on; none of them changes it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (processes.count,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, torch.float32)
    parts = [part for name, part in model.named_children() if name in SHARDED_PARTS]
    for block in (block for part in parts for block in blocks(part)):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    whole = _Whole(model, loss)
    rest = {p for p in model.parameters() if not isinstance(p, DTensor)}
    fully_shard(whole, mesh=mesh, ignored_params=rest)
    return whole


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost module lists: the layers of transformers."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def average_gradients(model: nn.Module, processes: Processes) -> None:
    """Average the gradients of whole parameters; FSDP has done so with the sharded ones."""
    if processes.count == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    processes.sum([used])
    for bucket in _buckets([p for p, n in zip(parameters, used.tolist(), strict=True) if n]):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        processes.sum([flat])
        parts = (flat / processes.count).split([p.numel() for p in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in [*bucket, parameter]) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their common norm is at most `max_norm`; returns the norm.

    0 leaves them as they are.
    """
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p, DTensor)]
    whole = [p for p in with_gradient if not isinstance(p, DTensor)]
    norm = get_total_norm([p.grad for p in whole])
    if sharded:
        rest = get_total_norm([p.grad for p in sharded]).full_tensor()
        norm = torch.stack([norm.to(rest.device), rest]).norm()
    # Torch does not mix the two in one call.
    for parameters in (whole, sharded) if max_norm else ():
        clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def gather_weights(model: nn.Module, processes: Processes) -> None:
    """Make the first process's model whole again, in its memory; no pass can follow."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                whole = parameter.detach().full_tensor()
                if processes.is_first:
                    setattr(module, name, nn.Parameter(whole.cpu(), parameter.requires_grad))


class RunningStatistics:
    """Batch norms' running statistics, moved once a step by the mean over its micro batches.

    The order in which one process after another saw the micro batches then does not count.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.buffers = [b for norm in norms if norm.training for b in norm.buffers()]
        self.before = [b.clone() for b in self.buffers]
        self.sums = [torch.zeros_like(b, dtype=torch.float32) for b in self.buffers]

    def take(self) -> None:
        """After a micro batch: note what it made of the statistics, and undo it."""
        for buffer, total, before in zip(self.buffers, self.sums, self.before, strict=True):
            total += buffer
            buffer.copy_(before)

    def step(self, processes: Processes, num_micro_batches: int) -> None:
        """After the last: set the mean over all processes."""
        processes.sum(self.sums)
        for buffer, total in zip(self.buffers, self.sums, strict=True):
            buffer.copy_(total / num_micro_batches)
