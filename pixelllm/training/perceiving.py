"""PerceptionGPT's stage: it learns to answer, with boxes and masks, from a mixture of sources.

Reference of PerceptionGPT, sections 4 to 6. Differences: tasks are mixed by batch as PixelLLM's
are, and the phrases of an image share its visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pixelllm.batches import Prompted, TextLimits
from pixelllm.box_text import LOCATIONS, spell
from pixelllm.chats import PLAIN, Chat, ChatBatch, collate_chats, encode_chat, share_image
from pixelllm.config import Source
from pixelllm.conversations import converse
from pixelllm.markers import add_markers, marker_ids
from pixelllm.mixture import Mixture
from pixelllm.models.perceptiongpt import draw_by_mask
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import PUBLISHED, PerceptionConfig, PerceptionLoss, named_parts
from pixelllm.shards import ShardedTable
from pixelllm.sources import choose_phrases
from pixelllm.squares import square_image
from pixelllm.tables import Table
from pixelllm.templates import ANSWER
from pixelllm.training.captioning import build_tokenizer, export_run, scored_sources
from pixelllm.training.loop import Stage
from pixelllm.training.naming import load_clip_run
from pixelllm.training.optimizer import freeze
from pixelllm.training.promptable import check_same
from pixelllm.training.recompute import recompute_blocks
from pixelllm.views import open_record_image
from pixelllm.vis_losses import perception_losses


@dataclass(frozen=True)
class PerceptionBatch:
    """B images uint8[B, 3, S, S], padded to squares, with a chat each; all from one source."""

    images: Tensor
    chats: ChatBatch
    source: Source

    def __len__(self) -> int:
        return len(self.images)

    @property
    def ids(self) -> tuple[str, ...]:
        return self.chats.ids

    def to(self, device: torch.device) -> PerceptionBatch:
        return replace(self, images=self.images.to(device), chats=self.chats.to(device))


class ChatMixture(Mixture):
    """The walks of `Mixture` through its sources, as batches of conversations.

    Args:
        config: of the recipe, whose conversations these are.
        num_patches: visual tokens of an image.
        sources: instead of the recipe's.
        num_steps: optimizer steps in it.
    """

    def __init__(
        self,
        tables: list[Table | ShardedTable],
        tokenizer: PreTrainedTokenizerFast,
        config: PerceptionConfig,
        num_patches: int,
        *,
        sources: Sequence[Source],
        num_steps: int,
    ) -> None:
        train = config.train
        super().__init__(
            tables,
            sources,
            tokenizer,
            TextLimits(0, config.max_tokens, 0),
            frame=config.model.frame,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            num_steps=num_steps,
            seed=train.seed,
        )
        self.num_patches = num_patches
        self.vis = config.model.vis

    def __getitem__(self, step: int) -> PerceptionBatch:
        records = self.sources[self.picks[step]]
        rng = np.random.default_rng([self.seed, 1, step])
        drawn = records.batch(step, int(self.turns[step]))
        chosen = [choose_phrases(records.source, record, rng) for record in drawn]
        chats = [self._chat(item, records.source) for item in chosen]
        images = torch.stack(
            [square_image(open_record_image(record), self.frame) for record in drawn]
        )
        batch = collate_chats(chats, self.tokenizer, mask_side=self.vis.mask_size)
        return PerceptionBatch(images, batch, records.source)

    def _chat(self, item: Prompted, source: Source) -> Chat:
        max_tokens, facts = self.limits.max_tokens, (self.tokenizer, self.num_patches)
        talks = converse(item, source.mask_weight > 0, source.in_turn)
        spoken = [spell(talk, self.vis.form) for talk in talks]
        chats = [encode_chat(talk, *facts, max_tokens) for talk in spoken]
        return share_image(chats, marker_ids(self.tokenizer).image_end, max_tokens)


def build_stage(
    config: PerceptionConfig,
    tables: list[Table | ShardedTable],
    val: list[Table | ShardedTable],
    device: torch.device,
) -> Stage:
    """The pieces of this stage for the training loop."""
    tokenizer = build_chat_tokenizer(config, tables)
    if config.model.language.trunk is None:
        language = replace(config.model.language, vocab_size=len(tokenizer))
        config = replace(config, model=replace(config.model, language=language))
    model = build_model(config, tokenizer).to(device)
    freeze(model, config.train.frozen)
    if config.train.recompute:
        recompute_blocks(model)
    facts = (tokenizer, config, model.clip.num_tokens(config.model.frame))
    train = config.train
    batches = ChatMixture(tables, *facts, sources=config.sources, num_steps=train.steps)
    scored = scored_sources(config.sources, val)
    val_batches = [
        ChatMixture(val, *facts, sources=(source,), num_steps=train.eval_batches)
        for source in scored
    ]

    def loss(batch: PerceptionBatch) -> dict[str, Tensor]:
        tokens, objects = batch.chats.tokens, batch.chats.objects
        by_mask = draw_by_mask(config.model.vis.read, objects.has_mask)
        objects = objects._replace(by_mask=by_mask)
        as_released = (config.loss.centre_reading, config.loss.whole_batch_dice)
        prediction = model(batch.images, tokens, objects)
        terms = perception_losses(prediction, tokens, objects, *as_released)
        return weighted(terms, config.loss, batch.source)

    def validate() -> dict[str, float]:
        scores: dict[str, float] = {}
        for source, mixture in zip(scored, val_batches, strict=True):
            terms = [loss(mixture[i].to(device)) for i in range(len(mixture))]
            means = {k: float(torch.stack([t[k] for t in terms]).mean()) for k in terms[0]}
            scores |= {f"{source.task}_{name}": mean for name, mean in means.items() if mean}
        return {"loss": sum(scores.values()), **scores}

    return Stage(model, batches, loss, validate, partial(export_run, model, batches))


def weighted(terms: dict[str, Tensor], loss: PerceptionLoss, source: Source) -> dict[str, Tensor]:
    """The terms of `perception_losses` that the source takes part in, times their weights."""
    weights = {
        "text": loss.text * source.text_weight,
        "l1": loss.l1 * source.point_weight,
        "giou": loss.giou * source.point_weight,
        "bce": loss.bce * source.mask_weight,
        "dice": loss.dice * source.mask_weight,
    }
    return {name: weights[name] * term for name, term in terms.items() if weights[name]}


def build_chat_tokenizer(
    config: PerceptionConfig, tables: list[Table | ShardedTable]
) -> PreTrainedTokenizerFast:
    """As `build_tokenizer`, with the markers; one trained here has a plain chat template.

    It knows the words of the template and of questions as a whole, not letter by letter.
    """
    contexts = {context for source in config.sources for context in source.contexts}
    wordings = [f"USER: {context} ASSISTANT: {ANSWER}" for context in sorted(contexts)]
    tokenizer = build_tokenizer(config, tables, wordings * 2)  # once is too rare
    if config.start.run is None:
        language = config.model.language
        if language.trunk is None and language.tokenizer is None:
            tokenizer.chat_template = PLAIN
        if config.model.vis.form == "tokens":
            tokenizer.add_tokens(list(LOCATIONS), special_tokens=True)
        add_markers(tokenizer)  # last: the trunk has embeddings up to them
    return tokenizer


def build_model(config: PerceptionConfig, tokenizer: PreTrainedTokenizerFast) -> PerceptionGPT:
    """A PerceptionGPT that starts from what the recipe names."""
    start = config.start
    if start.run is not None:
        model = PerceptionGPT.from_pretrained(start.run)
        check_same(config.model, model.config.model, start.run)
        is_published = "clip" in named_parts(model.config)
        clip = model.config.model.clip.weights if is_published else None
        model.config = naming_clip(config, clip)
        return model
    model = PerceptionGPT(config, tokenizer, published=PUBLISHED)
    if start.clip is not None:
        trained, eyes = load_clip_run(start.clip)
        check_same(config.model.clip, trained.clip, start.clip)
        model.clip.load_state_dict(eyes.state_dict())
        model.config = naming_clip(config, None)
    return model


def naming_clip(config: PerceptionConfig, weights: str | None) -> PerceptionConfig:
    """The recipe with the published CLIP that the model has; None where it was trained further."""
    clip = replace(config.model.clip, weights=weights)
    return replace(config, model=replace(config.model, clip=clip))
