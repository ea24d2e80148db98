"""The `pixelllm` command: caption images, locate expressions, list objects, inspect and plan runs.

    pixelllm caption photo.jpg --model runs/quickstart --html photo.html
    pixelllm locate photo.jpg "the red car" --model runs/joint-refseg --mask --png car.png
    pixelllm ask photo.jpg "What is on the left?" --model runs/scenes-perceptiongpt
    pixelllm dense photo.jpg --model runs/joint-refseg --html objects.html
    pixelllm info runs/quickstart
    pixelllm plan ln-coco-t5xl --gpus 8 --memory 80
    pixelllm convert runs/quickstart --step 3000 --out models/at-3000
    pixelllm import official.msgpack --recipe joint-bert --out runs/official

Points are (x, y) and boxes (x0, y0, x1, y1), in [0, 1] of the image.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other

import tyro

from pixelllm.commands.ask import AskCommand, ask
from pixelllm.commands.caption import CaptionCommand, caption
from pixelllm.commands.convert import ConvertCommand, convert
from pixelllm.commands.dense import DenseCommand, dense
from pixelllm.commands.import_weights import ImportCommand, import_weights
from pixelllm.commands.info import InfoCommand, info
from pixelllm.commands.locate import LocateCommand, locate
from pixelllm.commands.plan import PlanCommand, plan


def main(arguments: Sequence[str] | None = None) -> None:
    commands = (
        Annotated[CaptionCommand, tyro.conf.subcommand("caption")]
        | Annotated[LocateCommand, tyro.conf.subcommand("locate")]
        | Annotated[AskCommand, tyro.conf.subcommand("ask")]
        | Annotated[DenseCommand, tyro.conf.subcommand("dense")]
        | Annotated[InfoCommand, tyro.conf.subcommand("info")]
        | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
        | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
        | Annotated[ImportCommand, tyro.conf.subcommand("import")]
    )
    command = tyro.cli(commands, prog="pixelllm", description=__doc__, args=arguments)
    try:
        match command:
            case CaptionCommand():
                caption(command)
            case LocateCommand():
                locate(command)
            case AskCommand():
                ask(command)
            case DenseCommand():
                dense(command)
            case InfoCommand():
                info(command)
            case PlanCommand():
                plan(command)
            case ConvertCommand():
                convert(command)
            case ImportCommand():
                import_weights(command)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
