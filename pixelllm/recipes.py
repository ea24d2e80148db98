"""The named configurations: functions that change a base by a few lines."""

from __future__ import annotations

from collections.abc import Callable

from pixelllm import paper_recipes as paper
from pixelllm import perception_recipes as perception
from pixelllm import scene_recipes as scenes
from pixelllm.config import Config, Eva02Pretraining, SamPretraining
from pixelllm.perception_config import ClipPretraining, PerceptionConfig

Recipe = Config | SamPretraining | Eva02Pretraining | PerceptionConfig | ClipPretraining
MAKERS: tuple[Callable[[], Recipe], ...] = (
    scenes.scenes_sam,
    scenes.scenes_eva02,
    scenes.scenes_tiny,
    scenes.scenes_small,
    scenes.scenes_smollm2,
    scenes.scenes_ref,
    scenes.scenes_refseg,
    scenes.scenes_densecap,
    scenes.scenes_joint,
    scenes.scenes_joint_refseg,
    scenes.scenes_joint_long,
    scenes.scenes_joint_long_refseg,
    paper.ln_coco_t5xl,
    paper.ref_t5xl,
    paper.refseg_t5xl,
    paper.densecap_t5xl,
    paper.joint_t5xl,
    paper.joint_refseg_t5xl,
    paper.ln_coco_bert,
    paper.ref_bert,
    paper.refseg_bert,
    paper.densecap_bert,
    paper.joint_bert,
    paper.joint_refseg_bert,
    perception.scenes_clip,
    perception.scenes_perceptiongpt,
    perception.perceptiongpt_smollm2,
    perception.perceptiongpt_7b,
    perception.scenes_perceptiongpt_all,
    perception.perceptiongpt_7b_all,
)
RECIPES = {maker.__name__.replace("_", "-"): maker for maker in MAKERS}
