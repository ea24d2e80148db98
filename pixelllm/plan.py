"""What a training step of a recipe costs, without running it: parameters, memory, FLOPs, time.

Ours. The step is the real one, forward and backward, on tensors that have shapes but no values, so
that there are no formulas to keep up with the model. Every operation is metered as it is
dispatched: what it computes, what it reads and writes, and what is alive at that moment. Time is a
roofline: an operation takes as long as its arithmetic, its memory traffic or its launch, whichever
is longest. That is an estimate: caches make real traffic less, kernels below their peak make it
take longer, and nothing is counted for communication between devices and for reading data.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pixelllm.batches import Batch
from pixelllm.config import Config, Source
from pixelllm.models.pixelllm import Text
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import PerceptionConfig
from pixelllm.plan_perception import build_perception_model, perception_loss
from pixelllm.pretrained import PixelLLM
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.objectives import weighted_losses
from pixelllm.training.optimizer import freeze
from pixelllm.training.parallel import SHARDED_PARTS, blocks
from pixelllm.training.recompute import recompute_blocks

HALF = (torch.bfloat16, torch.float16)
ENOUGH = 1.0  # seconds that an operation is measured for
Planned = Config | PerceptionConfig


class Accelerator(NamedTuple):
    """Published peaks: dense FLOP/s in bfloat16 and float32, bytes/s, bytes; and a launch in s."""

    half: float
    full: float
    bandwidth: float
    memory: float
    launch: float = 5e-6


ACCELERATORS = {
    "L4": Accelerator(121e12, 30e12, 300e9, 24e9),
    "RTX 4090": Accelerator(165e12, 83e12, 1008e9, 24e9),
    "A100 80GB": Accelerator(312e12, 19.5e12, 2039e9, 80e9),
    "H100 SXM": Accelerator(989e12, 67e12, 3350e9, 80e9),
    "H200": Accelerator(989e12, 67e12, 4800e9, 141e9),
    "MI300X": Accelerator(1307e12, 163e12, 5300e9, 192e9),
}


class Operation(NamedTuple):
    """One kernel: its arithmetic, the bytes it reads and writes, and whether in 16 bits."""

    flops: float
    traffic: int
    is_half: bool


@dataclass(frozen=True)
class StepCosts:
    """A micro batch of one process.

    `operations` of the forward and the backward pass, `peak` the most bytes alive besides weights
    and optimizer, gradients included, `forward_peak` before there are any.
    """

    images: int
    forward: Counter[Operation]
    backward: Counter[Operation]
    peak: int
    forward_peak: int

    @property
    def gflops_per_image(self) -> tuple[float, float]:
        """Of the forward and of the backward pass."""
        return tuple(
            sum(op.flops * number for op, number in part.items()) / self.images / 1e9
            for part in (self.forward, self.backward)
        )

    def seconds(self, device: Accelerator) -> float:
        """Of the micro batch, by the roofline."""
        return sum(
            number * max(op.flops / peak, op.traffic / device.bandwidth, device.launch)
            for op, number in (self.forward + self.backward).items()
            for peak in [device.half if op.is_half else device.full]
        )


class Meter(TorchDispatchMode):
    """Records every operation, and how many bytes are alive of what operations made.

    Args:
        given: tensors that are there already, whose views make nothing.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.alive = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in made:
            self.hold(tensor.untyped_storage())
        if not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=result)
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            traffic = sum(x.numel() * x.element_size() for x in [*read, *made])
            is_half = bool(made) and made[0].dtype in HALF
            self.operations[Operation(flops, traffic, is_half)] += 1
        return result

    def hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.release, key, storage.nbytes())

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def build_shapes(config: Planned) -> PixelLLM | PerceptionGPT:
    """The recipe's model without values, frozen and checkpointed as in training."""
    with torch.device("meta"):
        if isinstance(config, PerceptionConfig):
            model = build_perception_model(config)
        else:
            model = PixelLLM(config, train_tokenizer(["a caption"], 100))
    freeze(model, config.train.frozen)
    if config.train.recompute:
        recompute_blocks(model)
    return model


def measure_step(
    config: Planned, model: PixelLLM | PerceptionGPT, source: Source, images: int
) -> StepCosts:
    """Meter forward and backward of a micro batch of one source.

    Args:
        model: of `build_shapes`; its parameters are replaced.
        images: in the micro batch.
    """
    with FakeTensorMode():
        own = {id(tensor): _like(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for module in model.modules():  # tensors that modules share, T5's embeddings, stay one
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    setattr(module, name, own[id(tensor)])
        loss_of = partial(perception_loss, model, config, source, images)
        if isinstance(config, Config):
            loss_of = partial(pixelllm_loss, model, config, make_batch(config, source, images))
        model.train()
        with Meter(own.values()) as meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.bfloat16):
                loss = loss_of()
            forward, forward_peak = Counter(meter.operations), meter.peak
            loss.backward()
    return StepCosts(images, forward, meter.operations - forward, meter.peak, forward_peak)


def pixelllm_loss(model: PixelLLM, config: Config, batch: Batch) -> Tensor:
    return sum(weighted_losses(model, batch, config.loss).values())


def make_batch(config: Config, source: Source, images: int) -> Batch:
    """Tensors of the shapes that training on a source has, every caption of the full length."""
    K = source.proposals_per_image if source.detection_weight else source.phrases_per_image
    R, T, C, frame = images * K, config.max_tokens, config.max_context, config.model.frame
    is_boxed = source.task == "region"  # other tasks ask the whole image, once for all phrases
    masks = torch.zeros(images, K, frame, frame, dtype=torch.bool)
    words, no_padding = torch.zeros(R, T, dtype=torch.long), torch.zeros(R, T, dtype=torch.bool)
    return Batch(
        images=torch.zeros(images, 3, frame, frame, dtype=torch.uint8),
        sizes=torch.full((images, 2), frame),
        features={},
        boxes=torch.zeros(images, K if is_boxed else 1, 4),
        text=Text(words[:, :1].expand(R, C), no_padding[:, :1].expand(R, C), words, no_padding),
        row_padding=no_padding[:, 0],
        points=torch.zeros(R, T, 2, 2),
        with_points=~no_padding,
        masks=masks if source.mask_weight else torch.empty(0),
        # What the detector does depends on what it sees, so its part of the step is left out.
        source=replace(source, detection_weight=0.0),
        ids=("",) * R,
    )


def _like(tensor: Tensor) -> Tensor:
    values = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return (
        nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    )


class Memory(NamedTuple):
    """Bytes that a process needs. Activations hold the temporary results of the worst moment."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def memory_of(model: PixelLLM | PerceptionGPT, steps: Sequence[StepCosts], gpus: int = 1) -> Memory:
    """What a process needs, with weights sharded over `gpus` processes (FSDP) or whole (1).

    Blocks alone are sharded, and come together one by one: the largest one is counted whole.
    """
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = [part for name, part in model.named_children() if name in SHARDED_PARTS]
    divided = [block for part in parts for block in blocks(part)]
    sharded = {id(p) for block in divided for p in block.parameters()}
    is_split = {n for n, p in model.named_parameters() if gpus > 1 and id(p) in sharded}

    def held(names: Iterable[str]) -> int:
        return sum(sizes[n] // gpus if n in is_split else sizes[n] for n in names)

    whole = [sum(p.numel() * p.element_size() for p in b.parameters()) for b in divided]
    gradients = held(learns)
    late = max(step.peak for step in steps) - sum(sizes[n] for n in learns)
    early = max(step.forward_peak for step in steps) - gradients
    activations = max(late, early, 0)
    gathered = max(whole) if is_split else 0
    return Memory(held(sizes) + gathered, gradients, 2 * gradients, activations)


def parameters_by_part(model: PixelLLM | PerceptionGPT) -> dict[str, tuple[int, int]]:
    """Of every part, how many parameters learn and how many are frozen."""
    found = {}
    for name, part in model.named_children():
        learns = sum(p.numel() for p in part.parameters() if p.requires_grad)
        found[name] = (learns, sum(p.numel() for p in part.parameters()) - learns)
    return {name: numbers for name, numbers in found.items() if any(numbers)}


def measure_cpu() -> Accelerator:
    """This processor with torch's threads: the best of several runs of a few large operations."""
    a, half = torch.randn(1024, 1024), torch.randn(1024, 1024, dtype=torch.bfloat16)
    large, other = torch.zeros(2**25), torch.zeros(2**25)  # 128 MiB each, beyond any cache
    small = torch.zeros(1)
    flops = 2 * 1024**3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Accelerator(
        half=flops / _fastest(lambda: F.linear(half, half)),
        full=flops / _fastest(lambda: F.linear(a, a)),
        bandwidth=2 * other.nbytes / _fastest(lambda: other.copy_(large)),
        memory=memory,
        launch=_fastest(lambda: [small.add(1) for _ in range(100)]) / 100,
    )


def _fastest(work: Callable[[], object], times: int = 8) -> float:
    """Seconds of processor time per thread, which a busy machine does not stretch."""
    work()
    found = []
    while len(found) < times and sum(found) < ENOUGH:
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found) / torch.get_num_threads()
