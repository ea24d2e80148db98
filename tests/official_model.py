"""Whole models of the golden cases: ours with their weights, and their batches."""

from __future__ import annotations

import flax_language
import flax_weights
import torch
from conftest import GoldenCase
from torch import nn

from pixelllm.models.eva02 import eva02
from pixelllm.models.pixelllm import ImageBranch, PixelLLMNetwork, Text
from pixelllm.models.points import PointHead
from pixelllm.models.prompt import PromptFeatureExtractor
from pixelllm.models.sam import PromptEncoder, SamEncoder


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
    eva.load_state_dict(flax_weights.eva02_encoder(flax_weights.part(weights, "git_backbone")))
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
    sam.load_state_dict(flax_weights.sam_encoder(flax_weights.part(weights, "sam_backbone")))
    p = h["prompt_encoder_args"]
    prompts = PromptEncoder(
        p["embed_dim"], tuple(p["image_embedding_size"]), tuple(p["input_image_size"])
    )
    tree = flax_weights.part(weights, "prompt_encoder")
    prompts.load_state_dict(flax_weights.prompt_encoder(tree, prompts.state_dict()))
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
    tree = flax_weights.part(weights, "prompt_adapter")
    extractor.load_state_dict(flax_weights.prompt_extractor(tree))
    names = {"begin_token_id", "end_token_id"}
    decoder = {**h["text_decoder_args"], **{n: h[n] for n in names}}
    language = flax_language.git_decoder(flax_weights.part(weights, "textual"), decoder)
    names = [f"{name}_pixel_{kind}" for name in ("git", "sam") for kind in ("mean", "std")]
    means = [case.hparams[name] for name in names]
    return PixelLLMNetwork(
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
    ).eval()


def point_head(case: GoldenCase, width: int) -> nn.Module:
    """Nothing where the case predicts no points."""
    q = case.hparams["model"]["point_predictor_args"]
    weights = flax_weights.part(case.weights(), "point_predictor")
    if not weights:
        return nn.Identity()
    head = PointHead(
        width,
        q["hidden_dim"],
        q["depth"],
        q["num_output_points"],
        pre_norm=q["pre_norm"],
        activation={"gelu": nn.GELU, "relu": nn.ReLU}[q["mlp_activation"]],
    )
    head.load_state_dict(flax_language.point_head_state(weights))
    return head


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


def mask_adapter_state(weights: flax_weights.Weights) -> flax_weights.StateDict:
    names = (
        ("output_tokens.weight", "output_tokens"),
        ("alpha_output.weight", "alpha"),
        ("visual_projection_mlp.", "prefix_projection."),
        ("textual_projection_mlp.", "hidden_projection."),
        ("projection.LayerNorm_0", "projection.0"),
        ("projection.layers.0", "projection.1"),
    )
    state = {}
    for key, value in flax_weights.plain(weights).items():
        for flax, torch_name in names:
            key = key.replace(flax, torch_name)
        state[key] = value
    return state
