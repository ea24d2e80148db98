"""The training stream is a function of seed and step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixelllm.batches import Batch, TextLimits, fill
from pixelllm.config import Source
from pixelllm.mixture import Mixture, draw_sources, source_records
from pixelllm.records import Phrase, Record
from pixelllm.sources import SourceRecords, choose_phrases, epoch_order
from pixelllm.tables import Table, caption_lengths, records_with_task, write_table
from pixelllm.tokenizer import train_tokenizer

TASKS = ("narration", "caption")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    """Ten images: all with two narrations, every third with a caption as well."""
    folder = tmp_path_factory.mktemp("table")
    Image.new("RGB", (20, 10)).save(folder / "image.png")

    def records():
        for number in range(10):
            tasks = ["narration", "narration"] + ["caption"] * (number % 3 == 0)
            phrases = tuple(
                Phrase(f"{number}-{i}", task, f"red car {number}", context=f"about {number}")
                for i, task in enumerate(tasks)
            )
            yield Record(f"x/{number}", (10, 20), phrases, path=str(folder / "image.png"))

    write_table(records(), folder / "records", {})
    return Table(folder / "records")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["red car about 0123456789"] * 3, 100)


SOURCES = (Source("narration", weight=2, batch_size=3), Source("caption", weight=1))


def mixture(table, tokenizer, sources=SOURCES, num_steps=60, seed=0, **changes) -> Mixture:
    limits = TextLimits(0, 16, 8)
    facts = {"frame": 32, "batch_size": 2, "num_steps": num_steps, "seed": seed} | changes
    return Mixture([table], sources, tokenizer, limits, **facts)


def equal(first: Batch, second: Batch) -> bool:
    pairs = zip(first.text, second.text, strict=True)
    same = all(torch.equal(a, b) for a, b in pairs) and torch.equal(first.points, second.points)
    return first.ids == second.ids and torch.equal(first.images, second.images) and same


def test_records_of_a_task_are_found(table):
    phrases = table.rows.data.column("phrases")
    assert records_with_task(phrases, "narration").tolist() == list(range(10))
    assert records_with_task(phrases, "caption").tolist() == [0, 3, 6, 9]
    assert records_with_task(phrases, "region").tolist() == []
    assert table.has_task("caption") and not table.has_task("region")


def test_micro_batches_of_a_step_share_its_source_and_its_images(table, tokenizer):
    """Catches processes that wait for one with a dearer source, and sources of another weight."""
    whole = mixture(table, tokenizer, batch_size=4)
    parts = mixture(table, tokenizer, batch_size=4, accumulate=2)
    assert len(parts) == 2 * len(whole)
    assert parts.picks.tolist() == np.repeat(whole.picks, 2).tolist()
    assert {len(whole[step]) for step in range(20)} == {3, 4}  # a source's own 3, the recipe's 4
    assert {len(parts[step]) for step in range(40)} == {2}


def test_an_absent_task_is_named_with_the_tables(table):
    with pytest.raises(ValueError, match=rf"needs 'region' phrases.* none in {table.path}"):
        source_records([table], Source("region"), batch_size=2, seed=0)


def test_masks_that_no_table_has_are_not_trained(table):
    with pytest.raises(ValueError, match="learns masks of 'caption' phrases; there are none in"):
        source_records([table], Source("caption", mask_weight=1.0), batch_size=2, seed=0)


def test_a_source_draws_from_the_tables_its_glob_names(tmp_path: Path):
    """Corpora of one task are told apart by the names of their tables."""
    tables = []
    for corpus in ("coco_train", "flickr_train"):
        phrases = (Phrase(f"{corpus}-0", "referring", "red car"),)
        write_table([Record(f"{corpus}/0", (10, 20), phrases, path="x.png")], tmp_path / corpus, {})
        tables.append(Table(tmp_path / corpus))

    def drawn(glob: str) -> set[str]:
        source = source_records(tables, Source("referring", tables=glob), batch_size=1, seed=0)
        return {source[position].id for position in range(2 * len(source.rows))}

    assert drawn("*coco*") == {"coco_train/0"} and drawn("flickr*") == {"flickr_train/0"}
    assert drawn("*") == {"coco_train/0", "flickr_train/0"}
    with pytest.raises(ValueError, match=r"'referring' phrases in tables called '\*vg\*'; .*coco"):
        drawn("*vg*")


def test_the_stream_depends_on_seed_and_step_alone(table, tokenizer):
    """Any step can be asked for, in any order, by anyone: that is what a resume relies on."""
    whole, again = mixture(table, tokenizer), mixture(table, tokenizer)
    batches = [whole[step] for step in range(20)]
    for step in (19, 7, 8, 0, 19):
        assert equal(again[step], batches[step]), step
    other = mixture(table, tokenizer, seed=1)
    assert [other[step].ids for step in range(20)] != [batch.ids for batch in batches]


def test_a_longer_run_begins_with_the_same_batches(table, tokenizer):
    short, long = mixture(table, tokenizer), mixture(table, tokenizer, num_steps=600)
    assert all(short[step].ids == long[step].ids for step in range(60))


def test_shares_of_the_sources_match_their_weights(table, tokenizer):
    picks = Counter(mixture(table, tokenizer, num_steps=6000).picks.tolist())
    assert picks[0] / 6000 == pytest.approx(2 / 3, abs=0.02)


def test_a_source_is_drawn_in_its_window_alone():
    sources = (
        Source("region", window=(0.0, 0.5)),
        Source("narration"),
        Source("caption", window=(0.75, 1.0)),
    )
    picks = draw_sources(sources, 4000, seed=0)
    assert picks[:2000].mean() == pytest.approx(0.5, abs=0.06)
    assert (picks[2000:3000] == 1).all()
    assert set(picks[3000:]) == {1, 2}


def test_windows_must_leave_no_gap():
    with pytest.raises(ValueError, match=r"step 5; .*'region' \(0.0, 0.5\)"):
        draw_sources((Source("region", window=(0.0, 0.5)),), 10, seed=0)


def test_captions_of_a_batch_have_like_length():
    """Most of the padding goes away, and still every caption comes once."""
    lengths = np.random.default_rng(0).integers(10, 200, size=320)
    order = epoch_order(lengths, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(320))
    batches = lengths[order].reshape(40, 8)
    spread = (batches.max(1) - batches.min(1)).mean()
    assert spread < 0.35 * np.ptp(lengths.reshape(40, 8), axis=1).mean()
    means = batches.mean(1)  # batches of short and of long captions come mixed
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5


def test_the_longest_captions_are_those_of_the_table(table):
    lengths = caption_lengths(table.rows.data.column("phrases"))
    assert lengths.tolist() == [len(table[i].phrases[0].caption) for i in range(10)]


def test_whole_batches_come_from_one_source(table, tokenizer):
    stream = mixture(table, tokenizer)
    phrases = {p.id: p.task for i in range(10) for p in table[i].phrases}
    for step in range(12):
        batch, task = stream[step], SOURCES[stream.picks[step]].task
        assert {phrases[name] for name in batch.ids} == {task}
        assert len(batch) == {"narration": 3, "caption": 2}[task]


def test_loss_weights_are_those_of_the_source(table, tokenizer):
    sources = (replace(SOURCES[0], text_weight=0.5), replace(SOURCES[1], point_weight=0.0))
    stream = mixture(table, tokenizer, sources)
    found = {
        (int(stream.picks[i]), stream[i].source.text_weight, stream[i].source.point_weight)
        for i in range(12)
    }
    assert found == {(0, 0.5, 1.0), (1, 1.0, 0.0)}


def test_every_record_comes_once_per_epoch_over_all_tables(table):
    walk = SourceRecords([table, table], Source("narration"), batch_size=3, seed=3)
    names = [walk[position].id for position in range(60)]
    for epoch in range(3):
        assert Counter(names[20 * epoch : 20 * epoch + 20]) == {f"x/{i}": 2 for i in range(10)}
    assert names[:20] != names[20:40]
    assert [walk[position].id for position in (45, 5, 25)] == [names[i] for i in (45, 5, 25)]


def test_batches_of_a_source_walk_on_from_each_other(table, tokenizer):
    """Steps of another source in between skip and repeat nothing."""
    stream = mixture(table, tokenizer)
    steps = [step for step in range(60) if stream.picks[step] == 0][:10]
    names = [name.split("-")[0] for step in steps for name in stream[step].ids]
    walk = stream.sources[0]
    assert names == [walk[position].id.removeprefix("x/") for position in range(30)]


def test_phrases_and_contexts_are_drawn_anew(table, tokenizer):
    source = Source("narration", contexts=("", "say {}:"), phrases_per_image=1)
    rng = np.random.default_rng(0)
    drawn = [choose_phrases(source, table[4], rng) for _ in range(60)]
    assert {item.phrases[0].id for item in drawn} == {"4-0", "4-1"}
    assert {item.contexts[0] for item in drawn} == {"", "say about 4:"}
    several = replace(source, phrases_per_image=5)
    assert len(choose_phrases(several, table[4], rng).phrases) == 2


def test_a_template_takes_the_context_of_the_phrase():
    phrase = Phrase("p", "referring", "x", context="the {} car")
    assert fill("where is {}?", phrase) == "where is the {} car?"
    assert fill("plain", phrase) == "plain"


def test_random_scales_and_cached_features_exclude_each_other(table: Table) -> None:
    """Catches features of whole images used for crops."""
    source = Source("narration", scale=(0.75, 1.25))
    with pytest.raises(ValueError, match="narration.*random scales"):
        Mixture(
            [table],
            [source],
            tokenizer=None,
            limits=None,
            frame=32,
            batch_size=2,
            num_steps=1,
            seed=0,
            cache=object(),
        )
