"""Our language parts of the sizes and with the weights of golden cases.

Paths come without the prefix of the whole model (`textual/`, `point_predictor/`).
"""

from __future__ import annotations

from typing import Any

from pixelllm.models.git import GitDecoder
from pixelllm.models.language import EncoderDecoderLanguage, add_lora, build_t5
from pixelllm.scenic import Tree, copy_state, part_state


def git_decoder(weights: Tree, hparams: dict[str, Any]) -> GitDecoder:
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
    model.load_state_dict(part_state("textual", weights))
    return model


def t5_trunk(weights: Tree, hparams: dict[str, Any]) -> EncoderDecoderLanguage:
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
    copy_state(trunk.model, part_state("textual/t5_module", weights), "the case")
    return trunk
