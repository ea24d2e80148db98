"""Stages `*-eva02`, `*-clip`: a small image encoder learns to name and box what every patch shows.

Stands in for the published pretraining where there are no published weights of the size:
at every patch on an object, the words of its name and its box. Features that know both what
and where make the language model learn in minutes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelllm.checkpoints import load_config, load_weights, save_config, save_weights
from pixelllm.config import Eva02Pretraining
from pixelllm.images import normalise
from pixelllm.models.build import build_eva02_branch
from pixelllm.models.build_perception import build_clip
from pixelllm.models.clip import PIXEL_MEAN, PIXEL_STD, FusedClip
from pixelllm.perception_config import ClipPretraining
from pixelllm.tables import Table
from pixelllm.training.instances import InstanceBatch, Instances, words_of_regions
from pixelllm.training.loop import Stage

COVERAGE = 0.25  # share of a patch that an object must cover to be its label
FINE_SHARE = 1 / 3  # of CLIP's steps; a fine pass takes five times as long


class PatchNamer(nn.Module):
    """An image encoder with a linear head for words and one for a box, at every patch."""

    def __init__(self, image_encoder: nn.Module, width: int, num_words: int) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.word_head = nn.Linear(width, num_words)
        self.box_head = nn.Linear(width, 4)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Word logits float[B, h, w, W] and boxes float[B, h, w, 4] in [0, 1] of the image."""
        features = self.image_encoder(images, sizes).permute(0, 2, 3, 1)
        return self.word_head(features), self.box_head(features)


class ClipPasses(nn.Module):
    """CLIP's coarse or fine pass as an image branch: one of them at random in training."""

    def __init__(self, clip: FusedClip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8[B, 3, S, S] and int64[B, 2], which CLIP does not look at -> float[B, C, h, w]."""
        side = images.shape[-1]
        pixels = normalise(images, None, PIXEL_MEAN, PIXEL_STD, (side, side))
        if self.training and torch.rand(()) < FINE_SHARE:
            return self.clip.fine(pixels)
        patch = self.clip.vit.config.patch_size
        return self.clip.coarse(pixels).mT.unflatten(2, (side // patch, -1))


def build_namer(config: Eva02Pretraining | ClipPretraining, num_words: int) -> PatchNamer:
    """The encoder that the stage is for, under its heads."""
    if isinstance(config, ClipPretraining):
        encoder = ClipPasses(build_clip(config.clip, pretrained=False))
        return PatchNamer(encoder, config.clip.width, num_words)
    branch = build_eva02_branch(config.eva02, config.frame)
    return PatchNamer(branch, config.eva02.width, num_words)


def patch_labels(batch: InstanceBatch, side: int) -> tuple[Tensor, Tensor]:
    """The object of every patch of a side x side grid.

    Returns:
        int64[B, side, side], index of the object; bool, same shape, whether there is one.
    """
    masks = (batch.masks & batch.valid[..., None, None]).float()
    coverage = F.adaptive_avg_pool2d(masks, side)  # (B, K, side, side)
    best, index = coverage.max(dim=1)
    return index, best > COVERAGE


def build_stage(
    config: Eva02Pretraining | ClipPretraining,
    tables: list[Table],
    val: list[Table],
    device: torch.device,
) -> Stage:
    """The pieces of this stage for the training loop."""
    words = words_of_regions([*tables, *val])
    model = build_namer(config, len(words)).to(device)
    facts = {"frame": config.frame, "objects_per_image": None}
    facts["batch_size"] = config.train.batch_size // config.train.accumulate
    seed, num = config.train.seed, config.train.steps * config.train.accumulate
    batches = Instances(tables, words, num_steps=num, seed=seed, **facts)
    val_batches = Instances(val, words, num_steps=config.train.eval_batches, seed=seed, **facts)

    def predict(batch: InstanceBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Word logits, words, boxes and true boxes at the P patches that lie on an object."""
        logits, boxes = model(batch.images, batch.sizes)
        index, is_object = patch_labels(batch, logits.shape[1])
        image = torch.arange(len(batch), device=index.device)[:, None, None].expand_as(index)
        image, index = image[is_object], index[is_object]
        return (
            logits[is_object],
            batch.words[image, index],
            boxes[is_object],
            batch.boxes[image, index],
        )

    def loss(batch: InstanceBatch) -> dict[str, Tensor]:
        logits, names, boxes, true_boxes = predict(batch)
        targets = names / names.sum(-1, keepdim=True)
        count = max(len(logits), 1)  # a batch whose objects are all small has no patch
        words = F.cross_entropy(logits.float(), targets, reduction="sum")
        box = F.l1_loss(boxes.float(), true_boxes, reduction="sum") / 4
        return {"words": words / count, "box": config.box_weight * box / count}

    def validate() -> dict[str, float]:
        wrong, distances = [], []
        for number in range(len(val_batches)):
            logits, names, boxes, true_boxes = predict(val_batches[number].to(device))
            # A name of n words is right when its words are the n most likely ones.
            order = logits.argsort(-1, descending=True).argsort(-1)
            right = ((order < names.sum(-1, keepdim=True)) == names.bool()).all(-1)
            wrong.append(1 - right.float())
            distances.append((boxes - true_boxes).abs().mean(-1))
        return {
            "wrong_names": float(torch.cat(wrong).mean()),
            "box_l1": float(torch.cat(distances).mean()),
        }

    def export(folder: Path) -> None:
        save_config(config, folder)
        save_weights(model.image_encoder, folder)

    return Stage(model, batches, loss, validate, export)


def load_eva02_run(folder: Path | str) -> tuple[Eva02Pretraining, nn.Module]:
    """The trained image branch."""
    config = load_config(Eva02Pretraining, folder)
    branch = build_eva02_branch(config.eva02, config.frame)
    load_weights(branch, folder)
    return config, branch.eval()


def load_clip_run(folder: Path | str) -> tuple[ClipPretraining, FusedClip]:
    """The trained CLIP."""
    config = load_config(ClipPretraining, folder)
    passes = ClipPasses(build_clip(config.clip, pretrained=False))
    load_weights(passes, folder)
    return config, passes.clip.eval()
