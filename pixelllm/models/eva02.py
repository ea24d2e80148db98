"""EVA-02 image encoder (Fang et al., 2023) through timm, at any input size.

Two things differ between timm's defaults and the PixelLLM release, and are options here: whether
rotary positions are rescaled to the pretraining grid (the release does not), and the epsilon of
the norm inside the feed-forward layers (1e-5 in the release, 1e-6 in timm).
"""

from __future__ import annotations

import timm
from timm.models.eva import Eva
from torch import Tensor, nn

PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # CLIP's, RGB, 0..255
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)


class Eva02Encoder(nn.Module):
    """A timm EVA-02 as a map of features; `eva02` and `eva02_from_timm` build it.

    Args:
        vit: built with `dynamic_img_size=True`, so that its positions fit any grid.
        stem: replaces the linear patch embedding; float[B, 3, H, W] -> float[B, width, h, w].
    """

    def __init__(self, vit: Eva, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.vit = vit
        self.out_channels = vit.embed_dim
        if stem is not None:
            vit.patch_embed.proj = stem

    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised images; a rest narrower than a patch is cut off.

        Args:
            images: float[B, 3, H, W].

        Returns:
            float[B, out_channels, h, w], the class token dropped.
        """
        patch = self.vit.patch_embed.patch_size[0]
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        tokens = self.vit.forward_features(images[..., : h * patch, : w * patch])
        return tokens[:, self.vit.num_prefix_tokens :].mT.unflatten(2, (h, w))


def eva02(
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    num_heads: int,
    drop_path: float = 0.0,
    rescale_positions: bool = False,
    final_norm: bool = True,
    stem: nn.Module | None = None,
) -> Eva02Encoder:
    """EVA-02 with random weights at any size, built as the larger published ones are.

    Args:
        image_size: side of the square images that the position table is made for.
        patch_size: pixels per feature cell.
        width: channels of the transformer and of the features.
        depth: number of blocks.
        num_heads: attention heads.
        drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
        rescale_positions: measure rotary positions in cells of the table's grid at every size.
        final_norm: end in a LayerNorm over all tokens.
        stem: see `Eva02Encoder`.
    """
    vit = Eva(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=8 / 3,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=image_size // patch_size if rescale_positions else None,
        drop_path_rate=drop_path,
        use_post_transformer_norm=final_norm,
        use_fc_norm=False,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
    )
    return Eva02Encoder(with_inner_norm_eps(vit, 1e-5), stem)


def eva02_from_timm(
    name: str, pretrained: bool = False, drop_path: float = 0.0, rescale_positions: bool = False
) -> Eva02Encoder:
    """Any EVA-02 that timm knows, e.g. `eva02_large_patch14_224.mim_m38m`.

    Args:
        name: timm's name.
        pretrained: load timm's weights, from the Hub or its cache.
        drop_path: see `eva02`.
        rescale_positions: keep timm's rotary positions instead of the PixelLLM release's.
    """
    positions = {} if rescale_positions else {"ref_feat_shape": None}
    vit = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        drop_path_rate=drop_path,
        **positions,
    )
    return Eva02Encoder(with_inner_norm_eps(vit, 1e-5))


def with_inner_norm_eps(vit: Eva, eps: float) -> Eva:
    """Set the epsilon of the norms inside the feed-forward layers, where there are any."""
    for block in vit.blocks:
        if isinstance(block.mlp.norm, nn.LayerNorm):
            block.mlp.norm.eps = eps
    return vit
