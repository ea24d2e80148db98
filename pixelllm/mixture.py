"""The training stream: batch `step` of a mixture of sources, as a function of seed and step.

Whole batches come from one source (reference, section 7.4). Every source is a random walk
through its records, each once per epoch. Because batch `step` depends on nothing but the seed
and the step, the loader's state in a checkpoint is one number, and workers need no protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pixelllm.batches import Batch, Prompted, TextLimits, collate_text, fill
from pixelllm.config import Source
from pixelllm.feature_cache import FeatureCache
from pixelllm.images import resize_size
from pixelllm.records import Record
from pixelllm.tables import Table
from pixelllm.views import View, random_view, see_mask, see_phrase, whole_view

NO_RECORDS = np.zeros(0, np.int64)
NO_IMAGE = torch.empty(0, dtype=torch.uint8)
NO_MASKS = torch.empty(0, dtype=torch.bool)


def records_with_task(table: Table, task: str) -> np.ndarray:
    """Positions of the records that have a phrase of `task`, int64[n] ascending."""
    phrases = table.rows.data.column("phrases")
    found, offset = [], 0
    for chunk in phrases.chunks:
        tasks = pc.struct_field(pc.list_flatten(chunk), "task")
        parents = pc.list_parent_indices(chunk).filter(pc.equal(tasks, task))
        found.append(np.unique(parents.to_numpy(zero_copy_only=False)) + offset)
        offset += len(chunk)
    return np.concatenate(found) if found else NO_RECORDS


def caption_lengths(table: Table) -> np.ndarray:
    """Characters of every record's first caption, int64[n]."""
    lengths = []
    for chunk in table.rows.data.column("phrases").chunks:
        first = pc.list_element(pc.list_slice(chunk, 0, 1), 0)
        lengths.append(pc.utf8_length(pc.struct_field(first, "caption")))
    return np.concatenate([part.to_numpy(zero_copy_only=False) for part in lengths])


def epoch_order(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order in which neighbours that share a batch have captions of like length.

    Sorting the captions of eight batches at a time saves most of the padding.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 8 * batch_size):
        window = order[start : start + 8 * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        parts = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [parts[i] for i in rng.permutation(len(parts))]
    return np.concatenate(batches)


class SourceRecords:
    """The records of one source over all tables, in a new random order every epoch."""

    def __init__(self, tables: Sequence[Table], source: Source, batch_size: int, seed: int) -> None:
        self.tables = tables
        self.source = source
        self.batch_size = source.batch_size or batch_size
        self.seed = seed
        mine = [fnmatch(table.path.name, source.tables) for table in tables]
        found = [
            records_with_task(t, source.task) if wanted else NO_RECORDS
            for t, wanted in zip(tables, mine, strict=True)
        ]
        self.rows = np.concatenate(
            [np.stack([np.full(len(f), number), f], axis=1) for number, f in enumerate(found)]
        )  # (n, 2): table, record
        if not len(self.rows):
            names = ", ".join(str(table.path) for table in tables)
            wanted = f"{source.task!r} phrases in tables called {source.tables!r}"
            raise ValueError(f"the recipe needs {wanted}; there are none in {names}")
        self.lengths = np.concatenate(
            [caption_lengths(table)[f] for table, f in zip(tables, found, strict=True)]
        )
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> Record:
        """The record at `position` of the endless walk."""
        epoch, index = divmod(position, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, epoch_order(self.lengths, self.batch_size, rng))
        table, record = self.rows[self._order[1][index]]
        return self.tables[table][int(record)]

    def choose(self, record: Record, rng: np.random.Generator) -> Prompted:
        """Draw the phrases of this source and a context for each."""
        mine = [phrase for phrase in record.phrases if phrase.task == self.source.task]
        count = min(len(mine), self.source.phrases_per_image)
        phrases = tuple(mine[i] for i in rng.permutation(len(mine))[:count])
        contexts = self.source.contexts
        drawn = rng.integers(len(contexts), size=count)
        return Prompted(
            record,
            phrases,
            tuple(fill(contexts[i], p) for i, p in zip(drawn, phrases, strict=True)),
        )


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


class Mixture(Dataset):
    """Batches by step number.

    Args:
        tables: where the records are; every source must occur in one of them.
        sources: with their weights.
        num_steps: length of the stream.
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
        cache: FeatureCache | None = None,
        with_images: bool = True,
    ) -> None:
        scaled = [source.task for source in sources if source.scale is not None]
        if cache and scaled:
            raise ValueError(
                f"the sources {scaled} show their images at random scales, so their features "
                "cannot be cached; leave out the cache or their scale"
            )
        self.sources = [
            SourceRecords(tables, source, batch_size, seed + number)
            for number, source in enumerate(sources)
        ]
        self.tokenizer = tokenizer
        self.limits = limits
        self.frame = frame
        self.seed = seed
        self.cache = cache
        self.with_images = with_images
        self.picks = draw_sources(sources, num_steps, seed)
        # How often a step's source was picked before: its place in that source's walk.
        self.turns = np.zeros(num_steps, dtype=np.int64)
        for number in range(len(sources)):
            mine = self.picks == number
            self.turns[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, step: int) -> Batch:
        records = self.sources[self.picks[step]]
        rng = np.random.default_rng([self.seed, 1, step])
        first = int(self.turns[step]) * records.batch_size
        chosen = [records.choose(records[first + i], rng) for i in range(records.batch_size)]
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
        **collate_text(chosen, tokenizer, limits),
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
