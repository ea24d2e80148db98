"""PerceptionGPT: image and text in, text out, and one `<vis>` in it carries a box or a mask.

Pi et al., CVPR 2024, figure 2 (reference, sections 1 and 2). Into the language model, `<vis>` is
the embedding of its object's box (or mask); out of it, the state that predicts `<vis>`, one
position before, is decoded to a box and a mask. Differences: several texts may share an image, an
object keeps its image whichever samples have answers with objects, and logits exist for the
answers alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixelllm.images import normalise
from pixelllm.markers import MarkerIds
from pixelllm.models.clip import PIXEL_MEAN, PIXEL_STD, FusedClip
from pixelllm.models.language import DecoderOnlyLanguage
from pixelllm.models.mask_encoder import MaskEncoder
from pixelllm.models.trunk import Language
from pixelllm.models.vis_boxes import BoxDecoder, BoxEncoder
from pixelllm.models.vis_masks import VisMaskHead, sine_positions
from pixelllm.perception_config import VisInput

PLACE_CHANNELS = 64


class Tokens(NamedTuple):
    """R texts, padded on either side: `token_ids` int64, `padding` and `is_answer` bool[R, T].

    `is_answer` marks what the model is to write, the end token included; never a first token, nor
    that of a branch. `branches` int64[R, T], where a text has several: 0 for what they have in
    common at its start, or the number of the branch, which sees this start and itself alone.
    """

    token_ids: Tensor
    padding: Tensor
    is_answer: Tensor
    branches: Tensor | None = None


class Objects(NamedTuple):
    """What the M `<vis>` of the texts stand for, in reading order, one text after the other.

    `boxes` float32[M, 4], xyxy in [0, 1] of the padded square; `has_mask` bool[M] and `masks`
    float32[m, S, S] in [0, 1], of those that have one; `by_mask` bool[M], which of these the
    language model reads as a mask, instead of as a box.
    """

    boxes: Tensor
    masks: Tensor
    has_mask: Tensor
    by_mask: Tensor

    @classmethod
    def of_boxes(cls, boxes: Tensor) -> Objects:
        """Objects without masks."""
        none = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        return cls(boxes, boxes.new_zeros(0, 1, 1), none, none)


class Views(NamedTuple):
    """Fused features of B images: `coarse` float[B, N, C], and `fine` float[B, C, h, w], which
    masks are decoded from; None where none are."""

    coarse: Tensor
    fine: Tensor | None


class Perception(NamedTuple):
    """What the model says where it is told what it should.

    `logits` float32[A, V] of the A answer tokens in reading order; `boxes` float32[n, 4] of the n
    `<vis>` among them, xyxy in [0, 1] of the padded square, corners in any order; `masks`
    float32[m, h, w], logits of those whose object has a mask; `is_target` bool[M], which objects
    these n are; `hidden` float[R, T, D].
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor
    is_target: Tensor
    hidden: Tensor


class PerceptionGPTNetwork(nn.Module):
    """The network of the paper's figure; every part is given.

    Args:
        clip: both views of the image.
        projector: from the coarse view's width to the trunk's.
        language: a causal trunk that has the markers in its vocabulary (else ValueError).
        box_encoder, mask_encoder: objects to embeddings.
        box_decoder, mask_head: states to objects.
        markers: ids of the special tokens.
        place_map: from `PLACE_CHANNELS` to the trunk's width, of a code of where visual tokens lie,
            which is added to them; the paper's model has none.
    """

    def __init__(
        self,
        clip: FusedClip,
        projector: nn.Module,
        language: Language,
        box_encoder: BoxEncoder,
        box_decoder: BoxDecoder,
        mask_encoder: MaskEncoder,
        mask_head: VisMaskHead,
        markers: MarkerIds,
        place_map: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_trunk(language, markers)
        self.clip = clip
        self.projector = projector
        self.language = language
        self.box_encoder = box_encoder
        self.box_decoder = box_decoder
        self.mask_encoder = mask_encoder
        self.mask_head = mask_head
        self.markers = markers
        self.place_map = place_map

    def forward(self, images: Tensor, tokens: Tokens, objects: Objects) -> Perception:
        """Teacher-forced prediction for B images with K texts each, R = B * K.

        Args:
            images: uint8 or float[B, 3, S, S] in 0..255, padded to a square; texts without image
                markers ignore theirs.
            tokens: of the texts, those of an image adjacent.
            objects: of all `<vis>` in them.
        """
        check_objects(tokens.token_ids == self.markers.vis, objects)
        is_target = tokens.is_answer[tokens.token_ids == self.markers.vis]
        has_mask = objects.has_mask[is_target]
        views = self.view(images, fine=bool(has_mask.any()))
        inputs = self.embed(tokens.token_ids, views, objects)
        hidden = self.language.read(inputs, what_is_seen(tokens))  # (R, T, D)
        row, place = tokens.is_answer.nonzero(as_tuple=True)
        states = hidden[row, place - 1]  # (A, D), each before the token that it predicts
        is_vis = tokens.token_ids[row, place] == self.markers.vis
        image = row * len(images) // len(tokens.token_ids)
        return Perception(
            self.language.logits(states),
            self.box_decoder(states[is_vis]),
            self.segment(states[is_vis][has_mask], views, image[is_vis][has_mask]),
            is_target,
            hidden,
        )

    def view(self, images: Tensor, fine: bool = True) -> Views:
        """The passes over uint8 or float[B, 3, S, S] in 0..255."""
        pixels = normalise(images, None, PIXEL_MEAN, PIXEL_STD, tuple(images.shape[-2:]))
        return Views(self.clip.coarse(pixels), self.clip.fine(pixels) if fine else None)

    def segment(self, states: Tensor, views: Views, image: Tensor) -> Tensor:
        """Mask logits float32[n, h, w] of states float[n, D] about the images int64[n]."""
        if views.fine is None:
            return states.new_zeros(0, 1, 1, dtype=torch.float32)
        return self.mask_head(states, views.fine, image)

    def embed(self, token_ids: Tensor, views: Views, objects: Objects) -> Tensor:
        """What the language model reads, float[R, T, D].

        Raises ValueError where image markers are not as many as visual tokens, or `<vis>` as
        objects.
        """
        embeddings = self.language.embed(token_ids)
        is_image, is_vis = token_ids == self.markers.image, token_ids == self.markers.vis
        check_images(is_image, views)
        check_objects(is_vis, objects)
        visual = self.projector(views.coarse)  # (B, N, D)
        if self.place_map is not None:
            side = math.isqrt(visual.shape[1])
            code = sine_positions(side, side, PLACE_CHANNELS, visual.device)
            visual = visual + self.place_map(code.flatten(1).T)
        visual = visual.repeat_interleave(len(token_ids) // len(visual), dim=0)
        visual = visual[is_image.any(1)].to(embeddings.dtype)
        seen = self.embed_objects(objects).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(is_image[..., None], visual)
        return embeddings.masked_scatter(is_vis[..., None], seen)

    def embed_objects(self, objects: Objects) -> Tensor:
        """The embedding of every `<vis>`, float32[M, D]."""
        embeddings = self.box_encoder(objects.boxes)
        masks = objects.masks[objects.by_mask[objects.has_mask]]
        if len(masks):
            encoded = self.mask_encoder(masks).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(objects.by_mask[:, None], encoded)
        return embeddings


def what_is_seen(tokens: Tokens) -> Tensor:
    """What the trunk reads of the texts: bool[R, T], or by token bool[R, T, T] if they branch."""
    if tokens.branches is None:
        return ~tokens.padding
    reader, read = tokens.branches[:, :, None], tokens.branches[:, None]
    return (~tokens.padding[:, None] & ((read == reader) | (read == 0))).tril()


def draw_by_mask(read: VisInput, has_mask: Tensor) -> Tensor:
    """Which objects the language model reads as a mask, bool[M].

    The paper draws both encoders; the release reads boxes alone (reference, section 2.2).

    Args:
        read: "random" draws for each object, from torch's generator as dropout does.
        has_mask: bool[M]; the others are read as boxes.
    """
    if read == "random":
        return has_mask & (torch.rand(has_mask.shape, device=has_mask.device) < 0.5)
    return has_mask & (read == "mask")


def check_trunk(language: Language, markers: MarkerIds) -> None:
    """Raise ValueError for a trunk that is not causal or does not know the markers."""
    if not isinstance(language, DecoderOnlyLanguage):
        kind = type(language).__name__
        raise ValueError(f"PerceptionGPT writes with a causal language model, not with {kind}")
    num_tokens = language.model.get_input_embeddings().num_embeddings
    if max(markers) >= num_tokens:
        raise ValueError(
            f"the trunk has embeddings for {num_tokens} tokens, but the markers end at token "
            f"{max(markers)}; make it larger with grow_vocabulary"
        )


def check_images(is_image: Tensor, views: Views) -> None:
    """Raise ValueError where a text has not as many image markers as there are visual tokens."""
    N = views.coarse.shape[1]
    for row, count in enumerate(is_image.sum(1).tolist()):
        if count not in (0, N):
            raise ValueError(
                f"text {row} has {count} image markers, but an image gives {N} visual tokens; "
                "was it cut off?"
            )


def check_objects(is_vis: Tensor, objects: Objects) -> None:
    """Raise ValueError where `<vis>` are not as many as objects."""
    if is_vis.sum() != len(objects.boxes):
        raise ValueError(
            f"{is_vis.sum()} <vis> in the texts, but {len(objects.boxes)} boxes; every <vis> of "
            "questions and answers needs its own"
        )
