"""Prompt feature extractor: image features and a location prompt in, visual tokens out.

PixelLLM, section 3.2 (`prompt_adapter` in the release): learned tokens and prompt tokens go
through SAM's two-way transformer against the image features; every learned token then has its own
linear head. The release's unused dense output is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor, nn

from pixelllm.images import resize
from pixelllm.models.sam import MaskDecoder, PromptEncoder
from pixelllm.models.two_way import two_way

# Of all images and prompts that are read together: bounds memory, and fits a CPU's cache.
CELLS_AT_ONCE = 12_000
CELLS_TOGETHER = 110_000  # the same on a GPU, where calls are dear: 150 prompts of 27 x 27 cells


class PromptFeatureExtractor(nn.Module):
    """Turns (image, location) into `num_outputs` tokens about what is there.

    Args:
        in_channels: channels of the image features.
        prompt_width: channels of prompt tokens, dense prompt and image positions.
        width: channels of the two-way transformer.
        depth: its layers.
        num_outputs: learned tokens.
        output_width: channels of the result.
        num_heads: attention heads.
        mlp_width: hidden width of the MLPs.
        value_position: add a learned linear map of the image positions and of plain (x, y) to the
            features, so that attention values carry them; the published model's do not.
        box_octaves: add a learned linear map of waves of the box's centre and size to its prompt
            tokens, so many octaves of them, as DAB-DETR encodes boxes; 0 adds nothing. Small models
            take long to find a width between Fourier features of two corners. Not in the paper.
    """

    def __init__(
        self,
        in_channels: int,
        prompt_width: int,
        width: int,
        depth: int,
        num_outputs: int,
        output_width: int,
        num_heads: int = 8,
        mlp_width: int = 2048,
        value_position: bool = False,
        box_octaves: int = 0,
    ) -> None:
        super().__init__()
        self.output_tokens = nn.Parameter(torch.randn(num_outputs, width))
        self.image_projection = nn.Linear(in_channels, width)
        # The release has these two maps only where the widths differ.
        same = prompt_width == width
        self.prompt_projection = nn.Identity() if same else nn.Linear(prompt_width, width)
        self.position_projection = nn.Identity() if same else nn.Linear(prompt_width, width)
        self.value_projection = nn.Linear(prompt_width + 2, width) if value_position else None
        self.box_octaves = box_octaves
        self.box_projection = nn.Linear(8 * box_octaves, width) if box_octaves else None
        self.transformer = TwoWayTransformer(depth, width, num_heads, mlp_width)
        self.head_weight = nn.Parameter(torch.randn(num_outputs, width, output_width) * width**-0.5)
        self.head_bias = nn.Parameter(torch.zeros(num_outputs, output_width))

    def forward(
        self,
        features: Tensor,
        prompt_tokens: Tensor,
        dense: Tensor,
        image_pe: Tensor,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Location-conditioned tokens.

        Args:
            features: float[B, C, h, w].
            prompt_tokens: float[B, K, P, prompt_width].
            dense: float[prompt_width], one dense prompt for all cells, or
                float[B, K, h * w, prompt_width], one for each.
            image_pe: float[1, prompt_width, h, w], positions of the cells.
            boxes: float32[B, K, 4], what the prompt tokens encode, xyxy in [0, 1] of the frame;
                read with `box_octaves` alone.

        Returns:
            float[B, K, num_outputs, output_width].
        """
        positions = image_pe.flatten(2).mT[0]  # (N, P)
        cells = self.image_projection(features.flatten(2).mT)  # (B, N, D)
        if self.value_projection is not None:
            places = cell_centres(*features.shape[-2:], positions.device).to(positions.dtype)
            cells = cells + self.value_projection(torch.cat([positions, places], dim=-1))
        cells = cells[:, None] + self.prompt_projection(dense)  # (B, 1 or K, N, D)
        tokens = self.prompt_projection(prompt_tokens)  # (B, K, P, D)
        if self.box_projection is not None:
            tokens = tokens + self.box_projection(box_waves(boxes, self.box_octaves))[:, :, None]
        positions = self.position_projection(positions)
        B, K, N = len(cells), tokens.shape[1], cells.shape[2]
        # Cells of each prompt are as large as all that reading prompts in parts would save.
        at_once = max(cells_at_once(cells.device) // (B * N), 1) if cells.shape[1] == 1 else K
        parts = tokens.split(at_once, dim=1)
        return torch.cat([self.read(cells, positions, part) for part in parts], dim=1)

    def read(self, cells: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        """`forward` from what the prompts share and float[B, K, P, width] of their own."""
        learned = self.output_tokens.expand(*tokens.shape[:2], -1, -1)
        tokens, _ = two_way(self.transformer, torch.cat([learned, tokens], dim=2), cells, positions)
        tokens = tokens[:, :, : len(self.output_tokens)]
        return torch.einsum("bknd,ndo->bkno", tokens, self.head_weight) + self.head_bias


def cells_at_once(device: torch.device) -> int:
    """How many cells, over all images and prompts, are best read together."""
    return CELLS_AT_ONCE if device.type == "cpu" else CELLS_TOGETHER


def box_waves(boxes: Tensor, octaves: int) -> Tensor:
    """Sines and cosines of centre, width and height, the longest wave twice the frame.

    Args:
        boxes: float[..., 4], xyxy in [0, 1].

    Returns:
        float[..., 8 * octaves], first all sines.
    """
    start, end = boxes.split(2, dim=-1)
    values = torch.cat([(start + end) / 2, end - start], dim=-1)
    angles = values[..., None] * torch.pi * 2 ** torch.arange(octaves, device=boxes.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-2).flatten(-2)


def cell_centres(h: int, w: int, device: torch.device) -> Tensor:
    """(x, y) in [-1, 1] of an h x w grid's cells, row-major: float32[h * w, 2]."""
    y = (torch.arange(h, device=device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=device) + 0.5) / w * 2 - 1
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1)


@torch.no_grad()
def init_from_sam(
    extractor: PromptFeatureExtractor,
    mask_decoder: MaskDecoder,
    prompt_encoder: PromptEncoder,
    sam_channels: slice,
    points_per_side: int = 0,
    other_share: float = 0.0,
) -> None:
    """Start the extractor where SAM's mask decoder ended: it already binds a location to a thing.

    Copies the two-way transformer, passes SAM's features through unchanged, and starts the
    learned tokens at SAM's mask token. Small models depend on it.

    Args:
        extractor: its transformer has the decoder's sizes.
        mask_decoder: trained.
        prompt_encoder: its companion.
        sam_channels: where SAM's features lie among the extractor's input channels.
        points_per_side: this many squared of the learned tokens also start with the encoding of
            their point of a regular grid, as if it were a foreground prompt.
        other_share: factor with which the first channels, up to `width`, are added to SAM's.

    Raises:
        ValueError: sizes differ, or there are more grid points than tokens.
    """
    width = extractor.output_tokens.shape[1]
    num_points = points_per_side**2
    for size in ("embedding_dim", "depth", "num_heads", "mlp_dim"):
        ours, theirs = (getattr(m.transformer, size) for m in (extractor, mask_decoder))
        if ours != theirs:
            raise ValueError(
                f"the extractor's transformer has {size} {ours}, that of SAM's mask decoder "
                f"{theirs}; they must be equal to start one from the other"
            )
    if len(range(extractor.image_projection.in_features)[sam_channels]) != width:
        raise ValueError(f"{sam_channels} of the image features is not {width} channels wide")
    if num_points > len(extractor.output_tokens):
        raise ValueError(f"{num_points} grid points but {len(extractor.output_tokens)} tokens")
    extractor.transformer.load_state_dict(mask_decoder.transformer.state_dict())
    extractor.image_projection.bias.zero_()
    extractor.image_projection.weight.zero_().fill_diagonal_(other_share)
    extractor.image_projection.weight[:, sam_channels].fill_diagonal_(1)
    if extractor.value_projection is not None:
        extractor.value_projection.weight.zero_()
        extractor.value_projection.bias.zero_()
    if extractor.box_projection is not None:
        extractor.box_projection.weight.zero_()
        extractor.box_projection.bias.zero_()
    noise = torch.randn_like(extractor.output_tokens) * 0.02  # tokens must not stay equal
    extractor.output_tokens.copy_(mask_decoder.mask_tokens.weight[:1] + noise)
    if num_points:
        grid = prompt_encoder.dense_pe(points_per_side, points_per_side).flatten(2)[0].T
        extractor.output_tokens[:num_points] += grid + prompt_encoder.point_embeddings[1].weight


def fuse_features(maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """Maps of several encoders as one, channels in the order given.

    Args:
        maps: float[B, C_i, h_i, w_i] each.
        size: (h, w) of the result; None takes the largest map's, comparing heights first.

    Returns:
        float[B, sum of C_i, h, w], bicubic where the size changes.
    """
    size = size or max(tuple(features.shape[-2:]) for features in maps)
    return torch.cat([resize(features, size, "bicubic") for features in maps], dim=1)
