"""Stage `*-sam`: a small SAM learns promptable segmentation, SAM's own task, and is then frozen.

Kirillov et al., 2023, section 3: half of the prompts are boxes, half are points on the object;
focal and dice loss on the single-answer mask. The full-size model takes published weights.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixelllm.checkpoints import load_config, load_weights, save_config, save_weights
from pixelllm.config import SamPretraining
from pixelllm.losses import mask_iou, mask_loss
from pixelllm.models.build import build_sam_branch
from pixelllm.models.sam import MaskDecoder, PromptEncoder
from pixelllm.tables import Table
from pixelllm.training.instances import InstanceBatch, Instances, words_of_regions
from pixelllm.training.loop import Stage


class PromptableSam(nn.Module):
    """SAM: image encoder, prompt encoder and mask decoder."""

    def __init__(self, config: SamPretraining) -> None:
        super().__init__()
        width = config.sam.out_channels
        grid = config.frame // config.sam.patch_size
        self.image_encoder = build_sam_branch(config.sam, config.frame)
        self.prompt_encoder = PromptEncoder(width, (grid, grid), (config.frame, config.frame))
        self.mask_decoder = MaskDecoder(
            width, config.num_layers, config.num_heads, config.mlp_width
        )

    def forward(
        self, images: Tensor, sizes: Tensor, points_px: Tensor, boxes_px: Tensor, by_box: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Masks for B images with K prompts each.

        Args:
            images, sizes: as in `ImageBranch`.
            points_px: float32[B, K, 2]; boxes_px: float32[B, K, 4], both in pixels of the frame.
            by_box: bool[B, K], which of the two prompts counts.

        Returns:
            Logits float[B, K, 1, S / 4, S / 4] and predicted IoU float[B, K, 1].
        """
        features = self.image_encoder(images, sizes)
        tokens = torch.where(
            by_box[..., None, None],
            self.prompt_encoder._embed_boxes(boxes_px.flatten(0, 1)).unflatten(0, by_box.shape),
            self._point_tokens(points_px),
        )
        pe = self.prompt_encoder.dense_pe(*features.shape[-2:])
        masks, ious = self.mask_decoder(features, pe, tokens, self.prompt_encoder.no_mask)
        return masks[:, :, :1], ious[:, :, :1]

    def _point_tokens(self, points_px: Tensor) -> Tensor:
        """A foreground point and the padding point that SAM adds: float[B, K, 2, C]."""
        labels = torch.ones(points_px.shape[:2].numel(), 1, device=points_px.device)
        points = points_px.flatten(0, 1)[:, None]
        tokens = self.prompt_encoder._embed_points(points, labels, pad=True)
        return tokens.unflatten(0, points_px.shape[:2])


def sample_points_px(masks: Tensor, stride: int) -> Tensor:
    """A random pixel of every mask: bool[B, K, h, w] -> float32[B, K, 2] in frame pixels."""
    flat = masks.flatten(2).float() + 1e-9  # an empty mask still gives some point
    cells = torch.multinomial(flat.flatten(0, 1), 1).view(masks.shape[:2])
    width = masks.shape[-1]
    return (torch.stack([cells % width, cells // width], dim=-1) + 0.5) * stride


def build_stage(
    config: SamPretraining, tables: list[Table], val: list[Table], device: torch.device
) -> Stage:
    """The pieces of this stage for the training loop."""
    model = PromptableSam(config).to(device)
    words = words_of_regions([*tables, *val])
    facts = {"frame": config.frame, "objects_per_image": config.prompts_per_image}
    facts["batch_size"] = config.train.batch_size // config.train.accumulate
    seed, num = config.train.seed, config.train.steps * config.train.accumulate
    batches = Instances(tables, words, num_steps=num, seed=seed, **facts)
    val_batches = Instances(val, words, num_steps=config.train.eval_batches, seed=seed, **facts)

    def predict(batch: InstanceBatch, by_box: Tensor) -> tuple[Tensor, Tensor]:
        height, width = batch.sizes.float().unbind(-1)
        scale = torch.stack([width, height, width, height], dim=-1)[:, None]
        points_px = sample_points_px(batch.masks, config.frame // batch.masks.shape[-1])
        return model(batch.images, batch.sizes, points_px, batch.boxes * scale, by_box)

    def loss(batch: InstanceBatch) -> dict[str, Tensor]:
        by_box = torch.rand(batch.valid.shape, device=batch.valid.device) < 0.5
        masks, ious = predict(batch, by_box)
        padding = torch.zeros_like(batch.masks[:, 0])
        terms = mask_loss(masks, ious, batch.masks, batch.valid, padding)
        return {"focal": terms.focal, "dice": terms.dice, "iou": terms.iou}

    def validate() -> dict[str, float]:
        box, point = mean_iou(True), mean_iou(False)
        return {"error": 1 - (box + point) / 2, "iou_box": box, "iou_point": point}

    def mean_iou(by_box: bool) -> float:
        total = count = 0.0
        for index in range(len(val_batches)):
            batch = val_batches[index].to(device)
            masks, _ = predict(batch, torch.full_like(batch.valid, by_box))
            ious = mask_iou(masks[:, :, 0] > 0, batch.masks)
            total += float((ious * batch.valid).sum())
            count += float(batch.valid.sum())
        return total / max(count, 1)

    def export(folder: Path) -> None:
        save_config(config, folder)
        save_weights(model, folder)

    return Stage(model, batches, loss, validate, export)


def load_sam_run(folder: Path | str) -> tuple[SamPretraining, PromptableSam]:
    """A trained small SAM."""
    config = load_config(SamPretraining, folder)
    model = PromptableSam(config)
    load_weights(model, folder)
    return config, model.eval()


def check_same(ours: object, theirs: object, where: str) -> None:
    """Raise ValueError naming the sizes in which two configurations of a part differ."""
    ignored = {"weights", "bfloat16", "half_features", "drop_path", "dropout", "from_sam",
               "structure"}  # fmt: skip
    here = _leaves(asdict(ours))
    differences = [
        f"{name} is {value} there, {here[name]} here"
        for name, value in _leaves(asdict(theirs)).items()
        if name.split(".")[-1] not in ignored and here[name] != value
    ]
    if differences:
        raise ValueError(f"{where}: " + "; ".join(differences))


def _leaves(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in fields.items():
        nested = isinstance(value, dict)
        leaves |= _leaves(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return leaves
