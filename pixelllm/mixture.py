"""The training stream: batch `step` of a mixture of sources, as a function of seed and step.

Whole batches come from one source (reference, section 7.4), and so do the micro batches that an
optimizer step adds up, whichever process has them. Every source is a random walk through its
records (`pixelllm.sources`), or several, where they are streamed (`pixelllm.streams`): batch n then
is the next one of walk n modulo their number. What is saved of them in a checkpoint only spares
reading anew what was read before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pixelllm.batches import Batch, Prompted, TextLimits, collate_text
from pixelllm.config import Source
from pixelllm.feature_cache import FeatureCache
from pixelllm.images import resize_size
from pixelllm.shards import ShardedTable
from pixelllm.sources import SourceRecords, choose_phrases
from pixelllm.streams import StreamedRecords
from pixelllm.tables import Table
from pixelllm.views import View, random_view, see_mask, see_phrase, whole_view

NO_IMAGE = torch.empty(0, dtype=torch.uint8)
NO_MASKS = torch.empty(0, dtype=torch.bool)


def draw_sources(sources: Sequence[Source], num_steps: int, seed: int) -> np.ndarray:
    """The source of every step, int64[num_steps]. Raises ValueError where a step has none."""
    progress = np.arange(num_steps)[:, None] / max(num_steps, 1)
    first, last = np.array([source.window for source in sources]).T
    weights = (progress >= first) * (progress < last) * [source.weight for source in sources]
    idle = np.flatnonzero(weights.sum(1) == 0)
    if len(idle):
        windows = ", ".join(f"{source.task!r} {source.window}" for source in sources)
        raise ValueError(f"no source is drawn at step {idle[0]}; their windows are {windows}")
    shares = weights.cumsum(1) / weights.sum(1, keepdims=True)
    chance = np.random.default_rng([seed, len(sources)]).random((num_steps, 1))
    return (chance >= shares).sum(1)


def source_records(
    tables: Sequence[Table | ShardedTable], source: Source, batch_size: int, seed: int
) -> SourceRecords | StreamedRecords:
    """The records of a source, streamed where they lie in shards.

    Raises ValueError where there are none, some of either kind, or no masks to be learnt.
    """
    mine = [table for table in tables if fnmatch(table.name, source.tables)]
    found = [table for table in mine if table.has_task(source.task)]
    streamed = [table for table in found if isinstance(table, ShardedTable)]
    if not found:
        names = ", ".join(str(table.path) for table in tables)
        wanted = f"{source.task!r} phrases in tables called {source.tables!r}"
        raise ValueError(f"the recipe needs {wanted}; there are none in {names}")
    if source.mask_weight and not any(table.has_masks(source.task) for table in found):
        names = ", ".join(str(table.path) for table in found)
        wanted = f"masks of {source.task!r} phrases; there are none in {names}"
        raise ValueError(f"the recipe learns {wanted}; make them of files with segmentations")
    if not streamed:
        return SourceRecords(found, source, batch_size, seed)
    if len(streamed) < len(found):
        names = ", ".join(str(table.path) for table in found)
        raise ValueError(
            f"{source.task!r} phrases lie in Arrow tables and in Parquet shards: {names}; "
            "make shards of all of them with python -m data.parquet"
        )
    return StreamedRecords(streamed, source, batch_size, seed)


def turns_of(picks: np.ndarray, walks: Sequence[int]) -> np.ndarray:
    """How often the walk of every step was drawn from before: its place there, int64[num_steps].

    Args:
        picks: the source of every step.
        walks: of every source; step n is for walk n modulo their number.
    """
    turns = np.zeros(len(picks), dtype=np.int64)
    for source, num_walks in enumerate(walks):
        for walk in range(num_walks):
            mine = np.arange(walk, len(picks), num_walks)
            mine = mine[picks[mine] == source]
            turns[mine] = np.arange(len(mine))
    return turns


class Mixture(Dataset):
    """Batches by step number.

    Args:
        tables: where the records are; every source must occur in one of them.
        sources: with their weights.
        batch_size: images of an optimizer step, where a source does not have its own.
        accumulate: micro batches of a step; a batch of the stream is one of them.
        num_steps: optimizer steps; the stream is `accumulate` times as long.
        cache: features of frozen encoders; pixels are decoded only where it is None or the
            model still needs them (`with_images`).
    """

    def __init__(
        self,
        tables: Sequence[Table],
        sources: Sequence[Source],
        tokenizer,
        limits: TextLimits,
        *,
        frame: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        accumulate: int = 1,
        cache: FeatureCache | None = None,
        with_images: bool = True,
    ) -> None:
        scaled = [source.task for source in sources if source.scale is not None]
        if cache and scaled:
            raise ValueError(
                f"the sources {scaled} show their images at random scales, so their features "
                "cannot be cached; leave out the cache or their scale"
            )
        sizes = (-(-(source.batch_size or batch_size) // accumulate) for source in sources)
        self.sources = [
            source_records(tables, source, size, seed + number)
            for number, (source, size) in enumerate(zip(sources, sizes, strict=True))
        ]
        self.tokenizer = tokenizer
        self.limits = limits
        self.frame = frame
        self.seed = seed
        self.cache = cache
        self.with_images = with_images
        self.picks = draw_sources(sources, num_steps, seed).repeat(accumulate)
        self.share(1, {})

    def share(self, num_readers: int, saved: dict[str, Any]) -> None:
        """Get ready for `num_readers` that take every `num_readers`-th step each.

        Args:
            saved: what `state` said of any steps of any readers, newest last.
        """
        for number, records in enumerate(self.sources):
            mine = {key: saved[key] for key in saved if key.startswith(f"{number}:")}
            records.share(num_readers, {key.split(":")[1]: mine[key] for key in mine})
        self.turns = turns_of(self.picks, [records.num_walks for records in self.sources])

    def state(self, step: int) -> dict[str, Any]:
        """Where the walk of `step` stands after it, as JSON; empty where it need not be saved."""
        number = int(self.picks[step])
        walks = self.sources[number].state(step)
        return {f"{number}:{key}": state for key, state in walks.items()}

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, step: int) -> Batch:
        records = self.sources[self.picks[step]]
        rng = np.random.default_rng([self.seed, 1, step])
        drawn = records.batch(step, int(self.turns[step]))
        chosen = [choose_phrases(records.source, record, rng) for record in drawn]
        return assemble(
            chosen,
            self.tokenizer,
            self.limits,
            frame=self.frame,
            source=records.source,
            cache=self.cache,
            with_images=self.with_images,
            views=torch.Generator().manual_seed(int(rng.integers(2**62))),
        )


def assemble(
    chosen: Sequence[Prompted],
    tokenizer,
    limits: TextLimits,
    *,
    frame: int,
    source: Source,
    cache: FeatureCache | None,
    with_images: bool = True,
    views: torch.Generator | None = None,
) -> Batch:
    """The batch of the chosen phrases; images are decoded or their features looked up.

    Args:
        views: draws the random view of each image where the source has a scale; None shows
            images whole.
    """
    records = [item.record for item in chosen]
    if source.scale is not None and views is not None:
        seen = [random_view(r, frame, source.scale, source.mirror, views) for r in records]
        chosen = [_see(item, view) for item, view in zip(chosen, seen, strict=True)]
    elif cache and not with_images:
        seen = [View(NO_IMAGE, resize_size(r.size, frame, frame)) for r in records]
    else:
        seen = [whole_view(record, frame) for record in records]
    return Batch(
        images=torch.stack([view.image for view in seen]),
        sizes=torch.tensor([view.size for view in seen]),
        features=cache.lookup(records) if cache else {},
        masks=frame_masks(chosen, seen, frame) if source.mask_weight else NO_MASKS,
        source=source,
        **collate_text(chosen, tokenizer, limits, source.every_word),
    )


def _see(item: Prompted, view: View) -> Prompted:
    """What is left of the phrases in a view, with their contexts."""
    seen = [see_phrase(phrase, view) for phrase in item.phrases]
    contexts = (c for c, phrase in zip(item.contexts, seen, strict=True) if phrase is not None)
    return Prompted(item.record, tuple(p for p in seen if p is not None), tuple(contexts))


def frame_masks(chosen: Sequence[Prompted], views: Sequence[View], frame: int) -> Tensor:
    """Masks of all phrases in the frame, bool[B, K, S, S]; padding rows are empty."""
    num_prompts = max(1, *(len(item.phrases) for item in chosen))
    masks = torch.zeros(len(chosen), num_prompts, frame, frame, dtype=torch.bool)
    for image, (item, view) in enumerate(zip(chosen, views, strict=True)):
        for number, phrase in enumerate(item.phrases):
            masks[image, number] = see_mask(phrase, view, frame)
    return masks
