"""What one caption costs, by part.

    python -m benchmarks.caption_cost RUN IMAGE --rounds 20

Processor time of this process per thread, medians; greedy. What is not named are copies between
the parts and words made of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from pixelllm.pretrained import PixelLLM


@dataclass(frozen=True)
class Options:
    """What is timed.

    Args:
        run: a finished run.
        image: file to caption.
        rounds: captions; the first is not counted.
        threads: of torch.
    """

    run: Annotated[Path, tyro.conf.Positional]
    image: Annotated[Path, tyro.conf.Positional]
    rounds: int = 20
    threads: int = 1


class Clock:
    """Adds up the seconds of calls by name."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = call(*args, **options)
            spent = (time.process_time() - start) / self.threads
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            return result

        return clocked


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    model, clock = PixelLLM.from_pretrained(options.run), Clock(options.threads)
    processor = clock.timed("image to tensors", model.processor())
    for part in ("sam", "eva02", "point_head"):
        module = getattr(model, part)
        module.forward = clock.timed(part, module.forward)
    model.prefix = clock.timed("extractor", model.prefix)
    model.language.generate = clock.timed("language", model.language.generate)
    whole = clock.timed("all", lambda: model.generate(**processor(options.image)))
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds + 1):
        clock.seconds = {}
        (caption,) = whole()
        rounds.append(clock.seconds)
    tokens = len(model.tokenizer(caption.text, add_special_tokens=False).input_ids) + 1
    print(f"{tokens} tokens: {caption.text}")
    total = median(seconds["all"] for seconds in rounds[1:])
    for name in rounds[-1]:
        spent = median(seconds[name] for seconds in rounds[1:])
        print(f"{name:20}{1000 * spent:9.1f} ms {100 * spent / total:6.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
