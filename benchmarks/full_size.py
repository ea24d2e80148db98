"""The published models at full size on this machine: memory and time of every part.

    python -m benchmarks.full_size              # every part, one after another
    python -m benchmarks.full_size train caption --model bert

Every part runs in a process of its own and is given random weights, in bfloat16 where it is not
trained. Memory is the most that the process ever held (VmHWM), time is processor time, on one
thread. The folder that captions are loaded from is written once and kept (7.3 GiB for T5-XL).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from pixelllm.batches import Batch
from pixelllm.config import Config
from pixelllm.loading import WithoutInitialValues, held_in
from pixelllm.models.pixelllm import Text
from pixelllm.pretrained import PixelLLM
from pixelllm.recipes import RECIPES
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.objectives import weighted_losses
from pixelllm.training.optimizer import build_optimizer, freeze
from pixelllm.training.recompute import recompute_blocks

PARTS = ("forward", "train", "save", "caption", "caption-int8")
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        parts: forward is a teacher-forced pass, train a step of the recipe with gradient
            checkpointing, save writes the folder that the captions load.
        model: the published models.
        tokens: of the caption.
        batch: images of a training step.
        folder: where the saved models lie.
        here: run the parts in this process.
    """

    parts: tyro.conf.Positional[tuple[Literal[PARTS], ...]] = PARTS
    model: Literal["t5xl", "bert"] = "t5xl"
    tokens: int = 8
    batch: int = 1
    folder: Path = Path("runs/full-size")
    here: Annotated[bool, tyro.conf.arg(help="run in this process")] = False


def measure(part: str, options: Options) -> dict[str, Any]:
    """Run a part in a fresh process; its memory in GiB and its times in seconds."""
    command = [sys.executable, "-m", "benchmarks.full_size", part, "--here"]
    for name in ("model", "tokens", "batch", "folder"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_part(part: str, options: Options) -> dict[str, Any]:
    """The times of a part's steps in processor seconds, and the peak memory of this process."""
    torch.set_num_threads(1)
    times: dict[str, float] = {}
    if part.startswith("caption"):
        facts = caption(options, part == "caption-int8", times)
    else:
        facts = {"forward": forward, "train": train, "save": save}[part](options, times)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIBIBYTE
    return {"part": part, "memory": round(peak, 2), "seconds": times, **facts}


def timed(times: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    found = work()
    times[name] = round(time.process_time() - start, 2)
    return found


def recipe(model: str) -> Config:
    """The recipe with its frozen parts in bfloat16, and all weights in its saved models."""
    config = RECIPES[f"ln-coco-{model}"]()
    sam, language = (replace(p, bfloat16=True) for p in (config.model.sam, config.model.language))
    parts = replace(config.model, sam=sam, language=language)
    train = replace(config.train, bfloat16=True, recompute=True)
    return replace(config, model=parts, train=train, include_frozen=True)


def build(config: Config) -> PixelLLM:
    """The model with random weights, drawn in the precision they are held in.

    Constructors would draw them in float32, 15 GB of them, in four minutes.
    """
    with WithoutInitialValues():
        model = PixelLLM(config, train_tokenizer(["a caption"], 100))
    draw_weights(model)
    return model


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Norms of one and weights that keep the variance, tiled from a million normal numbers.

    Shared parameters (T5's embeddings) are one parameter here and stay so.
    """
    normal = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        values = (normal * parameter.shape[-1] ** -0.5).to(parameter.dtype)
        for piece in parameter.view(-1).split(len(normal)):
            piece.copy_(values[: len(piece)])


def inputs(config: Config, model: PixelLLM, batch: int) -> Batch:
    """Images and narrations of the recipe's full length, without padding."""
    generator = torch.Generator().manual_seed(0)
    frame, T = config.model.frame, config.max_tokens

    def ids(length: int) -> Tensor:
        return torch.randint(3, model.language.vocab_size, (batch, length), generator=generator)

    words, context = ids(T), ids(config.max_context)
    words[:, 0], words[:, -1] = model.language.bos_id, model.language.eos_id
    shape = (batch, 3, frame, frame)
    return Batch(
        images=torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator),
        sizes=torch.full((batch, 2), frame),
        features={},
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(batch, 1, 4),
        text=Text(context, torch.zeros_like(context).bool(), words, torch.zeros_like(words).bool()),
        row_padding=torch.zeros(batch, dtype=torch.bool),
        points=torch.rand(batch, T, 2, 2, generator=generator),
        with_points=torch.ones(batch, T, dtype=torch.bool),
        masks=torch.empty(0),
        source=config.sources[-1],
        ids=("random",) * batch,
    )


@torch.no_grad()
def forward(options: Options, times: dict[str, float]) -> dict[str, Any]:
    """Every part of a teacher-forced pass, all in bfloat16."""
    config = held_in(recipe(options.model), torch.bfloat16)
    model = timed(times, "build", lambda: build(config)).eval()
    batch = inputs(config, model, options.batch)
    eva02 = timed(times, "eva02", lambda: model.eva02(batch.images, batch.sizes))
    sam = timed(times, "sam", lambda: model.sam(batch.images, batch.sizes))
    features = model.encode(batch.images, batch.sizes, {"eva02": eva02, "sam": sam})
    timed(times, "extractor", lambda: model.prefix(features, batch.sizes, batch.boxes))
    read = (features, batch.sizes, batch.boxes, batch.text)
    found = timed(times, "extractor, trunk and points", lambda: model.read(*read))
    return {"finite": bool(found.logits.isfinite().all() and found.points.isfinite().all())}


def train(options: Options, times: dict[str, float]) -> dict[str, Any]:
    """A step of the recipe: frozen parts in bfloat16, learned ones in float32 under autocast."""
    config = recipe(options.model)
    model = timed(times, "build", lambda: build(config)).train()
    freeze(model, config.train.frozen)
    recompute_blocks(model)
    optimizer = build_optimizer(model, config.train)
    batch = inputs(config, model, options.batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = timed(times, "forward", lambda: weighted_losses(model, batch, config.loss))
    loss = sum(terms.values())
    timed(times, "backward", loss.backward)
    timed(times, "optimizer", optimizer.step)
    return {"loss": loss.item(), **held(model, optimizer)}


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Parameters that have a gradient, that learn, and that the optimizer keeps moments of."""
    moments = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    return {
        "with_gradient": count(p for p in model.parameters() if p.grad is not None),
        "learned": count(p for p in model.parameters() if p.requires_grad),
        "with_moments": moments,
        "parameters": count(model.parameters()),
    }


def count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def save(options: Options, times: dict[str, float]) -> dict[str, Any]:
    """Write a model that carries all of its weights, encoders and trunk in bfloat16."""
    model = build(held_in(recipe(options.model), torch.bfloat16))
    folder = options.folder / options.model
    timed(times, "save", lambda: model.save_pretrained(folder))
    return {"file": (folder / "model.safetensors").stat().st_size}


@torch.no_grad()
def caption(options: Options, int8: bool, times: dict[str, float]) -> dict[str, Any]:
    """What a user calls: load a folder, caption a picture of 640 x 480 pixels."""
    folder = options.folder / options.model
    load = timed(times, "load", lambda: PixelLLM.from_pretrained(folder, torch.bfloat16, int8))
    image = Image.new("RGB", (640, 480), (90, 120, 40))
    batch = load.processor()([image])
    features = timed(times, "encoders", lambda: load.encode(batch["images"], batch["sizes"], {}))
    rest = {name: value for name, value in batch.items() if name != "images"}
    write = {**rest, "features": features, "max_new_tokens": options.tokens}
    found = timed(times, f"{options.tokens} tokens", lambda: load.caption_boxes(**write))[0]
    return {"log_prob": found.log_prob}


def main(options: Options) -> None:
    if options.here:
        print(json.dumps(run_part(options.parts[0], options)))
        return
    print(f"ln-coco-{options.model}, one thread, seconds of processor time")
    for part in options.parts:
        if (part, options.model) == ("caption-int8", "bert"):  # whose trunk is small
            continue
        found = measure(part, options)
        times = ", ".join(f"{name} {seconds}" for name, seconds in found.pop("seconds").items())
        rest = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("part", "memory"))
        print(f"{part:14}{found['memory']:6.2f} GiB  {times}  ({rest})", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
