"""Learning rate: linear warm-up, then half a cosine to zero. Official trainer, section 9.1."""

from __future__ import annotations

import math


def learning_rate(step: int, base: float, warmup: int, total: int) -> float:
    """The rate at a 0-based step.

    The cosine begins after the warm-up and lasts `total - warmup` steps. As in the official
    code it is cyclic: at `step == total` the rate is back at `base`. Fewer steps than the warm-up
    has are all warm-up.
    """
    progress = max(0.0, (step - warmup) / max(total - warmup, 1)) % 1.0
    ramp = min(1.0, step / warmup) if warmup else 1.0
    return base * ramp * 0.5 * (1 + math.cos(math.pi * progress))
