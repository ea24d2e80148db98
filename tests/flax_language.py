"""Flax parameters of the official language parts -> our modules.

Paths come without the prefix of the whole model (`textual/`, `point_predictor/`).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelllm.models.git import GitDecoder
from pixelllm.models.language import EncoderDecoderLanguage, add_lora, build_t5

Weights = dict[str, np.ndarray]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def point_head_state(weights: Weights) -> dict[str, Tensor]:
    """`mlp_point_predictor` -> `PointHead`."""
    state = {}
    for path, value in weights.items():
        module, leaf = path.rsplit("/", 1)
        if module == "LayerNorm_0":
            name = "norm"
        else:  # an activation lies between two layers
            name = f"mlp.{2 * int(module.removeprefix('mlp/layers.'))}"
        state[f"{name}.{_LEAVES[leaf]}"] = _tensor(leaf, value)
    return state


def git_state(weights: Weights) -> dict[str, Tensor]:
    """`git` text decoder -> `GitDecoder`."""
    names = {
        "embedding/words": "words",
        "embedding/positions": "positions",
        "embedding/layer_norm": "embedding_norm",
        "visual_projection.0": "visual_projection.0",
        "visual_projection.1": "visual_projection.1",
        "output": "output",
    }
    state = {}
    for path, value in weights.items():
        module, leaf = path.rsplit("/", 1)
        name = names.get(module) or module.removeprefix("transformer/").replace("/", ".")
        state[f"{name}.{_LEAVES[leaf]}"] = _tensor(leaf, value)
    return state


def git_decoder(weights: Weights, hparams: dict[str, Any]) -> GitDecoder:
    """The trunk of a `text_decoder*` or `decode_text_decoder` case."""
    vocab_size, width = weights["embedding/words/embedding"].shape
    model = GitDecoder(
        vocab_size,
        prefix_width=weights["visual_projection.0/kernel"].shape[0],
        width=width,
        num_layers=hparams["num_hidden_layers"],
        num_heads=hparams["num_heads"],
        ff=weights["transformer/encoder/layer.0/intermediate/dense/kernel"].shape[1],
        max_length=len(weights["embedding/positions/embedding"]),
        bos_id=hparams.get("begin_token_id", 101),
        eos_id=hparams.get("end_token_id", 102),
    )
    model.load_state_dict(git_state(weights))
    return model


def t5_trunk(weights: Weights, hparams: dict[str, Any]) -> EncoderDecoderLanguage:
    """The trunk of a `t5_head*` case, with official masks and LoRA where the case has it."""
    trunk = build_t5(
        hparams["vocab_size"],
        hparams["emb_dim"],
        hparams["num_encoder_layers"],
        hparams["num_decoder_layers"],
        hparams["num_heads"],
        hparams["mlp_dim"],
        hparams["dropout_rate"],
        head_dim=hparams["head_dim"],
        official_masks=True,
    )
    rank = max(hparams["encoder_lora_rank"], hparams["decoder_lora_rank"])
    if rank:
        targets = hparams["encoder_lora_modules"].split(",")
        add_lora(trunk, rank, rank * hparams["encoder_lora_scale"], targets)
    trunk.model.load_state_dict(t5_state(weights, rank))
    return trunk


def t5_state(weights: Weights, rank: int = 0) -> dict[str, Tensor]:
    """`t5_text_head` -> `T5ForConditionalGeneration`, whose LoRA factors are padded to `rank`."""
    adapted = {path.removesuffix("_left_lora") for path in weights if path.endswith("_left_lora")}
    state = {}
    for path, value in weights.items():
        name = _t5_name(re.sub(r"_(left|right)_lora$", "", path))
        tensor = torch.from_numpy(
            np.array(value.T if "kernel" in path or "rel_" in path else value)
        )
        if path.endswith("_left_lora"):
            grown = tensor.new_zeros(rank, tensor.shape[1])
            grown[: len(tensor)] = tensor
            state[f"{name}.lora_A.default.weight"] = grown
        elif path.endswith("_right_lora"):
            grown = tensor.new_zeros(len(tensor), rank)
            grown[:, : tensor.shape[1]] = tensor
            state[f"{name}.lora_B.default.weight"] = grown
        else:
            state[f"{name}.base_layer.weight" if path in adapted else f"{name}.weight"] = tensor
    for stack in ("encoder", "decoder"):
        state[f"{stack}.embed_tokens.weight"] = state["shared.weight"]
    return state


_T5_FIXED = {
    "token_embedder/embedding": "shared",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm",
    "decoder/logits_dense/kernel": "lm_head",
    "encoder/relpos_bias/rel_embedding": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ),
    "decoder/relpos_bias/rel_embedding": (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ),
}
# Part of a layer -> its place in a T5 block; the feed-forward is the last one of its block.
_T5_PARTS = {
    "attention": "0.SelfAttention",
    "pre_attention_layer_norm": "0.layer_norm",
    "self_attention": "0.SelfAttention",
    "pre_self_attention_layer_norm": "0.layer_norm",
    "encoder_decoder_attention": "1.EncDecAttention",
    "pre_cross_attention_layer_norm": "1.layer_norm",
    "mlp": "{last}.DenseReluDense",
    "pre_mlp_layer_norm": "{last}.layer_norm",
}
_T5_PROJECTIONS = {"query": ".q", "key": ".k", "value": ".v", "out": ".o"}


def _t5_name(path: str) -> str:
    if path in _T5_FIXED:
        return _T5_FIXED[path]
    stack, layer, part, *inner, _ = path.split("/")
    place = _T5_PARTS[part].format(last=1 if stack == "encoder" else 2)
    ending = "".join(_T5_PROJECTIONS.get(name, f".{name}") for name in inner)
    return f"{stack}.block.{layer.removeprefix('layers_')}.layer.{place}{ending}"


def _tensor(leaf: str, value: np.ndarray) -> Tensor:
    """Dense kernels are (in, out) in Flax."""
    return torch.from_numpy(np.array(value.T if leaf == "kernel" else value))
