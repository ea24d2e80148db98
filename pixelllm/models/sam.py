"""SAM's image encoder, prompt encoder and mask decoder (Kirillov et al., 2023).

The modules are `segment_anything`'s, so official checkpoints load unchanged. What is added:
  * the encoder takes other input sizes than it was built for, its position tables resized with
    antialiasing as the PixelLLM release does; attention runs through fused kernels, and on a CPU
    windows that reach over the edge cost no projections of what is not there;
  * boxes become prompt tokens the PixelLLM way; positions are float32 under autocast;
  * the mask decoder takes a batch of images with several prompts each.
The release keeps stochastic depth on in its frozen encoder while training; we do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import segment_anything.modeling as official
import torch
import torch.nn.functional as F
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import (
    Attention,
    window_partition,
    window_unpartition,
)
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn

from pixelllm.images import resize
from pixelllm.models.two_way import two_way

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
BIASES_AT_ONCE = 2**22  # of pairs of cells: bounds memory, and keeps them in a CPU's cache
BIASES_TOGETHER = 2**28  # the same where calls are dear: bounds memory alone
NUM_BOX_TOKENS = 5  # two corners; the release fills up to the length of its point prompts


class SamEncoder(official.ImageEncoderViT):
    """SAM's ViT: windowed and global attention with decomposed relative positions, conv neck.

    Args:
        image_size: side of the square images that the position tables are made for.
        width, depth: of the transformer; `out_channels` is the width of the features.
        window_size: side of the attention windows, in cells.
        global_blocks: indices of the blocks that attend to the whole image.
        stem: replaces the linear patch embedding; float[B, 3, H, W] -> float[B, width, h, w].
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        out_channels: int,
        window_size: int,
        global_blocks: Sequence[int],
        mlp_ratio: float = 4.0,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__(image_size, patch_size, 3, width, depth=0, out_chans=out_channels)
        self.patch_size = patch_size
        self.out_channels = out_channels
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for index in range(depth):
            window = None if index in global_blocks else window_size
            side = window or image_size // patch_size
            self.blocks.append(WindowedBlock(width, num_heads, mlp_ratio, side, window))
        if stem is not None:
            self.patch_embed.proj = stem

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images float[B, 3, H, W] -> features float[B, out_channels, h, w]."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            multiples = f"images whose sides are multiples of {self.patch_size}"
            raise ValueError(f"SAM takes {multiples}, not {height} x {width}")
        # A convolution's result lies channels first in memory; every later sum would, too.
        x = self.patch_embed(images).contiguous()  # (B, h, w, C)
        x = x + resize_table(self.pos_embed[0], x.shape[1:3])
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class WindowedBlock(nn.Module):
    """SAM's transformer block; `window` is the side of its windows in cells, None for none."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, side: int, window: int | None
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        grid = (side, side)
        self.attn = RelativeAttention(width, num_heads, use_rel_pos=True, input_size=grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """float[B, h, w, C] -> the same."""
        x = x + self.attn(self.norm1(x), self.window)
        return x + self.mlp(self.norm2(x))


class RelativeAttention(Attention):
    """SAM's attention on fused kernels, for grids of another size than its position tables'.

    Cells that SAM pads the last windows with are zero before the projections, and are attended to.
    A CPU is kept from computing what is not asked for, in parts that fit its cache. On a GPU many
    small calls cost more than that saves: all windows attend at once, padding and all.
    """

    def forward(self, x: Tensor, window: int | None) -> Tensor:
        read = self.read_in_parts if x.device.type == "cpu" else self.read_together
        return self.proj(read(x, window))

    def read_together(self, x: Tensor, window: int | None) -> Tensor:
        """What all cells read, before `proj`, in few large calls: float[B, h, w, C] -> the same."""
        if window is None:
            return self.attend_whole(x)
        windows, padded = window_partition(x, window)
        return window_unpartition(self.attend_whole(windows), window, padded, x.shape[1:3])

    def attend_whole(self, x: Tensor) -> Tensor:
        """What the cells of R grids read: float[R, h, w, C] -> the same."""
        h, w = x.shape[1:3]
        tables = relative_positions(self.rel_pos_h, h), relative_positions(self.rel_pos_w, w)
        at_once = max(BIASES_TOGETHER // (self.num_heads * (h * w) ** 2), 1)
        found = []
        for qkv in self.qkv(x).unflatten(3, (3, self.num_heads, -1)).split(at_once):
            q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # (R, heads, h, w, d) each
            to_rows = torch.einsum("bnhwc,hkc->bnhwk", q, tables[0])
            to_columns = torch.einsum("bnhwc,wkc->bnhwk", q, tables[1])
            bias = to_rows[..., None] + to_columns[..., None, :]
            bias = bias.flatten(4).flatten(2, 3).to(q.dtype)
            q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
            found.append(read.transpose(1, 2))  # (R, cells, heads, d)
        return torch.cat(found).view(x.shape)

    def read_in_parts(self, x: Tensor, window: int | None) -> Tensor:
        """`read_together` without needless work: one cell stands for all of the padding.

        Windows are cut after the projections, and padding asks nothing itself.
        """
        B, h, w, C = x.shape
        cells = x.flatten(1, 2)
        if window is None:
            return self.attend(self.qkv(cells).view(B, h, w, 3 * C), h, w).view(B, h, w, C)
        order = window_order(h, w, window, x.device)
        qkv = self.qkv(F.pad(cells, (0, 0, 0, 1))).index_select(1, order)
        windows = qkv.view(B, -(-h // window), -(-w // window), window, window, 3 * C)
        found = x.new_empty(B, h, w, C, dtype=qkv.dtype)
        for down, top, rows in window_spans(h, window):
            for across, left, columns in window_spans(w, window):
                part = windows[:, down, across]  # (B, n, m, window, window, 3 * C)
                read = self.attend(part.flatten(0, 2), rows, columns)
                read = read.view(*part.shape[:3], rows, columns, C).transpose(2, 3)
                found[:, top, left] = read.reshape(B, part.shape[1] * rows, -1, C)
        return found

    def attend(self, qkv: Tensor, rows: int, columns: int) -> Tensor:
        """What the first cells of R grids read: float[R, h, w, 3 * C] -> [R, rows * columns, C]."""
        h, w = qkv.shape[1:3]
        q, k, v = qkv.unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        grid = q[:, :, :rows, :columns]  # (R, heads, rows, columns, d)
        tables = (
            relative_positions(self.rel_pos_h, h)[:rows],
            relative_positions(self.rel_pos_w, w)[:columns],
        )
        # To the row and to the column of a key, as a product with ones: sums of such short runs
        # are several times slower.
        of_row, of_column = (torch.eye(n, dtype=q.dtype, device=q.device) for n in (h, w))
        spread = torch.cat([of_row.repeat_interleave(w, 1), of_column.repeat(1, h)])
        pairs = len(q) * self.num_heads * columns * h * w  # of a row of cells
        at_once = max(BIASES_AT_ONCE // pairs, 1)
        found = []
        for part, table in zip(grid.split(at_once, 2), tables[0].split(at_once), strict=True):
            to_rows = torch.einsum("bnhwc,hkc->bnhwk", part, table)
            to_columns = torch.einsum("bnhwc,wkc->bnhwk", part, tables[1])
            bias = torch.cat([to_rows, to_columns], dim=4).flatten(2, 3).to(q.dtype) @ spread
            part = part.flatten(2, 3)
            read = F.scaled_dot_product_attention(part, k, v, attn_mask=bias, scale=self.scale)
            found.append(read.transpose(1, 2))  # (R, cells, heads, d)
        return torch.cat(found, dim=1).flatten(2)


def window_order(h: int, w: int, window: int, device: torch.device) -> Tensor:
    """Indices of the cells of a grid, window after window; h * w for those outside the grid."""
    cells = torch.arange(h * w, device=device).view(h, w)
    cells = F.pad(cells, (0, -w % window, 0, -h % window), value=h * w)
    cells = cells.unflatten(1, (-1, window)).unflatten(0, (-1, window))
    return cells.transpose(1, 2).flatten()


def window_spans(size: int, window: int) -> list[tuple[slice, slice, int]]:
    """Windows along an axis: which ones, the cells they cover and how many cells each.

    Those that fit come first, then the one that reaches over the edge.
    """
    whole, rest = divmod(size, window)
    inner, edge = slice(0, whole * window), slice(whole * window, size)
    spans = [(slice(0, whole), inner, window), (slice(whole, whole + 1), edge, rest)]
    return [span for span in spans if span[1].start < span[1].stop]


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions [S, S, C] of another grid, float[h, w, C], as `resize` would make them.

    Channels lie last, so resizing is a matrix product on either side, many times faster.
    """
    h, w = size
    S = len(table)
    eye = torch.eye(S, device=table.device)[None, None]
    rows, columns = (resize(eye, (S, n), "bicubic")[0, 0].T for n in (h, w))
    with torch.autocast(table.device.type, enabled=False):
        resized = (rows @ table.float().flatten(1)).view(h, S, -1)
        return (columns @ resized).to(table.dtype)


def relative_positions(table: Tensor, side: int) -> Tensor:
    """Rows of a (2 * n - 1, d) table for all pairs on an axis of `side` cells: (side, side, d)."""
    # The axis is resized as the last one of an image: antialiasing needs no singleton there.
    table = resize(table.T[None, None], (table.shape[1], 2 * side - 1), "bilinear")[0, 0].T
    table = table.contiguous()
    return table.unfold(0, side, 1).mT.flip(1)  # [i, j] is row i - j + side - 1


class FourierPositions(PositionEmbeddingRandom):
    """SAM's random Fourier encoding, in float32 whatever autocast says."""

    def _pe_encoding(self, coords: Tensor) -> Tensor:
        # Angles reach tens of radians: bfloat16 would move a point by several per cent.
        with torch.autocast(coords.device.type, enabled=False):
            return super()._pe_encoding(coords.float())


class PromptEncoder(official.PromptEncoder):
    """SAM's prompt encoder; calling it encodes points, boxes and masks as SAM does.

    Args:
        width: channels of the prompt tokens, equal to the encoder's `out_channels`.
        grid_size: (h, w) of the image features that SAM's own call returns a dense prompt for.
        image_size: (H, W) in pixels that SAM's own call measures its prompts in.
    """

    def __init__(
        self,
        width: int,
        grid_size: tuple[int, int],
        image_size: tuple[int, int],
        mask_channels: int = 16,
    ) -> None:
        super().__init__(width, grid_size, image_size, mask_channels)
        self.pe_layer = FourierPositions(width // 2)

    @property
    def no_mask(self) -> Tensor:
        """float[width]: the dense prompt that stands for "no mask"."""
        return self.no_mask_embed.weight[0]

    def dense_pe(self, h: int, w: int) -> Tensor:
        """Positions of the cell centres of an h x w grid: float32[1, width, h, w]."""
        return self.pe_layer((h, w))[None]

    def encode_boxes(self, boxes_px: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Location prompts as PixelLLM feeds them.

        A box gives its two corner tokens, filled up with the no-mask embedding. An all-zero box,
        which marks padding, gives what the release gives: four points at the origin.

        Args:
            boxes_px: float32[R, 4], xyxy in pixels of the frame.
            image_size: (H, W) of the frame.

        Returns:
            float32[R, 5, width].
        """
        R = boxes_px.shape[0]
        corners = self.pe_layer.forward_with_coords((boxes_px + 0.5).view(R, 2, 2), image_size)
        ends = torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])
        filling = self.no_mask.expand(R, NUM_BOX_TOKENS - 2, -1)
        box_tokens = torch.cat([corners + ends, filling], dim=1)
        points = corners[:, :1] + self.point_embeddings[1].weight
        nothing = self.not_a_point_embed.weight.expand(R, 1, -1)
        point_tokens = torch.cat([points.expand(-1, NUM_BOX_TOKENS - 1, -1), nothing], dim=1)
        return torch.where((boxes_px.amax(1) > 0)[:, None, None], box_tokens, point_tokens)


class MaskDecoder(official.MaskDecoder):
    """SAM's mask decoder on a batch of images with several prompts each.

    Args:
        width: channels of features and prompt tokens.
        depth, num_heads, mlp_width: of the two-way transformer.
    """

    def __init__(self, width: int, depth: int = 2, num_heads: int = 8, mlp_width: int = 2048):
        transformer = official.TwoWayTransformer(depth, width, num_heads, mlp_width)
        super().__init__(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=width)

    def forward(
        self, features: Tensor, image_pe: Tensor, prompt_tokens: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Masks and their predicted IoU; index 0 is the single answer, 1 to 3 the alternatives.

        Args:
            features: float[B, C, h, w].
            image_pe: float[1, C, h, w].
            prompt_tokens: float[B, K, P, C].
            dense: float[C], the no-mask vector.

        Returns:
            Logits float[B, K, 4, 4h, 4w] and IoU float[B, K, 4].
        """
        B, K = prompt_tokens.shape[:2]
        h, w = features.shape[-2:]
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([outputs.expand(B, K, -1, -1), prompt_tokens], dim=2)
        cells = features.flatten(2).mT[:, None] + dense  # (B, 1, N, C)
        tokens, cells = two_way(self.transformer, tokens, cells, image_pe.flatten(2).mT[0])
        tokens, cells = tokens.flatten(0, 1), cells.flatten(0, 1)  # (R, …)
        upscaled = self.output_upscaling(cells.mT.unflatten(2, (h, w)))  # (R, C / 8, 4h, 4w)
        mixers = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("rmc,rchw->rmhw", torch.stack(mixers, dim=1), upscaled)
        ious = self.iou_prediction_head(tokens[:, 0])
        return masks.unflatten(0, (B, K)), ious.unflatten(0, (B, K))
