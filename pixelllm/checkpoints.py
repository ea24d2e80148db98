"""Saved models: `config.json` and `model.safetensors` in a folder, and nothing to unpickle."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from pixelllm.files import write_text, written_whole
from pixelllm.weights import require_fit

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
READ_AT_ONCE = 32  # tensors of a weight file

T = TypeVar("T")


def save_config(config: Any, folder: Path) -> None:
    """Write a configuration dataclass as JSON, with the name of its class."""
    fields = {"model_type": "pixelllm", "kind": type(config).__name__, **dataclasses.asdict(config)}
    write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")


def load_config(kind: type[T], name_or_path: Path | str) -> T:
    """Read what `save_config` wrote.

    Raises:
        FileNotFoundError: there is no run at the path.
        ValueError: the run is of another kind, or has a field that does not exist.
    """
    file = find_file(name_or_path, CONFIG_FILE)
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    fields.pop("model_type", None)
    found = fields.pop("kind", None)
    if found != kind.__name__:
        raise ValueError(f"{file}: holds a {found}, expected a {kind.__name__}")
    return from_fields(kind, fields, str(file))


def from_fields(kind: type[T], fields: dict[str, Any], where: str) -> T:
    """Rebuild nested dataclasses from plain dictionaries."""
    hints = typing.get_type_hints(kind)
    for name in fields:
        if name not in hints:
            near = ", ".join(difflib.get_close_matches(name, hints)) or ", ".join(hints)
            raise ValueError(f"{where}: {kind.__name__} has no field {name!r}; nearest: {near}")
    return kind(**{name: _value(hints[name], v, where) for name, v in fields.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) is types.UnionType:
        hint = typing.get_args(hint)[0]  # optional fields are written `kind | None`
    if dataclasses.is_dataclass(hint):
        return from_fields(hint, value, where)
    if typing.get_origin(hint) is tuple:
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    return value


def find_file(name_or_path: Path | str, name: str) -> Path:
    """A file of a local run folder or of a Hub repository."""
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a finished run: {name} is missing")
        return folder / name
    # "owner/name" could be on the Hub, but not where "owner" is a folder here.
    if folder.is_absolute() or len(folder.parts) > 2 or folder.parent.is_dir() and folder.parts[1:]:
        raise FileNotFoundError(f"{folder}: no such run; train.py --out names its folder")
    try:
        return Path(cached_file(str(name_or_path), name))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor a model on the Hub: {reason}"
        ) from error


def save_weights(
    model: nn.Module, folder: Path, leave_out: Callable[[str], bool] = lambda _: False
) -> None:
    """Write the model's tensors, but those whose name `leave_out` is true of.

    Raises OSError where they cannot be written; what was there before is then intact.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in own_tensors(model).items()
        if not leave_out(name)
    }
    write_tensors(tensors, folder / WEIGHTS_FILE)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError naming it."""
    with written_whole(path) as beside:
        beside.touch()  # with the permissions of any new file; the library's own are private
        mode = beside.stat().st_mode
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.chmod(mode)


def load_weights(
    model: nn.Module,
    name_or_path: Path | str,
    leave_out: Callable[[str], bool] = lambda _: False,
    place: Callable[[str, Tensor], bool] = lambda name, tensor: False,
) -> None:
    """Read what `save_weights` wrote, in the model's dtypes and without a second copy of it.

    Args:
        leave_out: true of the names that the file does not have.
        place: offered every tensor by name; True where it has put it into the model itself.

    Raises ValueError listing every key that does not fit.
    """
    file = find_file(name_or_path, WEIGHTS_FILE)
    expected = {n: t for n, t in own_tensors(model).items() if not leave_out(n)}
    require_fit(stored_shapes(file), expected, str(file))
    names = list(expected)
    for start in range(0, len(names), READ_AT_ONCE):
        with safe_open(file, "pt") as stored:  # opened anew, so that pages read before are freed
            for name in names[start : start + READ_AT_ONCE]:
                tensor, values = expected.pop(name), stored.get_tensor(name)
                if not place(name, values):
                    tensor.data.copy_(values)


def stored_shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values. Raises ValueError naming it."""
    try:
        with safe_open(file, "pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable file of weights alone: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, shared ones once."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers
