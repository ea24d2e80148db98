"""Whole models of the golden cases: ours with their weights, and their batches."""

from __future__ import annotations

import flax_language
import torch
from conftest import GoldenCase
from flax_detector import detector
from torch import nn

from pixelllm.models.detector import Detector
from pixelllm.models.eva02 import eva02
from pixelllm.models.masks import MaskAdapter, MaskHead
from pixelllm.models.pixelllm import ImageBranch, PixelLLMNetwork, Text
from pixelllm.models.points import PointHead
from pixelllm.models.prompt import PromptFeatureExtractor
from pixelllm.models.sam import MaskDecoder, PromptEncoder, SamEncoder
from pixelllm.scenic import Tree, copy_state, model_state


def official_model(case: GoldenCase) -> PixelLLMNetwork:
    """Our model of the case's sizes with its weights."""
    h, weights = case.hparams["model"], case.weights()
    eva_args, sam_args = h["git_backbone_args"], h["sam_backbone_args"]
    eva_size = h["git_preprocess_args"]["image_size"][0]
    sam_size = h["sam_preprocess_args"]["image_size"][0]
    eva = eva02(
        image_size=eva_args["pretrain_img_size"],
        patch_size=eva_args["patch_size"],
        width=eva_args["embed_dim"],
        depth=eva_args["depth"],
        num_heads=eva_args["num_heads"],
        final_norm=eva_args["use_ln_post"],
    )
    windowed = set(sam_args["window_block_indexes"])
    sam = SamEncoder(
        image_size=sam_args["img_size"],
        patch_size=sam_args["patch_size"],
        width=sam_args["embed_dim"],
        depth=sam_args["depth"],
        num_heads=sam_args["num_heads"],
        out_channels=sam_args["out_chans"],
        window_size=sam_args["window_size"],
        global_blocks=[i for i in range(sam_args["depth"]) if i not in windowed],
    )
    p = h["prompt_encoder_args"]
    prompts = PromptEncoder(
        p["embed_dim"], tuple(p["image_embedding_size"]), tuple(p["input_image_size"])
    )
    a = h["prompt_adapter_args"]
    extractor = PromptFeatureExtractor(
        in_channels=eva_args["embed_dim"] + sam_args["out_chans"],
        prompt_width=a["input_embedding_dim"],
        width=a["transformer_dim"],
        depth=a["depth"],
        num_outputs=a["num_outputs"],
        output_width=a["output_dim"],
        mlp_width=case.hparams["two_way_transformer_mlp_dim"],
    )
    names = {"begin_token_id", "end_token_id"}
    decoder = {**h["text_decoder_args"], **{n: h[n] for n in names}}
    language = flax_language.git_decoder(part(weights, "textual"), decoder)
    names = [f"{name}_pixel_{kind}" for name in ("git", "sam") for kind in ("mean", "std")]
    means = [case.hparams[name] for name in names]
    model = PixelLLMNetwork(
        eva02=ImageBranch(eva, means[0], means[1], eva_size),
        sam=ImageBranch(sam, means[2], means[3], sam_size),
        prompt_encoder=prompts,
        extractor=extractor,
        projection=nn.Identity(),  # the official BERT-size trunk projects visual tokens itself
        language=language,
        point_head=point_head(case, language.width),
        # The release encodes boxes relative to the input size of the branch with the larger map.
        prompt_frame=max(
            (eva_size // eva_args["patch_size"], eva_size),
            (sam_size // sam_args["patch_size"], sam_size),
        )[1],
        mask_head=mask_head(case, language.width),
        detector=box_decoder(case),
    )
    copy_state(model, model_state(weights), case.name)
    return model.eval()


def part(weights: Tree, name: str) -> Tree:
    """The weights below one module of the tree."""
    below = f"{name}/"
    return {k.removeprefix(below): value for k, value in weights.items() if k.startswith(below)}


def point_head(case: GoldenCase, width: int) -> nn.Module:
    """Nothing where the case predicts no points."""
    q = case.hparams["model"]["point_predictor_args"]
    if not part(case.weights(), "point_predictor"):
        return nn.Identity()
    return PointHead(
        width,
        q["hidden_dim"],
        q["depth"],
        q["num_output_points"],
        pre_norm=q["pre_norm"],
        activation={"gelu": nn.GELU, "relu": nn.ReLU}[q["mlp_activation"]],
    )


def mask_head(case: GoldenCase, hidden_width: int) -> MaskHead | None:
    h = case.hparams["model"]
    if not part(case.weights(), "mask_adapter"):
        return None
    a, t = h["mask_adapter_args"], case.hparams["mask_decoder_transformer"]
    adapter = MaskAdapter(
        h["prompt_adapter_args"]["output_dim"],
        hidden_width,
        a["transformer_dim"],
        a["depth"],
        mlp_width=case.hparams["two_way_transformer_mlp_dim"],
        gated=a["gating"],
    )
    return MaskHead(adapter, MaskDecoder(t["embedding_dim"], t["depth"], mlp_width=t["mlp_dim"]))


def box_decoder(case: GoldenCase) -> Detector | None:
    weights, frame = part(case.weights(), "box_decoder"), case.arrays["in.images"].shape[1]
    return detector(weights, case.hparams["model"]["box_decoder_args"], frame) if weights else None


class Inputs:
    """The case's batch in our conventions."""

    def __init__(self, case: GoldenCase) -> None:
        self.images = case.tensor("in.images").permute(0, 3, 1, 2)
        mask = case.tensor("in.padding_mask") > 0
        self.sizes = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1)
        height, width = self.sizes.float().unbind(1)
        self.scale = torch.stack([width, height, width, height], dim=1)  # (B, 4)
        prompts = "prompt_boxes" if "in.label.prompt_boxes" in case.arrays else "boxes"
        self.boxes = case.tensor(f"in.label.{prompts}") / self.scale[:, None]
        ids = case.tensor("in.label.text_tokens").long().flatten(0, 1)
        context = case.tensor("in.label.context_tokens").long().flatten(0, 1)
        self.text = Text(context, context == 0, ids, ids == 0)

    def points_px(self, points: torch.Tensor) -> torch.Tensor:
        """Points of R rows in pixels, with the axes of the official output."""
        B = len(self.sizes)
        return points.unflatten(0, (B, -1)) * self.scale[:, None, None, None, :2]
