"""The main stage: PixelLLM learns words and their points from a mixture of sources."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pixelllm.batches import Batch, TextLimits
from pixelllm.checkpoints import CONFIG_FILE, find_file, write_text
from pixelllm.config import Config, Eva02Config, Source
from pixelllm.feature_cache import FeatureCache
from pixelllm.loading import is_referenced
from pixelllm.mixture import Mixture
from pixelllm.models.prompt import init_from_sam
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import PerceptionConfig
from pixelllm.pretrained import PUBLISHED, PixelLLM
from pixelllm.shards import ShardedTable
from pixelllm.sources import SourceRecords
from pixelllm.streams import StreamedRecords
from pixelllm.tables import Table
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.loop import Stage
from pixelllm.training.naming import load_eva02_run
from pixelllm.training.objectives import weighted_losses
from pixelllm.training.optimizer import freeze
from pixelllm.training.promptable import check_same, load_sam_run
from pixelllm.training.recompute import recompute_blocks
from pixelllm.weights import pretrained_source

BASELINE_FILE = "training_captions.json"


def build_stage(
    config: Config,
    tables: list[Table | ShardedTable],
    val: list[Table | ShardedTable],
    device: torch.device,
    cache_folder: Path | None = None,
) -> Stage:
    """The pieces of this stage for the training loop.

    Args:
        cache_folder: keep the features of frozen encoders there.
    """
    tokenizer = build_tokenizer(config, tables)
    language = replace(config.model.language, vocab_size=len(tokenizer))
    if config.model.language.trunk is None:
        config = replace(config, model=replace(config.model, language=language))
    model = build_model(config, tokenizer).to(device)
    freeze(model, config.train.frozen)
    if config.train.recompute:
        recompute_blocks(model)
    cache = None
    if cache_folder is not None:
        cache = build_cache(config, model, [*tables, *val], cache_folder, device)
    train = config.train
    facts = {
        "tokenizer": tokenizer,
        "limits": text_limits(config, model),
        "frame": config.model.frame,
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "seed": train.seed,
        "cache": cache,
        "with_images": cache is None or not (model.sam.is_frozen and model.eva02.is_frozen),
    }
    batches = Mixture(tables, config.sources, num_steps=train.steps, **facts)
    val_batches = [
        Mixture(val, [source], num_steps=train.eval_batches, **facts)
        for source in scored_sources(config.sources, val)
    ]

    def loss(batch: Batch) -> dict[str, Tensor]:
        return weighted_losses(model, batch, config.loss)

    def validate() -> dict[str, float]:
        scores: dict[str, float] = {}
        for mixture in val_batches:
            terms = [loss(mixture[i].to(device)) for i in range(len(mixture))]
            task = "" if len(val_batches) == 1 else f"{mixture.sources[0].source.task}_"
            scores |= {task + k: float(torch.stack([t[k] for t in terms]).mean()) for k in terms[0]}
        return {"loss": sum(scores.values()), **scores}

    return Stage(model, batches, loss, validate, partial(export_run, model, batches))


def export_run(model: PixelLLM | PerceptionGPT, batches: Mixture, folder: Path) -> None:
    """Save a finished model, and captions of its training data for trivial baselines."""
    model.save_pretrained(folder)
    samples = {records.source.task: sample_captions(records) for records in batches.sources}
    write_text(folder / BASELINE_FILE, json.dumps(samples))


def build_cache(
    config: Config,
    model: PixelLLM,
    tables: list[Table | ShardedTable],
    folder: Path,
    device: torch.device,
) -> FeatureCache:
    """The features of frozen encoders on all images. Raises ValueError for streamed tables."""
    branches = {"sam": model.sam, "eva02": model.eva02}
    frozen = {name: branch for name, branch in branches.items() if branch.is_frozen}
    sizes = [replace(config.model.sam, weights=None), replace(config.model.eva02, weights=None)]
    cache = FeatureCache(folder, frozen, config.model.frame, sizes)
    for table in tables:
        if isinstance(table, ShardedTable):
            raise ValueError(f"--cache-features: {table.path} is streamed; leave it out")
        cache.fill(table, device)
    return cache


def scored_sources(sources: Sequence[Source], val: list[Table | ShardedTable]) -> list[Source]:
    """The last source of every task that the validation tables have phrases of.

    Sources that take their tables by name go before others; where no name fits, the tables of
    the task are all taken. Raises ValueError where there is none.
    """
    tasks = dict.fromkeys(source.task for source in sources)
    names_of = {task: [table.name for table in val if table.has_task(task)] for task in tasks}
    scored = {"window": (0.0, 1.0), "scale": None, "every_word": False}
    whole = [replace(source, **scored) for source in sources]
    named = [s for s in whole if any(fnmatch(name, s.tables) for name in names_of[s.task])]
    last = {s.task: replace(s, tables="*") for s in whole} | {s.task: s for s in named}
    found = [source for source in last.values() if names_of[source.task]]
    if not found:
        names = ", ".join(str(table.path) for table in val)
        raise ValueError(f"--val {names}: no phrases of the recipe's tasks ({', '.join(tasks)})")
    return found


def sample_captions(records: SourceRecords | StreamedRecords, count: int = 500) -> list[str]:
    """Captions of a source's random walk, for the trivial baseline of an evaluation."""
    task = records.source.task
    return [next(p.caption for p in r.phrases if p.task == task) for r in records.sample(count)]


def text_limits(config: Config, model: PixelLLM) -> TextLimits:
    return TextLimits(model.language.bos_id, config.max_tokens, config.max_context)


def build_tokenizer(
    config: Config | PerceptionConfig,
    tables: list[Table | ShardedTable],
    wordings: Iterable[str] = (),
) -> PreTrainedTokenizerFast:
    """That of the run to start from or of the trunk, else one trained on the tables' captions.

    Args:
        wordings: other text that one trained here gets to know.
    """
    if config.start.run is not None:  # its weights know no other
        find_file(config.start.run, CONFIG_FILE)
        return PreTrainedTokenizerFast.from_pretrained(config.start.run)
    name = config.model.language.trunk or config.model.language.tokenizer
    if name is not None:
        return load_tokenizer(name)
    contexts = [context for source in config.sources for context in source.contexts]
    return train_tokenizer(
        [*contexts, *wordings, *_captions(tables, 20_000)], config.model.language.vocab_size
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a trunk, see `pretrained_source`. Raises ValueError where there is none."""
    try:
        source, options = pretrained_source(name)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, struct.error) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.language: no tokenizer in {name}: {reason}") from error
    if tokenizer.eos_token is None:  # BERT's names for the same
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.pad_token is None:  # as the trunk does
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _captions(tables: list[Table | ShardedTable], limit: int) -> Iterable[str]:
    """Captions and contexts of the first `limit` records of every table."""
    for table in tables:
        for phrases in table.phrases(limit):
            yield from phrases.field("caption").to_pylist()
            yield from filter(None, phrases.field("context").to_pylist())


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> PixelLLM:
    """A PixelLLM that starts from what the recipe names."""
    start = config.start
    if start.run is not None:
        model = PixelLLM.from_pretrained(start.run, adapt=partial(with_settings_of, config))
        begun = model.config
        shared = replace(config.model, masks=model.config.model.masks)
        shared = replace(shared, detector=model.config.model.detector)
        check_same(shared, model.config.model, str(start.run))
        if model.mask_head is None:
            config = with_mask_decoder(config, model.config.model.sam.weights)
        reads_sam = model.mask_head is None and config.model.masks is not None
        model.grow(naming_what_is_held(config, begun, reads_sam), tokenizer)
    else:
        warn_of_random_sam(config)
        model = PixelLLM(config, tokenizer, published=PUBLISHED)
    model.config = without_published(model.config)
    if start.eyes is not None:
        start_from_eyes(model, start.eyes)
    if start.sam is not None:
        start_from_sam(model, start.sam, with_encoder=start.run is None)
    if start.eva02 is not None:
        eva02_config, branch = load_eva02_run(start.eva02)
        check_same(config.model.eva02, eva02_config.eva02, str(start.eva02))
        model.eva02.load_state_dict(branch.state_dict())
    return model


def with_settings_of(config: Config, started: Config) -> Config:
    """The run to start from with what the recipe says of precision and dropout."""
    ours, theirs = config.model, started.model
    held = {"bfloat16": ours.sam.bfloat16, "half_features": ours.sam.half_features}
    eva02 = replace(
        theirs.eva02,
        bfloat16=ours.eva02.bfloat16,
        half_features=ours.eva02.half_features,
        drop_path=ours.eva02.drop_path,
    )
    words = {name: getattr(ours.language, name) for name in ("bfloat16", "dropout", "lora_dropout")}
    sam, language = replace(theirs.sam, **held), replace(theirs.language, **words)
    return replace(started, model=replace(theirs, sam=sam, eva02=eva02, language=language))


def naming_what_is_held(config: Config, started: Config, reads_sam: bool) -> Config:
    """The recipe with those published weights that the run it starts from has as they are.

    A saved model names the source of frozen published weights instead of carrying them, so that
    a source must not be named for what the run has trained or never had.

    Args:
        reads_sam: SAM's file is read anew, for the mask decoder.
    """
    sam, eva02, theirs = config.model.sam, config.model.eva02, started.model
    if not reads_sam:
        has_sam = is_referenced("sam", started)
        sam = replace(sam, weights=theirs.sam.weights if has_sam else None)
    held = theirs.eva02 if is_referenced("eva02", started) else unpublished(theirs.eva02)
    eva02 = replace(eva02, weights=held.weights, structure=held.structure)
    model = replace(config.model, sam=sam, eva02=eva02)
    include_frozen = config.include_frozen or started.include_frozen
    return replace(config, model=model, include_frozen=include_frozen)


def without_published(config: Config) -> Config:
    """The recipe without the names of weights that others of `start` take the place of."""
    start, model = config.start, config.model
    if start.eyes or start.sam:
        model = replace(model, sam=replace(model.sam, weights=None))
    if start.eyes or start.eva02:
        model = replace(model, eva02=unpublished(model.eva02))
    return replace(config, model=model)


def unpublished(eva02: Eva02Config) -> Eva02Config:
    """Without the source of its weights, but with the structure that a timm name says."""
    name = eva02.weights
    is_timm = eva02.structure is None and name is not None and not Path(name).is_file()
    return replace(eva02, weights=None, structure=name if is_timm else eva02.structure)


def warn_of_random_sam(config: Config) -> None:
    """A SAM that nobody trained and that stays as it is sees nothing, and nothing else says so."""
    given = (config.start.eyes, config.start.sam, config.model.sam.weights)
    if "sam" in config.train.frozen and not any(given):
        print(
            f"warning: {config.name}: SAM is frozen and random; give --model.sam.weights "
            "sam_vit_h_4b8939.pth, or --start.sam a run of a small one",
            file=sys.stderr,
        )


def with_mask_decoder(config: Config, sam_weights: str | None) -> Config:
    """The recipe of a mask head that is new, its SAM by default the one that the run started from.

    Raises ValueError where SAM's mask decoder is frozen and nothing says where it comes from.
    """
    if config.model.masks is None or config.start.sam is not None:
        return config
    sam = replace(config.model.sam, weights=config.model.sam.weights or sam_weights)
    if sam.weights is None and {"mask_head", "mask_head.decoder"} & set(config.train.frozen):
        raise ValueError(
            f"{config.name}: SAM's mask decoder is frozen and would stay random; give "
            "--model.sam.weights sam_vit_h_4b8939.pth, or --start.sam a run of a small SAM"
        )
    return replace(config, model=replace(config.model, sam=sam))


def start_from_eyes(model: PixelLLM, folder: str) -> None:
    """Take over all that a trained model sees with; its words and points belong to its trunk."""
    trained = PixelLLM.from_pretrained(folder)
    ours, theirs = model.config.model, trained.config.model
    for part in ("sam", "eva02", "prompt"):
        check_same(getattr(ours, part), getattr(theirs, part), folder)
    for name in ("sam", "eva02", "prompt_encoder", "extractor"):
        getattr(model, name).load_state_dict(getattr(trained, name).state_dict())


def start_from_sam(model: PixelLLM, folder: str, with_encoder: bool) -> None:
    """Take over the parts of a trained small SAM; its mask decoder, where the model segments."""
    config, (sam_config, sam) = model.config.model, load_sam_run(folder)
    check_same(config.sam, sam_config.sam, folder)
    if model.mask_head is not None:
        model.mask_head.decoder.load_state_dict(sam.mask_decoder.state_dict())
    if not with_encoder:
        return
    model.sam.load_state_dict(sam.image_encoder.state_dict())
    model.prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
    if config.prompt.from_sam:
        first = config.eva02.width  # SAM's channels come after EVA02's
        channels = slice(first, first + config.sam.out_channels)
        parts = (model.extractor, sam.mask_decoder, sam.prompt_encoder)
        init_from_sam(*parts, channels, config.prompt.grid_side, config.prompt.eva02_share)
