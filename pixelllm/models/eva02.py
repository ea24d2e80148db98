"""EVA-02 image encoder (Fang et al., 2023) through timm, at any input size.

The PixelLLM release differs from timm in two ways. It does not rescale rotary positions to the
grid of pretraining: an option here. Its norms inside the feed-forward layers have an epsilon of
1e-5: `eva02` does as the release, `eva02_from_timm` keeps timm's 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from timm.models.eva import Eva, EvaAttention, checkpoint_filter_fn
from torch import Tensor, nn

from pixelllm.weights import load_exactly, read_weights

PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # CLIP's, RGB, 0..255
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)

ALIGNED = 64  # widths of a matrix product that leave no ragged edge (measured with AVX2)

_AS_FEATURES = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}


class RotaryAttention(EvaAttention):
    """timm's attention with its rotations as one product of complex numbers.

    timm rotates interleaved pairs of channels in six passes over the queries and the keys, all but
    the class token, which it cuts off and puts back; here the class token turns by nothing.
    """

    def forward(self, x: Tensor, rope: Tensor, attn_mask: None, is_causal: bool) -> Tensor:
        """float[B, T, C] and sines and cosines of pairs, float[T - 1, 2 * d] -> float[B, T, C]."""
        if self.qkv is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        sines, cosines = rope.float()[:, ::2].chunk(2, dim=-1)  # (T - 1, d / 2)
        start = (0, 0, self.num_prefix_tokens, 0)
        turns = torch.complex(F.pad(cosines, start, value=1.0), F.pad(sines, start))[:, None]
        q, k, v = (part.unflatten(2, (self.num_heads, -1)) for part in (q, k, v))
        q, k = turn(q, turns), turn(k, turns)
        # Rows of a head that lie 2^n bytes apart share slots of a cache: a third slower attention.
        q, k, v = (part.transpose(1, 2).contiguous() for part in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v)
        return self.proj(self.norm(found.transpose(1, 2).flatten(2)))


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of channels of float[B, T, heads, d] as complex numbers, times complex[T, 1, d / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(3, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)


class AlignedSwiGLU(SwiGLU):
    """timm's gated feed-forward layer with its two wide products at a width that kernels like.

    EVA02-L's 2,730 hidden channels leave a ragged edge that costs a third of those products'
    speed. Rows of zeros up to the next multiple of `ALIGNED` follow them in memory and their
    results are left out: the parameters and the arithmetic stay timm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float[B, T, C] -> float[B, T, C]."""
        gates, values = _linear_aligned(self.fc1_g, x), _linear_aligned(self.fc1_x, x)
        hidden = self.norm(self.drop1(self.act(gates) * values))
        return self.drop2(self.fc2(hidden))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlignedSwiGLU:
        super()._apply(fn, recurse)  # another device or number format has lost the rows
        self.make_room()
        return self

    def make_room(self) -> None:
        """Let zeros follow the rows of both wide weights in memory."""
        for layer in (self.fc1_g, self.fc1_x):
            if not _has_room(layer.weight):
                roomy = F.pad(layer.weight.detach(), (0, 0, 0, _missing(layer.weight)))
                layer.weight.data = roomy[: len(layer.weight)]


def _linear_aligned(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`; a view of a wider result where the width is not a multiple of `ALIGNED`."""
    weight, missing = layer.weight, _missing(layer.weight)
    learns = torch.is_grad_enabled() and weight.requires_grad
    if learns or not _has_room(weight):
        weight = F.pad(weight, (0, 0, 0, missing))
    else:
        weight = weight.as_strided((len(weight) + missing, weight.shape[1]), weight.stride())
    bias = None if layer.bias is None else F.pad(layer.bias, (0, missing))
    return F.linear(x, weight, bias)[..., : layer.out_features]


def _missing(weight: Tensor) -> int:
    """Rows up to the next multiple of `ALIGNED`."""
    return -len(weight) % ALIGNED


def _has_room(weight: Tensor) -> bool:
    """Whether the missing rows follow in memory. Sharded weights, whose class says so, have none.

    Nothing else lies behind a parameter in its own storage, so the rows are still zeros.
    """
    if type(weight) not in (Tensor, nn.Parameter):
        return False
    bytes_needed = (len(weight) + _missing(weight)) * weight.shape[1] * weight.element_size()
    is_first = weight.is_contiguous() and weight.storage_offset() == 0
    return is_first and weight.untyped_storage().nbytes() == bytes_needed


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
        for block in vit.blocks:
            # Other classes, the same parameters, where checkpoints have them.
            block.attn.__class__ = RotaryAttention
            if isinstance(block.mlp, SwiGLU):
                block.mlp.__class__ = AlignedSwiGLU
                block.mlp.make_room()
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
    interpolate_rope: bool = False,
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
        interpolate_rope: stretch rotary positions over the table's grid at every size.
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
        ref_feat_shape=image_size // patch_size if interpolate_rope else None,
        drop_path_rate=drop_path,
        use_post_transformer_norm=final_norm,
        use_fc_norm=False,
        **_AS_FEATURES,
    )
    for block in vit.blocks:
        block.mlp.norm.eps = 1e-5
    return Eva02Encoder(vit, stem)


def eva02_from_timm(
    name: str, pretrained: bool = False, drop_path: float = 0.0, interpolate_rope: bool = False
) -> Eva02Encoder:
    """Any EVA-02 that timm knows, e.g. `eva02_large_patch14_224.mim_m38m`.

    Args:
        name: timm's name.
        pretrained: load timm's weights, from the Hub or its cache.
        drop_path: see `eva02`.
        interpolate_rope: as timm, not as the PixelLLM release; see `eva02`.
    """
    positions = {} if interpolate_rope else {"ref_feat_shape": None}
    vit = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=0,
        dynamic_img_size=True,
        drop_path_rate=drop_path,
        **positions,
    )
    if isinstance(vit.norm, nn.Identity):
        # Where timm pools it puts the last norm of pretraining behind that; we norm all tokens.
        vit.norm, vit.fc_norm = vit.fc_norm, vit.norm
    return Eva02Encoder(vit)


def load_eva02_file(path: str | Path, encoder: Eva02Encoder) -> None:
    """Weights from a file: timm's, open_clip's or EVA-02's own, safetensors or torch.

    The position table is resized to the grid of the encoder's; heads and the token that
    pretraining masks with are left out. Raises as `read_weights` and `load_exactly`.
    """
    state, vit = read_weights(path), encoder.vit
    patches = next(
        (v.shape[-1] for k, v in state.items() if k.endswith("patch_embed.proj.weight")), 0
    )
    if patches and patches != vit.patch_embed.patch_size[0]:  # timm would resample it
        raise ValueError(
            f"{path}: patches of {patches} pixels, not {vit.patch_embed.patch_size[0]}"
        )
    state = checkpoint_filter_fn(state, vit)
    state = {
        re.sub("^fc_norm", "norm", k): v for k, v in state.items() if not k.startswith("head.")
    }
    load_exactly(vit, state, str(path))
