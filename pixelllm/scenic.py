"""Parameters of the official Scenic release, as flat .npz or Flax msgpack files, in our models.

Reference, sections 2 to 5 and 11. A tree is a dictionary of arrays by their path, segments joined
with "/", `sam_backbone/blocks.0/attn/qkv/kernel`. Its segments mostly are the torch names of public
checkpoints already; the tables below say what else differs. Nothing is unpickled.
"""

from __future__ import annotations

import mmap
import re
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor, nn

from pixelllm.checkpoints import own_tensors
from pixelllm.models.roi_heads import POOL_SIZE
from pixelllm.weights import require_fit

Tree = dict[str, np.ndarray]
Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

_EVA02: Rules = (
    (r"attn\.([qv])_bias", r"attn.\1_proj.bias"),
    (r"mlp\.ffn_ln", "mlp.norm"),
    (r"mlp\.w1", "mlp.fc1_g"),
    (r"mlp\.w2", "mlp.fc1_x"),
    (r"mlp\.w3", "mlp.fc2"),
    (r"ln_post", "norm"),
)
_EXTRACTOR: Rules = (
    (r"output_tokens\.weight", "output_tokens"),
    (r"image_projection_mlp\.layers\.0", "image_projection"),
    (r"prompt_embedding_projection_mlp\.layers\.0", "prompt_projection"),
    (r"image_pe_projection_mlp\.layers\.0", "position_projection"),
    (r"output_hypernetworks_mlps\.(\d+)\.layers\.0\.(\w+)", r"head_\2[\1]"),
)
_GIT: Rules = (
    (r"^embedding\.layer_norm", "embedding_norm"),
    (r"^embedding\.|^transformer\.", ""),
)
_ATTENTION = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_T5: Rules = (
    (r"^token_embedder", "shared"),
    (r"(en|de)coder_norm", "final_layer_norm"),
    (r"^decoder\.logits_dense", "lm_head"),
    (r"relpos_bias\.rel_embedding", _ATTENTION),
    (r"layers_(\d+)\.", r"block.\1.layer."),
    (r"layer\.pre_(self_)?attention_layer_norm", "layer.0.layer_norm"),
    (r"layer\.(self_)?attention", "layer.0.SelfAttention"),
    (r"layer\.pre_cross_attention_layer_norm", "layer.1.layer_norm"),
    (r"layer\.encoder_decoder_attention", "layer.1.EncDecAttention"),
    (r"^(encoder.*layer)\.pre_mlp_", r"\1.1."),
    (r"^(decoder.*layer)\.pre_mlp_", r"\1.2."),
    (r"^(encoder.*layer)\.mlp", r"\1.1.DenseReluDense"),
    (r"^(decoder.*layer)\.mlp", r"\1.2.DenseReluDense"),
    (r"(Attention\.)(q|k|v|o)(uery|ey|alue|ut)\.", r"\1\2."),
    (r"kernel_left_lora", "lora_A.default.weight"),
    (r"kernel_right_lora", "lora_B.default.weight"),
)
_POINTS: Rules = (
    (r"LayerNorm_0", "norm"),
    (r"mlp\.layers\.(\d+)", lambda m: f"mlp.{2 * int(m[1])}"),  # activations lie between
)
_MASK_ADAPTER: Rules = (
    (r"output_tokens\.weight", "output_tokens"),
    (r"alpha_output\.weight", "alpha"),
    (r"visual_projection_mlp", "prefix_projection"),
    (r"textual_projection_mlp", "hidden_projection"),
    (r"projection\.LayerNorm_0", "projection.0"),
    (r"projection\.layers\.0", "projection.1"),
)
_PYRAMID: Rules = (
    (r"simfp_3\.0", "up"),
    # Level 4 counts its two convolutions from 0, the others from 1.
    (r"simfp_4\.(\d)", lambda m: f"laterals.1.{2 * int(m[1])}"),
    (r"simfp_(\d)\.(\d)", lambda m: f"laterals.{int(m[1]) - 3}.{2 * int(m[2]) - 2}"),
    (r"(\d)\.norm", lambda m: f"{int(m[1]) + 1}"),
    (r"top_block\.p6", "tops.0"),
    (r"top_block\.p7", "tops.1"),
)
_HEAT: Rules = (
    (r"bbox_tower", "tower"),
    (r"agn_hm", "heat"),
    (r"bbox_pred", "ltrb"),
    (r"scales\.(\d+)\.weight", r"scales[\1]"),
)
_ROI: Rules = (
    (r"box_head\.", "heads."),
    (r"fc(\d)", lambda m: f"layers.{2 * int(m[1]) - 1}"),
    (r"cls_score", "object"),
    (r"bbox_pred\.(weight|bias)", r"deltas.0.\1"),
    (r"bbox_pred", "deltas"),
)
# Parts of the release: where they are in our model, and how names below them differ.
PARTS: dict[str, tuple[str, Rules]] = {
    "git_backbone": ("eva02.encoder.vit", _EVA02),
    "sam_backbone": ("sam.encoder", ()),
    "prompt_encoder": ("prompt_encoder", ()),
    "prompt_adapter": ("extractor", _EXTRACTOR),
    "visual_project_layers": ("projection", ((r"visual_projection\.", ""),)),
    "textual/t5_module": ("language.model", _T5),
    "textual": ("language", _GIT),
    "point_predictor": ("point_head", _POINTS),
    "box_decoder/fpn": ("detector.pyramid", _PYRAMID),
    "box_decoder/proposal_generator": ("detector.head", _HEAT),
    "box_decoder/roi_heads": ("detector.roi_heads", _ROI),
    "mask_adapter": ("mask_head.adapter", _MASK_ADAPTER),
    "mask_decoder": ("mask_head.decoder", ()),
}
UNUSED = "prompt_adapter/dense_output_mlp/"  # computed by the release and never read
OPTIONAL = "prompt_encoder.mask_downscaling."  # SAM's mask prompts, which whole models lack
ROOTS = ("params/", "optimizer/target/")  # of the parameters in a saved training state
# Dense (in, out), convolution (h, w, in, out); SAM's transposed ones are (h, w, out, in).
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


def load_scenic(model: nn.Module, path: str | Path, absent: Collection[str] = ()) -> None:
    """Copy the release's parameters into a `PixelLLMNetwork`.

    Args:
        absent: parts of our model that the file does not have, ("point_head",); they stay.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of neither format; or names what is missing, unexpected or misshapen.
    """
    copy_state(model, model_state(read_tree(path)), str(path), absent)


def copy_state(
    model: nn.Module, state: dict[str, Tensor], source: str, absent: Collection[str] = ()
) -> None:
    """Move tensors into all of the model, shared ones once, but `OPTIONAL` and `absent` parts."""
    expected = {
        name: tensor
        for name, tensor in own_tensors(model).items()
        if name in state or not (name.startswith(OPTIONAL) or name.split(".")[0] in absent)
    }
    require_fit(state, expected, source)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state.pop(name))


def model_state(tree: Tree) -> dict[str, Tensor]:
    """A tree under the names of our model; paths that we do not know keep theirs.

    The tree is emptied on the way, lest large parameters lie in memory twice.
    """
    state = {}
    for name, (ours, _) in PARTS.items():  # "textual" takes what "textual/t5_module" has left
        below = [path for path in tree if path.startswith(f"{name}/")]
        weights = {path.removeprefix(f"{name}/"): tree.pop(path) for path in below}
        state |= {f"{ours}.{key}": value for key, value in part_state(name, weights).items()}
    return state | {path: _tensor(value) for path, value in tree.items()}


def part_state(name: str, weights: Tree) -> dict[str, Tensor]:
    """What lies below one of `PARTS`, taken out of `weights`, as a state dict of our module."""
    state = {}
    for path in list(weights):
        full, value = f"{name}/{path}", weights.pop(path)
        if full.startswith(UNUSED):
            continue
        key = re.sub(r"(^|\.)(kernel|scale|embedding)$", r"\1weight", path.replace("/", "."))
        for pattern, replacement in PARTS[name][1]:
            key = re.sub(pattern, replacement, key)
        state[key] = _tensor(_layout(full, value))
    return _stacked(_adapted(state))


def _layout(path: str, value: np.ndarray) -> np.ndarray:
    """torch's order of axes; what has another number of them stays, to be listed as misshapen."""
    if path.endswith("simfp_3.0/kernel") and value.ndim == 4:  # flipped, and (h, w, in, out)
        return value[::-1, ::-1].transpose(2, 3, 0, 1)
    if path.endswith("/fc1/kernel") and len(value) % POOL_SIZE**2 == 0:
        grid = value.reshape(POOL_SIZE, POOL_SIZE, -1, value.shape[-1])  # ours: channel first
        return grid.transpose(3, 2, 0, 1).reshape(value.shape[::-1])
    if re.search(r"proposal_generator/scales\.\d+/scale$", path):
        return value.squeeze()
    if path.startswith("prompt_adapter/output_hypernetworks_mlps"):
        return value  # our heads of all tokens multiply from the left
    if value.ndim in _AXES and re.search(r"rel_embedding$|kernel\w*$", path):
        return value.transpose(_AXES[value.ndim])
    return value


def _adapted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoRA as peft names it; all factors get the largest rank, where zeros change nothing."""
    factors = [key for key in state if ".lora_" in key]
    stems = {key.split(".lora_")[0] for key in factors}
    rank = max((min(state[key].shape) for key in factors), default=0)
    adapted = {}
    for key, value in state.items():
        stem = key.removesuffix(".weight")
        if key in factors:
            value = value.mT if "lora_B" in key else value  # (rank, ...)
            value = torch.cat([value, value.new_zeros(rank - len(value), *value.shape[1:])])
            value = value.mT.contiguous() if "lora_B" in key else value
        adapted[f"{stem}.base_layer.weight" if stem in stems else key] = value
    return adapted


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named `heads[0]`, `heads[1]`, ... as one `heads`, where they have one shape."""
    lists: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if numbered := re.fullmatch(r"(.+)\[(\d+)\]", key):
            lists.setdefault(numbered[1], {})[int(numbered[2])] = value
    for name, members in lists.items():
        if len({value.shape for value in members.values()}) == 1:
            stacked = torch.stack([members[number] for number in sorted(members)])
            state = {k: v for k, v in state.items() if not k.startswith(f"{name}[")}
            state[name] = stacked
    return state


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value))  # writable and in one piece


def read_tree(path: str | Path) -> Tree:
    """The parameters in a flat .npz, or in a tree or training state of flax.serialization.

    Raises FileNotFoundError where there is no such file and ValueError where it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of parameters")
    try:
        tree = _read_npz(path) if zipfile.is_zipfile(path) else _read_msgpack(path)
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: neither an .npz nor a Flax msgpack file: {reason}") from error
    for root in ROOTS:
        below = {key[len(root) :]: value for key, value in tree.items() if key.startswith(root)}
        if below:
            return below
    return tree


def _read_npz(path: Path) -> Tree:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _read_msgpack(path: Path) -> Tree:
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            nested = msgpack.unpackb(content, ext_hook=_extension, strict_map_key=False)
    if not isinstance(nested, dict):
        raise ValueError(f"it holds a {type(nested).__name__}, expected a tree of arrays")
    return dict(_flatten(nested))


def _flatten(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Arrays by path; steps, schedules and other leaves are no parameters."""
    for name, value in nested.items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and "__msgpack_chunked_array__" in value:  # above 1 GiB
            shape, chunks = (
                [value[key][str(i)] for i in range(len(value[key]))] for key in ("shape", "chunks")
            )
            yield f"{prefix}{name}", np.concatenate(chunks).reshape(shape)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")


def _extension(code: int, data: bytes) -> np.ndarray | None:
    """Flax's arrays (1) and scalars (3)."""
    if code not in (1, 3):
        return None
    shape, kind, content = msgpack.unpackb(data, raw=True)
    if kind == b"bfloat16":  # numpy has none
        bits = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(content, np.dtype(kind.decode())).reshape(shape)
