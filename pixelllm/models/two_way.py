"""SAM's two-way transformer (Kirillov et al., 2023, appendix A) for many prompts of one image.

It runs the modules of `segment_anything`, so checkpoints of SAM fit, and gives what those give. The
differences:
  * until the first layer has written to them, the cells of an image are the same for all its
    prompts: their projections are made once, and all tokens ask them as one sequence;
  * attention runs through fused kernels, and some cells can be hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor


def two_way(
    transformer: TwoWayTransformer,
    tokens: Tensor,
    cells: Tensor,
    positions: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens and cells after all layers; prompts do not see each other.

    Args:
        tokens: float[B, K, Q, D], also the places that are added wherever tokens are compared.
        cells: float[B, 1, N, D], of the image, or float[B, K, N, D], of each prompt.
        positions: float[N, D], added to cells wherever they are compared; None adds nothing.
        seen: bool[B, K, N], False on cells that no token may read; cells are then each prompt's.

    Returns:
        float[B, K, Q, D] and float[B, K, N, D].
    """
    places = tokens
    for block in transformer.layers:
        own = tokens if block.skip_first_layer_pe else tokens + places
        heard = attend(block.self_attn, own, own, tokens)
        tokens = block.norm1(heard if block.skip_first_layer_pe else tokens + heard)
        placed = cells if positions is None else cells + positions
        read = attend(block.cross_attn_token_to_image, tokens + places, placed, cells, seen)
        tokens = block.norm2(tokens + read)
        tokens = block.norm3(tokens + block.mlp(tokens))
        written = attend(block.cross_attn_image_to_token, placed, tokens + places, tokens)
        cells = block.norm4(cells + written)
    placed = cells if positions is None else cells + positions
    read = attend(transformer.final_attn_token_to_image, tokens + places, placed, cells, seen)
    return transformer.norm_final_attn(tokens + read), cells


def attend(
    attention: Attention, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None
) -> Tensor:
    """SAM's attention where one side may be shared by all prompts, and is then projected once.

    Args:
        queries: float[B, 1 or K, Q, D].
        keys, values: float[B, 1 or K, N, D].
        seen: bool[B, K, N].

    Returns:
        float[B, K, Q, D].
    """
    q, k, v = attention.q_proj(queries), attention.k_proj(keys), attention.v_proj(values)
    B, K, Q = len(q), max(q.shape[1], k.shape[1]), q.shape[2]
    # Queries of all prompts ask shared keys as one sequence; shared queries are only repeated.
    q = q.flatten(1, 2)[:, None] if k.shape[1] < K else q.expand(-1, K, -1, -1)
    q, k, v = (
        x.flatten(0, 1).unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v)
    )
    mask = None if seen is None else seen.flatten(0, 1)[:, None, None]  # (B * K, 1, 1, N)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out_proj(found.transpose(1, 2).flatten(2)).view(B, K, Q, -1)
