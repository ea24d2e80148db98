"""PixelLLM: image and location prompt in, words and a point per word out (paper, figure 2).

The frozen SAM features say where things are, the trainable EVA02 features what they are; the
prompt feature extractor reads both at a location and hands 32 tokens to the language model,
whose last hidden states drive a vocabulary head and a point head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixelllm.boxes import to_pixels
from pixelllm.images import normalise
from pixelllm.models.prompt import PromptFeatureExtractor, fuse_features
from pixelllm.models.sam import PromptEncoder


class Text(NamedTuple):
    """Token ids of R rows: the context each row is given and the words it should write.

    `context_ids` int64[R, C] and `context_padding` bool[R, C]; `token_ids` int64[R, T] from the
    begin to the end token and `token_padding` bool[R, T].
    """

    context_ids: Tensor
    context_padding: Tensor
    token_ids: Tensor
    token_padding: Tensor


class ImageFeatures(NamedTuple):
    """`fused` float32[B, C, h, w] of all encoders; `sam` float32[B, S, h', w'], SAM's alone."""

    fused: Tensor
    sam: Tensor


class Prediction(NamedTuple):
    """What the model says of given words.

    `logits` float32[R, T, V] of the next token; `points` float32[R, T, 2, 2], the top-left and
    bottom-right corner of what each *input* token is about, in [0, 1] of the image; `prefix`
    float[B, K, N, D], the visual tokens, and `hidden` float[R, T, D], the features of the words.
    """

    logits: Tensor
    points: Tensor
    prefix: Tensor
    hidden: Tensor


class ImageBranch(nn.Module):
    """An image encoder with its preprocessing; frozen means no graph and no dropout.

    Args:
        encoder: normalised float[B, 3, S, S] -> float[B, C, h, w].
        mean, std: RGB in 0..255 units.
        input_size: side S the padded images are resized to.
        half_features: round the output to float16, so that cached features are the same.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        input_size: int,
        half_features: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean, self.std = mean, std
        self.input_size = input_size
        self.half_features = half_features

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> ImageBranch:
        # The official SAM drops paths while it is frozen; features then differ at each visit.
        return super().train(mode and not self.is_frozen)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8 or float[B, 3, S', S'] in 0..255 and int64[B, 2] -> float32[B, C, h, w]."""
        size = (self.input_size, self.input_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            pixels = normalise(images, sizes, self.mean, self.std, size)
            features = self.encoder(pixels.to(next(self.encoder.parameters()).dtype))
        return features.half().float() if self.half_features else features.float()


class PixelLLMNetwork(nn.Module):
    """The network of the paper's figure; every part is given.

    Args:
        eva02, sam: image branches; their features are concatenated in this order.
        prompt_encoder: SAM's.
        extractor: the prompt feature extractor.
        projection: from the extractor's output width to the trunk's.
        language: a trunk of `pixelllm.models.language`.
        point_head: hidden states -> points.
        prompt_frame: side in pixels that prompt boxes are encoded relative to.
        mask_head: masks of located phrases, where the model segments.
        detector: proposes boxes on the fused features, where the model finds objects itself.
    """

    def __init__(
        self,
        eva02: ImageBranch,
        sam: ImageBranch,
        prompt_encoder: PromptEncoder,
        extractor: PromptFeatureExtractor,
        projection: nn.Module,
        language: nn.Module,
        point_head: nn.Module,
        prompt_frame: int,
        mask_head: nn.Module | None = None,
        detector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.eva02 = eva02
        self.sam = sam
        self.prompt_encoder = prompt_encoder
        self.extractor = extractor
        self.projection = projection
        self.language = language
        self.point_head = point_head
        self.prompt_frame = prompt_frame
        self.mask_head = mask_head
        self.detector = detector

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        text: Text,
        features: dict[str, Tensor] | None = None,
    ) -> Prediction:
        """Teacher-forced prediction for B images with K prompts each, R = B * K rows.

        Args:
            images: uint8 or float[B, 3, S, S] in 0..255, zero padded bottom and right.
            sizes: int64[B, 2], (H, W) of the image inside the frame, in pixels.
            boxes: float32[B, K, 4], prompts, xyxy in [0, 1] of the image; or float32[B, 1, 4],
                one for all rows of an image.
            text: of the R rows.
            features: outputs of frozen branches by name ("sam", "eva02"), instead of running them.
        """
        return self.read(self.encode(images, sizes, features or {}), sizes, boxes, text)

    def read(self, features: ImageFeatures, sizes: Tensor, boxes: Tensor, text: Text) -> Prediction:
        """`forward` from the features of the images."""
        num_prompts = len(text.token_ids) // len(sizes)
        prefix = self.prefix(features, sizes, boxes).expand(-1, num_prompts, -1, -1)
        hidden = self.language(prefix.flatten(0, 1), *text)  # (R, T, D)
        return Prediction(self.language.logits(hidden), self.point_head(hidden), prefix, hidden)

    def encode(self, images: Tensor, sizes: Tensor, features: dict[str, Tensor]) -> ImageFeatures:
        """What the encoders see; `features` are outputs of frozen ones, instead of running them."""
        eva02, sam = (
            features[name].float() if name in features else branch(images, sizes)
            for name, branch in (("eva02", self.eva02), ("sam", self.sam))
        )
        return ImageFeatures(fuse_features([eva02, sam]), sam)

    def prefix(self, features: ImageFeatures, sizes: Tensor, boxes: Tensor) -> Tensor:
        """Visual tokens of every prompt, float[B, K, N, D]."""
        boxes_px = to_pixels(boxes.float(), sizes)  # (B, K, 4)
        frame = (self.prompt_frame, self.prompt_frame)
        prompts = self.prompt_encoder.encode_boxes(boxes_px.flatten(0, 1), frame)  # (R, 5, P)
        tokens = self.extractor(
            features.fused,
            prompts.unflatten(0, boxes.shape[:2]),
            self.prompt_encoder.no_mask,
            self.prompt_encoder.dense_pe(*features.fused.shape[-2:]),
            boxes_px / self.prompt_frame,
        )
        return self.projection(tokens)

    def segment(
        self,
        features: ImageFeatures,
        sizes: Tensor,
        boxes: Tensor,
        prediction: Prediction,
        token_padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Masks of the things in boxes, through the mask head.

        Args:
            boxes: float32[B, K, 4], xyxy in [0, 1] of the image; they get no gradient.
            prediction: of the words that say what is in the boxes.
            token_padding: bool[R, T] of the words; None lets masks see padding, as the release's.

        Returns:
            Logits float[B, K, 4h', 4w'] over the padded frame and predicted IoU float[B, K].
        """
        boxes_px = to_pixels(boxes.detach().float(), sizes)
        hidden = prediction.hidden.unflatten(0, boxes.shape[:2])  # (B, K, T, D)
        if token_padding is not None:
            token_padding = token_padding.unflatten(0, boxes.shape[:2])
        words = (prediction.prefix, hidden, token_padding)
        return self.mask_head(features.sam, boxes_px, self.prompt_encoder, *words)
