"""Streamed sources: every record once an epoch, the same batches again, wherever one begins."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image

from pixelllm.batches import TextLimits
from pixelllm.config import Source, TrainConfig
from pixelllm.mixture import Mixture
from pixelllm.records import Phrase, Record
from pixelllm.shards import ShardedTable, open_table, unfinished_shards, write_shards
from pixelllm.streams import START, StreamedRecords, Walk, num_walks
from pixelllm.tables import write_table
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.loader import loader

COUNT = 96


def records(folder: Path):
    """Every record narrates, every fourth has a caption too, and captions differ in length."""
    Image.new("RGB", (20, 10)).save(folder / "image.png")
    for i in range(COUNT):
        phrases = (Phrase(f"n{i}", "narration", "car " * (1 + i % 7)),)
        phrases += (Phrase(f"c{i}", "caption", "a car"),) if i % 4 == 0 else ()
        yield Record(f"r{i}", (10, 20), phrases, path=str(folder / "image.png"))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> ShardedTable:
    """Eight shards of twelve records."""
    folder = tmp_path_factory.mktemp("corpus")
    assert not list(unfinished_shards(folder / "shards", []))
    write_shards(records(folder), folder / "shards", {}, 12)
    return open_table(folder / "shards")


def walk(table, task="narration", number=0, of=1, window=32, state=START, batch_size=4) -> Walk:
    return Walk(table.files, task, batch_size, 7, number, of, window, state)


def ids(given: Walk, num_batches: int) -> list[list[str]]:
    return [[record.id for record in given.next_batch()] for _ in range(num_batches)]


@pytest.mark.parametrize("of", [1, 4, 5])
def test_walks_divide_every_epoch_between_them(table, of: int):
    """Five do not divide eight shards, and so take every fifth record of all of them."""
    shares = []
    for number in range(of):
        one = walk(table, number=number, of=of, batch_size=1)
        drawn = []
        while one.state_dict()["epoch"] == 0:
            drawn += ids(one, 1)[0]
        shares.append(drawn[:-1])  # the last is of the second epoch
    assert Counter(name for share in shares for name in share) == {f"r{i}": 1 for i in range(COUNT)}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_are_shuffled_anew(table):
    one = walk(table, window=48)
    first, second = ids(one, COUNT // 4), ids(one, COUNT // 4)
    assert first != second
    numbers = [int(name[1:]) // 12 for batch in first[:6] for name in batch]
    assert len(set(numbers)) > 2, "a batch mixes the shards of its window"
    assert [name for b in first for name in b] != sorted(n for b in first for n in b)


@pytest.mark.parametrize("of", [1, 2, 3])
def test_a_saved_walk_goes_on_exactly(table, of: int):
    """At every batch of two epochs, in the middle of windows and at their ends."""
    straight = walk(table, number=of - 1, of=of, batch_size=5)
    states, batches = [START], []
    for _ in range(2 * COUNT // of // 5):
        batches += ids(straight, 1)
        states.append(json.loads(json.dumps(straight.state_dict())))
    assert states[-1]["epoch"] >= 1
    for place in range(0, len(batches), 2 if of == 1 else 1):
        again = walk(table, number=of - 1, of=of, batch_size=5, state=states[place])
        expected = batches[place : place + 3]
        assert ids(again, len(expected)) == expected


def test_skipping_is_reading(table):
    for num_batches in (0, 1, 9, 40):
        read, skipped = walk(table, "caption"), walk(table, "caption")
        ids(read, num_batches)
        skipped.skip(num_batches)
        assert ids(read, 4) == ids(skipped, 4) and read.state_dict() == skipped.state_dict()


def test_only_records_of_the_task_come(table):
    one = walk(table, "caption")
    drawn = [name for batch in ids(one, COUNT // 16) for name in batch]
    assert Counter(drawn) == {f"r{i}": 1 for i in range(0, COUNT, 4)}


def test_a_walk_is_the_same_through_a_url(table):
    """Over the memory file system, which takes the ways of S3 and the Hub without a network."""
    memory = fsspec.filesystem("memory")
    memory.put(table.path, "/shards", recursive=True)
    try:
        far = walk(open_table("memory://shards"))
        assert ids(far, 30) == ids(walk(table), 30)
        again = walk(open_table("memory://shards"), state=far.state_dict())
        assert ids(again, 5) == ids(far, 5)
    finally:
        memory.rm("/shards", recursive=True)


def test_captions_of_a_batch_have_like_length(table):
    one = walk(table, window=COUNT)
    spreads = []
    for _ in range(COUNT // 4):
        lengths = [len(record.phrases[0].caption) for record in one.next_batch()]
        spreads.append(max(lengths) - min(lengths))
    assert sum(spreads) / len(spreads) < 8  # of 24


def test_the_number_of_walks_suits_shards_and_readers():
    assert [num_walks(32, n) for n in (1, 2, 4, 16)] == [16] * 4
    assert num_walks(8, 4) == 8 and num_walks(1, 1) == 1
    assert num_walks(10, 4) == 4 and num_walks(32, 24) % 24 == 0


def test_a_share_without_records_is_named(table):
    with pytest.raises(ValueError, match="share 2 of 100 of .*00000.parquet and 7 more.*'caption'"):
        walk(table, "caption", number=1, of=100).next_batch()


def test_a_damaged_shard_is_an_error(tmp_path: Path):
    assert not list(unfinished_shards(tmp_path / "shards", []))
    write_shards(records(tmp_path), tmp_path / "shards", {}, 12)
    table = open_table(tmp_path / "shards")
    file = tmp_path / "shards" / "00003.parquet"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="a shard beside .*00000.parquet is damaged"):
        ids(walk(table), COUNT // 4)
    with pytest.raises(ValueError, match="00003.parquet is not a whole Parquet file"):
        list(table.phrases(COUNT))


# --- in the mixture and its loader ---

SOURCES = (Source("narration", weight=2, batch_size=3), Source("caption"))


def mixture(tables, num_steps=40, sources=SOURCES) -> Mixture:
    tokenizer = train_tokenizer(["a car car"] * 3, 100)
    facts = {"frame": 32, "batch_size": 2, "num_steps": num_steps, "seed": 3}
    return Mixture(tables, sources, tokenizer, TextLimits(0, 16, 8), **facts)


def drawn(table, step=0, rank=0, of=1, saved=None, count=None, workers=0, sources=SOURCES):
    """Ids of the batches of a process, and the loader's state after `count` of them."""
    config = TrainConfig(steps=40, workers=workers)
    batches = loader(mixture([table], sources=sources), step, config, rank, of, saved)
    taken = [batch.ids for _, batch in zip(range(count or 40), batches, strict=False)]
    return taken, json.loads(json.dumps(batches.state_dict()))


def test_sources_are_drawn_as_from_arrow_tables(table, tmp_path: Path):
    write_table(records(tmp_path), tmp_path / "table", {})
    arrow = mixture([open_table(tmp_path / "table")])
    assert (arrow.picks == mixture([table]).picks).all()
    taken, _ = drawn(table)
    letters = ["nc"[pick] for pick in arrow.picks]
    assert [{name[0] for name in names} for names in taken] == [{letter} for letter in letters]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")
def test_batches_are_the_same_for_numbers_that_divide_the_walks(table):
    """Eight walks: one process, two, or two with two workers each."""
    whole, _ = drawn(table)
    for rank in range(2):
        assert drawn(table, rank=rank, of=2)[0] == whole[rank::2]
    assert drawn(table, rank=1, of=2, workers=2)[0] == whole[1::2]


def test_a_loader_goes_on_where_the_checkpoint_was(table, monkeypatch):
    """Also on another number of processes, and without reading again what was read."""
    whole, _ = drawn(table)
    saved = {}
    for rank in range(2):
        saved |= drawn(table, rank=rank, of=2, count=13)[1]

    def skip(_walk: Walk, num_batches: int) -> None:
        assert num_batches == 0

    monkeypatch.setattr(Walk, "skip", skip)
    assert drawn(table, step=26, saved=saved)[0] == whole[26:]
    for rank in range(4):
        assert drawn(table, step=26, rank=rank, of=4, saved=saved)[0] == whole[26 + rank :: 4]


def test_what_workers_read_ahead_is_not_saved(table):
    whole, _ = drawn(table)
    _, saved = drawn(table, count=9, workers=1)
    assert drawn(table, step=9, saved=saved, workers=1)[0] == whole[9:]


def test_a_step_can_be_asked_for_at_random(table):
    """A validation begins at the first step again and again."""
    given = mixture([table])
    first = [given[step].ids for step in range(6)]
    assert [given[step].ids for step in (0, 3, 1, 5)] == [first[i] for i in (0, 3, 1, 5)]
    assert torch.equal(given[2].text.token_ids, mixture([table])[2].text.token_ids)


def test_a_resume_on_an_odd_number_of_processes_still_follows_the_rule(table):
    """Three processes have 24 walks; the states of eight are of no use and left alone."""
    _, saved = drawn(table, count=12, sources=SOURCES[:1])
    straight, _ = drawn(table, rank=1, of=3, sources=SOURCES[:1])
    again, _ = drawn(table, step=12, rank=1, of=3, saved=saved, sources=SOURCES[:1])
    assert again == straight[4:]


def test_a_source_lies_in_tables_of_one_kind(table, tmp_path: Path):
    write_table(records(tmp_path), tmp_path / "arrow", {})
    tables = [table, open_table(tmp_path / "arrow")]
    with pytest.raises(ValueError, match="'narration' phrases lie in Arrow .*python -m data.parq"):
        mixture(tables)
    apart = (replace(SOURCES[0], tables="arrow"), replace(SOURCES[1], tables="shards"))
    both = mixture(tables, sources=apart)
    assert {name[0] for step in range(12) for name in both[step].ids} == {"n", "c"}


def test_a_sample_holds_no_record_twice(table):
    source = StreamedRecords([table], Source("narration"), 5, seed=0)
    names = [record.id for record in source.sample(500)]
    assert len(set(names)) == len(names) >= COUNT - 5
    assert len(source.sample(7)) == 7
