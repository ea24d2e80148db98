"""The whole model against the official one at tiny size (golden `pixel_llm_trace*`)."""

from __future__ import annotations

from dataclasses import replace

import flax_language
import flax_weights
import pytest
import torch
from conftest import GoldenCase, golden_names, load_golden
from torch import nn

from pixelllm.config import SamConfig
from pixelllm.losses import point_loss, text_loss
from pixelllm.models.build import build_sam_branch
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
    q = h["point_predictor_args"]
    points = PointHead(
        language.width,
        q["hidden_dim"],
        q["depth"],
        q["num_output_points"],
        pre_norm=q["pre_norm"],
        activation={"gelu": nn.GELU, "relu": nn.ReLU}[q["mlp_activation"]],
    )
    points.load_state_dict(
        flax_language.point_head_state(flax_weights.part(weights, "point_predictor"))
    )
    names = [f"{name}_pixel_{kind}" for name in ("git", "sam") for kind in ("mean", "std")]
    means = [case.hparams[name] for name in names]
    return PixelLLMNetwork(
        eva02=ImageBranch(eva, means[0], means[1], eva_size),
        sam=ImageBranch(sam, means[2], means[3], sam_size),
        prompt_encoder=prompts,
        extractor=extractor,
        projection=nn.Identity(),  # the official BERT-size trunk projects visual tokens itself
        language=language,
        point_head=points,
        # The release encodes boxes relative to the input size of the branch with the larger map.
        prompt_frame=max(
            (eva_size // eva_args["patch_size"], eva_size),
            (sam_size // sam_args["patch_size"], sam_size),
        )[1],
    ).eval()


class Inputs:
    """The case's batch in our conventions."""

    def __init__(self, case: GoldenCase) -> None:
        self.images = case.tensor("in.images").permute(0, 3, 1, 2)
        mask = case.tensor("in.padding_mask") > 0
        self.sizes = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1)
        height, width = self.sizes.float().unbind(1)
        self.scale = torch.stack([width, height, width, height], dim=1)  # (B, 4)
        self.boxes = case.tensor("in.label.prompt_boxes") / self.scale[:, None]
        ids = case.tensor("in.label.text_tokens").long().flatten(0, 1)
        context = case.tensor("in.label.context_tokens").long().flatten(0, 1)
        self.text = Text(context, context == 0, ids, ids == 0)

    def points_px(self, points: torch.Tensor) -> torch.Tensor:
        """Points of R rows in pixels, with the axes of the official output."""
        B = len(self.sizes)
        return points.unflatten(0, (B, -1)) * self.scale[:, None, None, None, :2]


@pytest.mark.parametrize("name", golden_names("pixel_llm_trace"))
def test_golden_whole_model_predicts_the_official_points(name: str) -> None:
    """Catches any mistake in wiring, preprocessing, prompt scale or coordinate convention."""
    case = load_golden(name)
    model, inputs = official_model(case), Inputs(case)
    with torch.no_grad():
        features = model.encode(inputs.images, inputs.sizes, {})
        prefix = model.prefix(features, inputs.sizes, inputs.boxes)
        prediction = model(inputs.images, inputs.sizes, inputs.boxes, inputs.text)
    expected = case.tensor("out.forward_eval_with_text.visual_features")
    torch.testing.assert_close(prefix, expected, **case.tolerance)
    expected = case.tensor("out.forward_eval_with_text.point_coords")
    torch.testing.assert_close(inputs.points_px(prediction.points), expected, **case.tolerance)


@pytest.mark.parametrize("name", golden_names("pixel_llm_trace"))
def test_golden_whole_model_has_the_official_training_losses(name: str) -> None:
    """Catches shifted targets, wrong masks and a point loss in the wrong unit."""
    case = load_golden(name)
    model, inputs = official_model(case), Inputs(case)
    h = case.hparams["model"]
    with torch.no_grad():
        prediction = model(inputs.images, inputs.sizes, inputs.boxes, inputs.text)
    ids = inputs.text.token_ids
    rows = case.tensor("in.label.labels").flatten() > 0
    B = len(inputs.sizes)
    text = text_loss(prediction.logits, ids, rows, 0, h["end_token_id"], smoothing=0.1)
    words = (ids > 0) & (ids != h["begin_token_id"]) & (ids != h["end_token_id"])
    valid = (words & rows[:, None]).unflatten(0, (B, -1))
    targets = case.tensor("in.label.points")
    points = point_loss(inputs.points_px(prediction.points), targets, valid, h["point_loss_type"])
    torch.testing.assert_close(text, case.tensor("out.train.text_loss"), **case.tolerance)
    torch.testing.assert_close(points, case.tensor("out.train.point_loss"), **case.tolerance)
    total = text + h["point_loss_weight"] * points
    torch.testing.assert_close(total, case.tensor("out.train.total_loss"), **case.tolerance)


@pytest.mark.parametrize("rule", ["beam4", "greedy"])
@pytest.mark.parametrize("name", golden_names("pixel_llm_trace"))
def test_golden_whole_model_writes_the_official_captions(name: str, rule: str) -> None:
    """Catches decoding that departs from the release, and points that are not of those words."""
    case = load_golden(name)
    model, inputs = official_model(case), Inputs(case)
    expected = case.tensor(f"out.infer_{rule}.text_tokens").long().flatten(0, 1)
    num_beams = case.hparams["model"]["decode_beam_size"] if rule == "beam4" else 1
    with torch.no_grad():
        features = model.encode(inputs.images, inputs.sizes, {})
        prefix = model.prefix(features, inputs.sizes, inputs.boxes).flatten(0, 1)
        found = model.language.generate_official(
            prefix, *inputs.text[:2], max_new_tokens=expected.shape[1] - 2, num_beams=num_beams
        )
        points = inputs.points_px(model.point_head(found.hidden))
    T = found.token_ids.shape[1]
    end = case.hparams["model"]["end_token_id"]
    ours = torch.where(found.padding, end, found.token_ids)
    torch.testing.assert_close(ours, expected[:, :T], rtol=0, atol=0)
    valid = case.tensor(f"out.infer_{rule}.point_valid_mask")[:, :, :T]
    official = case.tensor(f"out.infer_{rule}.point_coords")[:, :, :T]
    torch.testing.assert_close(points[valid], official[valid], **case.tolerance)


def test_a_bfloat16_sam_gives_nearly_the_same_float32_features() -> None:
    """Catches pixels in another dtype than the frozen weights, and low precision leaking out."""
    config = SamConfig(64, 16, 32, 2, 2, 16, window_size=2, global_blocks=(1,))
    torch.manual_seed(0)
    full = build_sam_branch(config, 64)
    half = build_sam_branch(replace(config, bfloat16=True), 64)
    half.load_state_dict(full.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64], [40, 64]])
    with torch.no_grad():
        expected, found = full(images, sizes), half(images, sizes)
    assert found.dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
