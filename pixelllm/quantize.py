"""A language trunk with its weights in 8 bits, through torchao, for generation.

Ours: the paper's Flan-T5-XL has 5.3 GiB of bfloat16 weights and half of that in 8 bits. Only the
linear layers of the trunk are quantised, weights alone, with a scale per output; its embeddings and
vocabulary head, LoRA and everything that computes coordinates stay as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor, nn

from pixelllm.models.git import GitDecoder

VOCABULARY_HEAD = "model.lm_head"


def quantize_trunk(language: nn.Module) -> None:
    """Hold the linear layers of a trunk in 8 bits, in place; they can learn no more.

    Raises:
        ValueError: torchao is not installed, or the trunk is the BERT-size decoder.
    """
    quantize = weight_quantizer(language)
    for name in trunk_linears(language):
        quantize(language.get_submodule(name))
        give_back_freed_memory()


def quantize_when_loaded(language: nn.Module, prefix: str) -> Callable[[str, Tensor], bool]:
    """`quantize_trunk` for `load_weights`, so that the trunk is held in 8 bits from the start.

    Returns:
        Takes `prefix` and the name of a parameter with the values to quantise.
    """
    quantize = weight_quantizer(language)
    waiting = {f"{prefix}{name}.weight": name for name in trunk_linears(language)}

    def place(name: str, values: Tensor) -> bool:
        if name not in waiting:
            return False
        layer = language.get_submodule(waiting[name])
        layer.weight = nn.Parameter(values.to(layer.weight.dtype), requires_grad=False)
        quantize(layer)
        give_back_freed_memory()
        return True

    return place


def give_back_freed_memory() -> None:
    """Where the C library is glibc: it keeps what lies freed between what is still in use.

    The temporary results of quantising Flan-T5-XL would hold 4 GiB after it.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def trunk_linears(language: nn.Module) -> list[str]:
    """Names of the linear layers that `quantize_trunk` changes."""
    return [
        name
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and name != VOCABULARY_HEAD
    ]


def require_unquantized(language: nn.Module) -> None:
    """Raise ValueError for a trunk whose weights are in 8 bits."""
    for name in trunk_linears(language):
        # Quantised weights are plain tensors to their type, but for the class of their values.
        if type(language.get_submodule(name).weight.data) is not Tensor:
            raise ValueError(f"{name} is held in 8 bits; load the model without int8 to save it")


def weight_quantizer(language: nn.Module) -> Callable[[nn.Linear], None]:
    """What quantises one layer of the trunk.

    Raises ValueError where torchao is not installed, and for the BERT-size decoder.
    """
    if isinstance(language, GitDecoder):
        raise ValueError("int8 is for trunks of transformers; the BERT-size decoder is 0.3 GiB")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("int8 needs another package: pip install 'pixelllm[int8]'") from error
    config = Int8WeightOnlyConfig(version=2)
    return lambda layer: quantize_(layer, config)
