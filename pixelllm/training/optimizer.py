"""Which parameters learn, how fast, and with what decay (reference, section 9.1)."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from pixelllm.config import TrainConfig


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Stop gradients for parameters under the given name prefixes.

    Raises ValueError for a prefix that names nothing, which is a typing mistake.
    """
    for prefix in prefixes:
        matched = [p for name, p in model.named_parameters() if _is_under(name, prefix)]
        if not matched:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"train.frozen: nothing is called {prefix!r}; the parts are {parts}")
        for parameter in matched:
            parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over the trainable parameters, grouped by learning-rate scale and decay.

    The first matching prefix of `lr_scales` gives the scale. One-dimensional parameters do not
    decay. Sharded parameters have groups of their own: AdamW's kernels do not mix them with others.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in config.lr_scales:
        if not any(_is_under(name, prefix.split(".")[0]) for name in names):
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"train.lr_scales: nothing is called {prefix!r}; the parts are {parts}"
            )
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((s for p, s in config.lr_scales.items() if _is_under(name, p)), 1.0)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay, isinstance(parameter, DTensor)), []).append(parameter)
    if not groups:
        raise ValueError("train.frozen leaves no parameter to train")
    return AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (scale, decay, _), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,  # a quarter of the loop's time on a CPU
    )


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
