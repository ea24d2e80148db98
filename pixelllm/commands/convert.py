"""`pixelllm convert`: a checkpoint of a run, sharded or not, as a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pixelllm.training.checkpoint import convert_checkpoint


@dataclass(frozen=True)
class ConvertCommand:
    """Make a model folder of a training checkpoint, as the end of the training would.

    Args:
        run: folder of the run, finished or not.
        step: of the checkpoint; the newest by default.
        out: folder of the model; the run's own by default.
    """

    run: tyro.conf.Positional[Path]
    step: int | None = None
    out: Path | None = None


def convert(command: ConvertCommand) -> None:
    out = command.out or command.run
    step = convert_checkpoint(command.run, command.step, out)
    print(f"{out}: the model after step {step}")
