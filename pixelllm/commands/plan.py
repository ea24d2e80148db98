"""`pixelllm plan`: what training a recipe takes, before anything is bought or started."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import tyro

from pixelllm.commands.given import check_at_least_one
from pixelllm.plan import (
    ACCELERATORS,
    Accelerator,
    Memory,
    Planned,
    StepCosts,
    build_shapes,
    measure_cpu,
    measure_step,
    memory_of,
    parameters_by_part,
)
from pixelllm.recipes import RECIPES

GIBIBYTE = 2**30


@dataclass(frozen=True)
class PlanCommand:
    """Estimate parameters, memory and time of a recipe's training step.

    Args:
        recipe: its name; train.py --list prints all.
        gpus: processes, one device each.
        memory: of a device, in GiB.
        images: of a micro batch; the recipe's by default.
        tokens: of a caption; by default the most that the recipe allows. Of a PerceptionGPT, the
            most of an image with its conversations, of 64 words a phrase.
        recompute: with gradient checkpointing (--train.recompute).
        bfloat16: compute, and hold what is frozen, in bfloat16 (--train.bfloat16
            --model.sam.bfloat16 --model.language.bfloat16).
        json: print one JSON object instead of text.
    """

    recipe: tyro.conf.Positional[str]
    gpus: int = 1
    memory: float = 80.0
    images: int | None = None
    tokens: int | None = None
    recompute: bool = False
    bfloat16: bool = False
    json: bool = False


def plan(command: PlanCommand) -> None:
    for name in ("gpus", "images", "tokens"):
        value = getattr(command, name)
        check_at_least_one(f"--{name}", 1 if value is None else value)
    if not 0 < command.memory < math.inf:
        raise ValueError(f"--memory {command.memory}: expected GiB above 0")
    config = configure(command)
    found = estimate(config, command)
    print(json.dumps(found, indent=2) if command.json else as_text(found, command))


def configure(command: PlanCommand) -> Planned:
    """The recipe with the command's changes.

    Raises ValueError where there is none of that name, or one without a trunk.
    """
    if command.recipe not in RECIPES:
        raise ValueError(f"there is no recipe {command.recipe!r}; python train.py --list")
    config = RECIPES[command.recipe]()
    if not isinstance(config, Planned):
        raise ValueError(f"{config.name} trains eyes alone; plan takes recipes of whole models")
    train = replace(
        config.train,
        recompute=command.recompute or config.train.recompute,
        bfloat16=command.bfloat16 or config.train.bfloat16,
    )
    if command.bfloat16:
        model = config.model
        parts = {
            name: replace(getattr(model, name), bfloat16=True)
            for name in ("sam", "language")
            if hasattr(model, name)
        }
        config = replace(config, model=replace(model, **parts))
    return replace(config, train=train, max_tokens=command.tokens or config.max_tokens)


def estimate(config: Planned, command: PlanCommand) -> dict[str, Any]:
    """Everything that is printed; memory in bytes of a process, speed of all processes."""
    images = command.images or images_at_once(config, command.gpus)
    model = build_shapes(config)
    steps = [(s.weight, measure_step(config, model, s, images)) for s in config.sources]
    costs = [found for _, found in steps]
    memory = {"whole": memory_of(model, costs)}
    if command.gpus > 1:
        memory["sharded"] = memory_of(model, costs, command.gpus)
    speeds = {name: command.gpus * speed(steps, device) for name, device in ACCELERATORS.items()}
    flops = [mean([(w, costs.gflops_per_image[part]) for w, costs in steps]) for part in (0, 1)]
    return {
        "recipe": config.name,
        "processes": command.gpus,
        "images": images,
        "tokens": config.max_tokens,
        "learned_and_frozen": parameters_by_part(model),
        "memory": {name: {**m._asdict(), "total": m.total} for name, m in memory.items()},
        "fits": [name for name, m in memory.items() if m.total <= command.memory * GIBIBYTE],
        "gflops_per_image": {"forward": flops[0], "backward": flops[1]},
        "images_per_second": {"this processor": speed(steps, measure_cpu()), **speeds},
        "left_out": ["detector"] if getattr(config.model, "detector", None) else [],
    }


def images_at_once(config: Planned, gpus: int) -> int:
    """Images of a micro batch; accumulation is a multiple of the processes."""
    accumulate = -(-config.train.accumulate // gpus) * gpus
    return max(config.train.batch_size // accumulate, 1)


def speed(steps: list[tuple[float, StepCosts]], device: Accelerator) -> float:
    """Images per second, over the recipe's mixture of sources."""
    return 1 / mean([(w, costs.seconds(device) / costs.images) for w, costs in steps])


def mean(weighted: list[tuple[float, float]]) -> float:
    return sum(w * value for w, value in weighted) / sum(w for w, _ in weighted)


def remedy(command: PlanCommand) -> str:
    """The least change that fits: recompute, then bfloat16, then fewer images at once."""
    budget, flags = command.memory * GIBIBYTE, []
    for flag in ("recompute", "bfloat16"):
        flags += [] if getattr(command, flag) else [flag]
        changed = replace(command, **dict.fromkeys(flags, True))
        config = configure(changed)
        images = command.images or images_at_once(config, command.gpus)
        model = build_shapes(config)
        costs = [measure_step(config, model, source, images) for source in config.sources]
        memory = memory_of(model, costs, command.gpus)
        if memory.total <= budget:
            break
    options = [f"--{flag}" for flag in flags] + ["sharded weights"] * (command.gpus > 1)
    fixed = memory.total - memory.activations
    fitting = min(int((budget - fixed) / memory.activations * images), images)
    if fitting < 1:
        return f"even with {', '.join(options)} and one image at a time it does not fit"
    if fitting < images:
        options.append(f"{fitting} images at once instead of {images} (--train.accumulate)")
    return f"to fit: {', '.join(options)}"


def as_text(found: dict[str, Any], command: PlanCommand) -> str:
    head = f"{found['recipe']}: {found['processes']} processes, {found['images']} images at once"
    lines = [f"{head}, texts of at most {found['tokens']} tokens"]
    lines.append(f"{'part':18}{'learned':>15}{'frozen':>15}")
    parts = {**found["learned_and_frozen"]}
    parts["all"] = tuple(sum(column) for column in zip(*parts.values(), strict=True))
    lines += [f"  {n:16}{learned:15,}{frozen:15,}" for n, (learned, frozen) in parts.items()]
    lines.append("memory of a process in GiB" + "".join(f"{name:>12}" for name in found["memory"]))
    for row in (*Memory._fields, "total"):
        sizes = (memory[row] / GIBIBYTE for memory in found["memory"].values())
        lines.append(f"  {row:24}" + "".join(f"{size:12.2f}" for size in sizes))
    fits = " and with ".join(f"{name} weights" for name in found["fits"])
    lines.append(f"{command.memory:g} GiB: " + (f"fits with {fits}" if fits else remedy(command)))
    flops = (f"{name} {value:,.1f}" for name, value in found["gflops_per_image"].items())
    lines.append(f"GFLOP an image: {', '.join(flops)}")
    lines.append("images/s (estimate: roofline, no communication, no reading of data)")
    for name, value in found["images_per_second"].items():
        lines.append(f"  {name:16}{value:12,.{1 if value >= 10 else 3}f}")
    if found["left_out"]:
        lines.append(f"not counted: what the {found['left_out'][0]} computes while it is trained")
    return "\n".join(lines)
