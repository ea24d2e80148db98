"""PerceptionGPT's training step on shapes alone, for `pixelllm.plan`.

What the step computes, but for the choice of places by their tokens, which needs values: visual
tokens, words and objects stand in rows of their own here, which costs the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixelllm.config import Source
from pixelllm.markers import add_markers
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import PerceptionConfig
from pixelllm.tokenizer import train_tokenizer
from pixelllm.vis_losses import answer_loss, vis_mask_loss

WORDS = 64  # of a question and its answer, where nobody says
WITHOUT_OBJECTS = ("caption", "question")


def build_perception_model(config: PerceptionConfig) -> PerceptionGPT:
    tokenizer = train_tokenizer(["a caption"], 100)
    add_markers(tokenizer)
    return PerceptionGPT(config, tokenizer)


def text_length(config: PerceptionConfig, model: PerceptionGPT, source: Source) -> int:
    """Tokens of an image with its conversations, at most what the recipe allows."""
    num_patches = model.clip.num_tokens(config.model.frame)
    return min(num_patches + source.phrases_per_image * WORDS, config.max_tokens)


def perception_loss(
    model: PerceptionGPT, config: PerceptionConfig, source: Source, images: int
) -> Tensor:
    """Forward pass and losses of a micro batch; a scalar. Half of what is not image is answer."""
    frame, K = config.model.frame, source.phrases_per_image
    M = 0 if source.task in WITHOUT_OBJECTS else images * K
    with_masks = source.mask_weight > 0
    views = model.view(torch.zeros(images, 3, frame, frame, dtype=torch.uint8), with_masks)
    visual = model.projector(views.coarse)
    N, T = visual.shape[1], text_length(config, model, source)
    words = model.language.embed(torch.zeros(images, T - N - M // images, dtype=torch.long))
    parts = [visual.to(words.dtype), words]
    if M:
        seen = model.box_encoder(torch.zeros(M, 4)).unflatten(0, (images, K))
        parts.append(seen.to(words.dtype))
    visible = torch.ones(images, T, T, dtype=torch.bool)
    hidden = model.language.read(torch.cat(parts, 1), visible)
    states = hidden[:, N::2].flatten(0, 1)
    logits = model.language.logits(states)
    loss = answer_loss(logits, torch.zeros(len(states), dtype=torch.long))
    if M:
        loss = loss + model.box_decoder(states[:M]).abs().sum()
    if M and with_masks:
        masks = model.segment(states[:M], views, torch.zeros(M, dtype=torch.long))
        side = config.model.vis.mask_size
        loss = loss + sum(vis_mask_loss(masks, torch.zeros(M, side, side)))
    return loss
