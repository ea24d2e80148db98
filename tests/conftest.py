"""Fixtures shared by the whole suite: the golden numbers and one obvious home for "small"."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.coco
import data.localized_narratives
import data.refcoco
import data.visual_genome
import train
from data.scene_worlds import World
from data.scenes import Options, write_scenes
from pixelllm.config import (
    Config,
    DetectorConfig,
    Eva02Config,
    Eva02Pretraining,
    LanguageConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    PointConfig,
    PromptConfig,
    SamConfig,
    SamPretraining,
    Source,
    StartConfig,
    TrainConfig,
)
from pixelllm.contexts import REFERRING_CONTEXT, REGION_CONTEXT
from pixelllm.pretrained import PixelLLM

torch.set_num_threads(1)  # on tiny models, threads wait for each other more than they work

GOLDEN = Path(os.environ.get("PIXELLLM_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@dataclass(frozen=True)
class GoldenCase:
    """One case of the official implementation: its index entry, inputs, weights and outputs."""

    name: str
    index: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def hparams(self) -> dict[str, Any]:
        return self.index["hparams"]

    @property
    def tolerance(self) -> dict[str, float]:
        return self.index["tolerance"]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[key]))

    def weights(self) -> dict[str, np.ndarray]:
        """The Flax parameters without their `w.` prefix."""
        return {key[2:]: value for key, value in self.arrays.items() if key.startswith("w.")}


def golden_root() -> Path:
    if not GOLDEN.exists():
        pytest.skip(f"no golden numbers at {GOLDEN}; set PIXELLLM_GOLDEN to their folder")
    return GOLDEN


def golden_names(prefix: str) -> list[str]:
    """Names of the array cases that begin with `prefix`; one placeholder where there are none."""
    index = GOLDEN / "index.json"
    if not index.exists():
        return ["absent"]
    return [name for name in json.loads(index.read_text())["cases"] if name.startswith(prefix)]


def load_golden(name: str) -> GoldenCase:
    """An array case (.npz) by name; skips the test where the folder is absent."""
    root = golden_root()
    index = json.loads((root / "index.json").read_text())["cases"][name]
    with np.load(root / index["file"]) as archive:
        return GoldenCase(name, index, {key: archive[key] for key in archive.files})


def load_golden_json(relative: str) -> Any:
    """A JSON case by its path below the golden folder; skips where the folder is absent."""
    return json.loads((golden_root() / relative).read_text())


PERCEPTION_GOLDEN = GOLDEN.with_name(f"{GOLDEN.name}_perceptiongpt")
PERCEPTION_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def perception_names(prefix: str) -> list[str]:
    """Names of PerceptionGPT's cases that begin with `prefix`; one placeholder without any."""
    return sorted(file.stem for file in PERCEPTION_GOLDEN.glob(f"{prefix}*.npz")) or ["absent"]


def load_perception(name: str) -> dict[str, torch.Tensor]:
    """A case of the official PerceptionGPT by array name; skips where the folder is absent."""
    file = PERCEPTION_GOLDEN / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"no golden numbers at {file}; they lie beside PIXELLLM_GOLDEN")
    with np.load(file) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def part_of(case: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The arrays whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


TINY_SAM = SamConfig(
    table_size=48,
    width=16,
    depth=2,
    num_heads=2,
    out_channels=16,
    window_size=2,
    global_blocks=(1,),
    conv_stem=True,
    half_features=True,
)
TINY_EVA02 = Eva02Config(
    table_size=48,
    patch_size=16,
    width=32,
    depth=1,
    num_heads=2,
    drop_path=0.0,
    conv_stem=True,
    half_features=True,
)


def short_training(steps: int = 4, **changes: Any) -> TrainConfig:
    """A few steps with everything switched on that a long run has."""
    facts = {
        "batch_size": 4,
        "lr": 3e-3,
        "warmup": 1,
        "weight_decay": 0.01,
        "clip": 1.0,
        "frozen": (),
        "threads": 1,
        "log_every": 1,
        "eval_every": 2,
        "eval_batches": 1,
        "save_every": 2,
    }
    return TrainConfig(steps=steps, **{**facts, **changes})


def make_tiny_config(**changes: Any) -> Config:
    """The one obvious home for "small": a complete PixelLLM that runs in milliseconds."""
    config = Config(
        name="tiny",
        model=ModelConfig(
            frame=48,
            sam=TINY_SAM,
            eva02=TINY_EVA02,
            prompt=PromptConfig(
                width=16,
                num_layers=1,
                mlp_width=32,
                num_heads=8,
                num_tokens=4,
                output_width=32,
                value_position=True,
                box_octaves=3,
            ),
            language=LanguageConfig(
                trunk=None,
                lora_rank=0,
                width=32,
                num_encoder_layers=1,
                num_decoder_layers=2,
                num_heads=2,
                ff_width=48,
                dropout=0.0,
                vocab_size=300,
            ),
            points=PointConfig(hidden=32, depth=2),
        ),
        sources=(Source("narration"),),
        loss=LossConfig(point=5.0, smoothing=0.0),
        train=short_training(frozen=("sam", "eva02", "prompt_encoder")),
        max_tokens=48,
        max_context=8,
        include_frozen=True,
    )
    return replace(config, **changes)


# Its 32 norm groups need two values each where one image has a level of one cell.
TINY_DETECTOR = DetectorConfig(
    width=64, tower_layers=1, roi_width=16, up_channels=16, num_sampled=16
)
TINY_MASKS = MaskConfig(num_layers=1, num_heads=8, mlp_width=32)  # as the tiny SAM's decoder
JOINT_SOURCES = (
    Source("narration"),
    Source(
        "region",
        weight=2,
        contexts=(REGION_CONTEXT,),
        phrases_per_image=8,
        point_weight=0.0,
        detection_weight=1.0,
        proposals_per_image=4,
    ),
    Source(
        "referring",
        contexts=(REFERRING_CONTEXT,),
        phrases_per_image=3,
        text_weight=0.0,
        mask_weight=1.0,
    ),
)


def make_tiny_joint_config(**changes: Any) -> Config:
    """The tiny PixelLLM with all it can have: it narrates, finds, captions, locates, segments."""
    config = make_tiny_config()
    joint = replace(
        config,
        name="tiny-joint",
        model=replace(config.model, masks=TINY_MASKS, detector=TINY_DETECTOR),
        sources=JOINT_SOURCES,
        train=short_training(
            24, eval_every=12, save_every=12, frozen=(*config.train.frozen, "mask_head.decoder")
        ),
        max_context=32,
    )
    return replace(joint, **changes)


@pytest.fixture
def tiny_config() -> Config:
    return make_tiny_config()


@pytest.fixture(scope="session")
def tiny_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 48 x 64 pixels as the published corpora would write them."""
    out = tmp_path_factory.mktemp("data") / "scenes"
    world = World(image_size=(48, 64), min_size=0.3, max_size=0.5)
    write_scenes(Options(out, train=12, val=6, seed=5, world=world, num_proc=1))
    return out


@dataclass(frozen=True)
class Tables:
    """Folders of tables that the readers made from `tiny_scenes`.

    `regions` are COCO's objects under their class names, `described` Visual Genome's phrases.
    """

    train: Path
    val: Path
    train_regions: Path
    val_regions: Path
    train_described: Path
    val_described: Path
    train_referring: Path
    val_referring: Path
    truth: Path


@pytest.fixture(scope="session")
def tiny_tables(tiny_scenes: Path) -> Tables:
    annotations, out = tiny_scenes / "annotations", tiny_scenes.parent
    for split in ("train", "val"):
        data.localized_narratives.convert(
            [annotations / f"scenes_{split}_localized_narratives.jsonl"],
            data.localized_narratives.Options(tiny_scenes, "text"),
            out / split,
        )
        data.coco.convert(
            [annotations / f"instances_{split}.json", annotations / f"captions_{split}.json"],
            tiny_scenes / split,
            out / f"{split}_regions",
        )
        data.visual_genome.convert(
            [annotations / "visual_genome" / f"{split}.json"],
            data.visual_genome.Options(tiny_scenes / split),
            out / f"{split}_described",
        )
        data.refcoco.convert(
            [annotations / "refer" / "refs(unc).p", annotations / "refer" / "instances.json"],
            data.refcoco.Options(tiny_scenes / split, split),
            out / f"{split}_referring",
        )
    kinds = ("", "_regions", "_described", "_referring")
    tables = (out / f"{split}{kind}" for kind in kinds for split in ("train", "val"))
    return Tables(*tables, annotations / "scenes_val_truth.jsonl")


def run_stage(
    config: train.Recipe,
    tables: Sequence[Path],
    val: Path | Sequence[Path],
    out: Path,
    **options: Any,
) -> Path:
    """Train as `train.py` does, without its command line; returns the run's folder."""
    val = (val,) if isinstance(val, Path) else tuple(val)
    run = train.Run(tuple(tables), val, out, device="cpu", **options)
    train.run_training(run, config)
    return out


@dataclass(frozen=True)
class TinyRun:
    """Folders of three finished runs, each made from the ones before."""

    sam: Path
    eva02: Path
    main: Path


@pytest.fixture(scope="session")
def tiny_run(tiny_tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """All stages of the quickstart in a few steps each."""
    out = tmp_path_factory.mktemp("runs")
    regions = ([tiny_tables.train_regions], tiny_tables.val_regions)
    sam = SamPretraining(
        "tiny-sam", 48, TINY_SAM, num_layers=1, mlp_width=32, train=short_training()
    )
    run_stage(sam, *regions, out / "sam")
    eva02 = Eva02Pretraining("tiny-eva02", 48, TINY_EVA02, train=short_training())
    run_stage(eva02, *regions, out / "eva02")
    start = StartConfig(sam=str(out / "sam"), eva02=str(out / "eva02"))
    config = make_tiny_config(start=start)
    config = replace(
        config,
        model=replace(config.model, prompt=replace(config.model.prompt, from_sam=True)),
        train=replace(config.train, steps=30),
    )
    tables = [tiny_tables.train], tiny_tables.val
    run_stage(config, *tables, out / "main", cache_features=out / "features")
    return TinyRun(out / "sam", out / "eva02", out / "main")


@pytest.fixture(scope="session")
def tiny_model(tiny_run: TinyRun) -> PixelLLM:
    """The trained tiny model in evaluation mode; do not change it."""
    return PixelLLM.from_pretrained(tiny_run.main)


@pytest.fixture(scope="session")
def tiny_joint(tiny_tables: Tables, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory):
    """Folder of a run of all tasks, with mask head and detector, from the tiny run."""
    out = tmp_path_factory.mktemp("joint") / "run"
    start = StartConfig(run=str(tiny_run.main), sam=str(tiny_run.sam))
    return run_stage(make_tiny_joint_config(start=start), *joint_tables(tiny_tables), out)


def joint_tables(tables: Tables) -> tuple[list[Path], list[Path]]:
    """The tables of `make_tiny_joint_config` to train on and to validate on."""
    train_tables = [tables.train, tables.train_described, tables.train_referring]
    return train_tables, [tables.val, tables.val_described, tables.val_referring]


@pytest.fixture(scope="session")
def tiny_joint_model(tiny_joint: Path) -> PixelLLM:
    """The trained tiny model of all tasks in evaluation mode; do not change it."""
    return PixelLLM.from_pretrained(tiny_joint)
