"""Masks of what the words locate: SAM's mask decoder, its box prompt corrected by the words.

Release, `mask_adapter.py` and `pixel_llm.py` (reference, section 6.4). One difference: words on
padding can be left out of the attention; the release, whose rows all have one length, reads them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor, nn

from pixelllm.models.sam import MaskDecoder, PromptEncoder
from pixelllm.models.two_way import two_way

NUM_CORNERS = 2  # SAM's tokens of a box


class MaskAdapter(nn.Module):
    """Learned queries read visual tokens and words, and correct the tokens of a box prompt.

    Args:
        prefix_width: D of the visual tokens.
        hidden_width: of the features of the words.
        width: of the prompt tokens and of the two-way transformer.
        depth, num_heads, mlp_width: of the two-way transformer.
        gated: scale the correction by tanh of a parameter that starts at 0, so that training
            starts from SAM's own masks.
        projected: map both inputs to `width`; otherwise they have it already.
    """

    def __init__(
        self,
        prefix_width: int,
        hidden_width: int,
        width: int,
        depth: int = 2,
        num_heads: int = 8,
        mlp_width: int = 2048,
        gated: bool = True,
        projected: bool = True,
    ) -> None:
        super().__init__()
        self.output_tokens = nn.Parameter(torch.randn(NUM_CORNERS, width))
        self.alpha = nn.Parameter(torch.zeros(NUM_CORNERS, width)) if gated else None
        self.prefix_projection, self.hidden_projection = (
            nn.Sequential(nn.LayerNorm(n, eps=1e-6), nn.Linear(n, width))
            if projected
            else nn.Identity()
            for n in (prefix_width, hidden_width)
        )
        self.transformer = TwoWayTransformer(depth, width, num_heads, mlp_width)

    def forward(
        self, box_tokens: Tensor, prefix: Tensor, hidden: Tensor, hidden_padding: Tensor | None
    ) -> Tensor:
        """Corrected prompt tokens.

        Args:
            box_tokens: float[B, K, 2, width].
            prefix: float[B, K, N, prefix_width], visual tokens of the rows.
            hidden: float[B, K, T, hidden_width], features of their words.
            hidden_padding: bool[B, K, T], words that nothing attends to; None for none of them.

        Returns:
            float[B, K, 2, width].
        """
        B, K, N, _ = prefix.shape
        dtype = self.output_tokens.dtype  # a trunk in bfloat16 has features in that
        found = self.prefix_projection(prefix.to(dtype)), self.hidden_projection(hidden.to(dtype))
        keys = torch.cat(found, dim=2)
        seen = None
        if hidden_padding is not None:
            seen = F.pad(~hidden_padding, (N, 0), value=True)
        queries = self.output_tokens.expand(B, K, -1, -1)
        correction, _ = two_way(self.transformer, queries, keys, seen=seen)
        if self.alpha is not None:
            correction = self.alpha.tanh() * correction
        return box_tokens + correction


class MaskHead(nn.Module):
    """One mask per box, prompted by the box and what the model said about it."""

    def __init__(self, adapter: MaskAdapter, decoder: MaskDecoder) -> None:
        super().__init__()
        self.adapter = adapter
        self.decoder = decoder

    def forward(
        self,
        sam_features: Tensor,
        boxes_px: Tensor,
        prompt_encoder: PromptEncoder,
        prefix: Tensor,
        hidden: Tensor,
        hidden_padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """SAM's single answer for every box.

        Args:
            sam_features: float[B, S, h, w].
            boxes_px: float32[B, K, 4], xyxy in pixels of the frame.
            prompt_encoder: SAM's; it relates boxes to its own image size, the frame's.
            prefix, hidden, hidden_padding: as in `MaskAdapter`.

        Returns:
            Logits float32[B, K, 4h, 4w] over the padded frame, and float32[B, K], the IoU that
            SAM expects of each mask.
        """
        corners = prompt_encoder._embed_boxes(boxes_px.flatten(0, 1))  # (R, 2, S)
        corners = corners.unflatten(0, boxes_px.shape[:2])
        tokens = self.adapter(corners, prefix, hidden, hidden_padding)
        positions = prompt_encoder.dense_pe(*sam_features.shape[-2:])
        masks, ious = self.decoder(sam_features, positions, tokens, prompt_encoder.no_mask)
        return masks[:, :, 0].float(), ious[:, :, 0].float()
