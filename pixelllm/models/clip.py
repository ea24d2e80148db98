"""CLIP's image encoder with multi-layer feature fusion, PerceptionGPT's eyes (paper, section 3).

Every pass sums the hidden states 0 ... L - 1 of the L + 1, each scaled by the softmax of learned
weights. The coarse pass is CLIP as it is and feeds the language model, the fine pass has smaller
patches and feeds the mask decoder (reference, section 1.1). Differences: one backbone serves both
passes, where the release holds two, and images may have any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # RGB, 0..255
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)


class FusedClip(nn.Module):
    """Two views of an image through one CLIP.

    Args:
        vit: its last block and last norm, which nothing reads, are cut off.
        fine_patch: side of the patches of the fine pass, in pixels.
        fuse_layers: learn the weights of the sum; otherwise the last state is all there is.
        stem: replaces the linear patch embedding; float[B, 3, H, W] -> float[B, C, h, w].
    """

    def __init__(
        self,
        vit: CLIPVisionModel,
        fine_patch: int,
        fuse_layers: bool = True,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if stem is not None:
            vit.embeddings.patch_embedding = stem
        vit.encoder.layers = vit.encoder.layers[:-1]
        vit.post_layernorm = nn.Identity()
        self.vit = vit
        self.fine_patch = fine_patch
        num_states = len(vit.encoder.layers) + 1
        if fuse_layers:
            self.coarse_weights, self.fine_weights = (
                nn.Parameter(torch.full((num_states,), 1 / num_states)) for _ in range(2)
            )
        else:
            last = torch.full((num_states,), -torch.inf)
            last[-1] = 0.0
            self.register_buffer("coarse_weights", last)
            self.register_buffer("fine_weights", last.clone())

    @property
    def width(self) -> int:
        """C of the features."""
        return self.vit.config.hidden_size

    def train(self, mode: bool = True) -> FusedClip:
        super().train(mode)
        self.vit.train(mode and any(p.requires_grad for p in self.vit.parameters()))
        return self

    def coarse(self, images: Tensor) -> Tensor:
        """Normalised float[B, 3, H, W] -> float[B, N, C], row by row, at CLIP's own patch size."""
        return self._fuse(images, self.vit.config.patch_size, self.coarse_weights)

    def fine(self, images: Tensor) -> Tensor:
        """Normalised float[B, 3, H, W] -> float[B, C, h, w], at the fine patch size."""
        fused = self._fuse(images, self.fine_patch, self.fine_weights)
        return fused.mT.unflatten(2, (images.shape[2] // self.fine_patch, -1))

    def num_tokens(self, side: int) -> int:
        """N of the coarse pass over a square image of the given side."""
        return (side // self.vit.config.patch_size) ** 2

    def _fuse(self, images: Tensor, patch: int, weights: Tensor) -> Tensor:
        """The weighted sum of states without the class token, float[B, N, C].

        It is added up as the states appear, so that nothing but the gradient of the weights, in
        training, keeps them.
        """
        shares = weights.softmax(0)
        state = self.vit.pre_layrnorm(self.embed(images, patch))
        fused = shares[0] * state
        for share, block in zip(shares[1:], self.vit.encoder.layers, strict=True):
            state = block(state, None)
            fused = fused + share * state
        return fused[:, 1:]

    def embed(self, images: Tensor, patch: int) -> Tensor:
        """Class token and patches with their positions, float[B, 1 + N, C]."""
        height, width = images.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"CLIP with patches of {patch} pixels takes images whose sides are multiples of "
                f"{patch}, not {height} x {width}"
            )
        patches = self._embed_patches(images, patch)
        tokens = patches.flatten(2).mT
        first = self.vit.embeddings.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, tokens], dim=1) + self.positions(*patches.shape[-2:])

    def _embed_patches(self, images: Tensor, patch: int) -> Tensor:
        """float[B, C, h, w].

        For patches of another size the kernel is resized, bilinearly from corner to corner and
        without rescaling; before a stem the image is resized instead, which comes to the same.
        """
        embedding, own = self.vit.embeddings.patch_embedding, self.vit.config.patch_size
        if isinstance(embedding, nn.Conv2d):
            kernel = embedding.weight
            if patch != own:
                kernel = F.interpolate(kernel, (patch, patch), mode="bilinear", align_corners=True)
            return F.conv2d(images, kernel, stride=patch)
        if patch != own:
            size = [side // patch * own for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return embedding(images)

    def positions(self, h: int, w: int) -> Tensor:
        """CLIP's position table for a grid of h x w patches, class token first: float[1 + N, C]."""
        table = self.vit.embeddings.position_embedding.weight
        side = int((len(table) - 1) ** 0.5)
        if (h, w) == (side, side):
            return table
        grid = table[1:].T.unflatten(1, (side, side))[None]  # (1, C, side, side)
        grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
        return torch.cat([table[:1], grid[0].flatten(1).T])
