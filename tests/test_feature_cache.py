"""Cached features are those of the encoders, whatever happened to the run that wrote them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_EVA02, TINY_SAM, make_tiny_config
from PIL import Image

from pixelllm import feature_cache
from pixelllm.batches import frame_images
from pixelllm.feature_cache import FeatureCache, rounded
from pixelllm.models.build import build_eva02_branch, build_sam_branch
from pixelllm.records import Phrase, Record
from pixelllm.tables import Table, write_table
from pixelllm.training import captioning
from pixelllm.training.optimizer import freeze

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    branches = {"sam": build_sam_branch(TINY_SAM, 48), "eva02": build_eva02_branch(TINY_EVA02, 48)}
    for branch in branches.values():
        freeze(branch, ("encoder",))
        branch.eval()
    return branches


def table_of(paths: list[Path], out: Path) -> Table:
    records = (
        Record(f"r{i}", (40, 48), (Phrase(f"p{i}", "caption", "x"),), path=str(path))
        for i, path in enumerate(paths)
    )
    write_table(records, out, {})
    return Table(out)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.new("RGB", (48, 40), (30 * i, 200 - 20 * i, 90)).save(path)
    return paths


@pytest.fixture
def counted(encoders, monkeypatch):
    """Images that went through the encoder since the start of the test."""
    seen: list[int] = []
    forward = encoders["sam"].forward

    def count(images, sizes):
        seen.append(len(images))
        return forward(images, sizes)

    monkeypatch.setattr(encoders["sam"], "forward", count)
    return seen


def records_of(table: Table) -> list[Record]:
    return [table[i] for i in range(len(table))]


def test_cached_features_are_those_of_the_encoders(encoders, images, tmp_path):
    table = table_of(images, tmp_path / "table")
    cache = FeatureCache(tmp_path / "cache", encoders, 48)
    cache.fill(table, CPU)
    chosen = [table[i] for i in (4, 0, 4)]
    found = cache.lookup(chosen)
    framed, sizes = frame_images(chosen, 48)
    for name, encoder in encoders.items():
        assert found[name].dtype == torch.float16
        torch.testing.assert_close(found[name].float(), encoder(framed, sizes))


def test_the_precision_is_that_of_the_branch(encoders, images, tmp_path):
    branch = build_sam_branch(replace(TINY_SAM, half_features=False), 48).eval()
    branch.load_state_dict(encoders["sam"].state_dict())
    freeze(branch, ("encoder",))
    table = table_of(images, tmp_path / "table")
    cache = FeatureCache(tmp_path / "cache", {"sam": branch}, 48)
    cache.fill(table, CPU)
    found = cache.lookup([table[0]])["sam"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, branch(*frame_images([table[0]], 48)))
    assert cache.folder != FeatureCache(tmp_path / "cache", {"sam": encoders["sam"]}, 48).folder


def test_features_are_computed_once(encoders, images, tmp_path, counted):
    table = table_of([*images, images[0]], tmp_path / "table")
    for _ in range(2):  # a second run, and an image that occurs twice
        FeatureCache(tmp_path / "cache", encoders, 48).fill(table, CPU)
    assert sum(counted) == 7


def test_two_runs_fill_one_cache_beside_each_other(encoders, images, tmp_path):
    tables = [table_of(part, tmp_path / str(len(part))) for part in (images[:2], images[2:5])]
    caches = [FeatureCache(tmp_path / "cache", encoders, 48) for _ in tables]
    for cache, table in zip(caches, tables, strict=True):
        cache.fill(table, CPU)
    later = FeatureCache(tmp_path / "cache", encoders, 48)
    for cache, table in zip((*caches, later, later), (*tables, *tables), strict=True):
        cache.fill(table, CPU)  # which has nothing left to do
        expected = encoders["sam"](*frame_images([table[0]], 48))
        found = cache.lookup([table[0]])["sam"].float()
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_embedded_images_of_equal_ids_have_their_own_features(encoders, images, tmp_path):
    """Ids of two corpora may be equal."""
    cache, records = FeatureCache(tmp_path / "cache", encoders, 48), []
    for number, path in enumerate(images[:2]):
        record = Record("1", (40, 48), (Phrase("p", "caption", "x"),), data=path.read_bytes())
        write_table([record], tmp_path / f"table{number}", {})
        records.append(record)
        cache.fill(Table(tmp_path / f"table{number}"), CPU)
    for record in records:
        expected = encoders["sam"](*frame_images([record], 48))
        assert torch.equal(cache.lookup([record])["sam"], rounded(encoders["sam"], expected))


def test_an_interrupted_cache_goes_on(encoders, images, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 3)
    table = table_of(images, tmp_path / "table")
    cache = FeatureCache(tmp_path / "cache", encoders, 48)
    write, written = cache._write_shard, []

    def stop_in_second(digests, batches):
        if written:
            list(batches)
            (cache.folder / "000001-sam.npy").write_bytes(b"half")  # and no list of contents
            raise KeyboardInterrupt
        written.append(write(digests, batches))

    monkeypatch.setattr(cache, "_write_shard", stop_in_second)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(table, CPU)
    counted.clear()
    again = FeatureCache(tmp_path / "cache", encoders, 48)
    again.fill(table, CPU)
    assert sum(counted) == 4
    records = records_of(table)
    torch.testing.assert_close(
        again.lookup(records)["sam"].float(), encoders["sam"](*frame_images(records, 48))
    )


def test_a_changed_image_is_computed_anew(encoders, images, tmp_path, counted):
    table = table_of(images, tmp_path / "table")
    FeatureCache(tmp_path / "cache", encoders, 48).fill(table, CPU)
    Image.new("RGB", (48, 40), (255, 0, 255)).save(images[3])
    counted.clear()
    cache = FeatureCache(tmp_path / "cache", encoders, 48)
    cache.fill(table, CPU)
    assert sum(counted) == 1
    torch.testing.assert_close(
        cache.lookup([table[3]])["sam"].float(), encoders["sam"](*frame_images([table[3]], 48))
    )


def test_other_encoders_have_another_folder(encoders, tmp_path):
    """Weights, frame and sizes that no weight shows each decide the features."""
    own = FeatureCache(tmp_path, encoders, 48, (TINY_SAM,)).folder
    assert FeatureCache(tmp_path, encoders, 48, (TINY_SAM,)).folder == own
    others = [
        FeatureCache(tmp_path, encoders, 64, (TINY_SAM,)),
        FeatureCache(tmp_path, encoders, 48, (replace(TINY_SAM, window_size=3),)),
        FeatureCache(tmp_path, {"sam": encoders["sam"]}, 48, (TINY_SAM,)),
    ]
    changed = build_sam_branch(TINY_SAM, 48)
    changed.load_state_dict(encoders["sam"].state_dict())
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    others.append(FeatureCache(tmp_path, {**encoders, "sam": changed}, 48, (TINY_SAM,)))
    assert len({own, *(other.folder for other in others)}) == 5


def test_a_bad_image_is_named_and_the_cache_stays_usable(encoders, images, tmp_path):
    table = table_of(images, tmp_path / "table")
    good = images[5].read_bytes()
    images[5].write_bytes(good[:40])
    with pytest.raises(ValueError, match="record r5"):
        FeatureCache(tmp_path / "cache", encoders, 48).fill(table, CPU)
    images[5].write_bytes(good)
    cache = FeatureCache(tmp_path / "cache", encoders, 48)
    cache.fill(table, CPU)
    assert len(cache.lookup(records_of(table))["sam"]) == 7
    assert all(json.loads(f.read_text()) for f in cache.folder.glob("*.json"))


@pytest.mark.parametrize("frozen", [("sam", "eva02", "prompt_encoder"), ("sam", "prompt_encoder")])
def test_losses_are_the_same_with_a_cache(frozen, tiny_tables, tmp_path):
    """Also where one encoder learns and only the other's features are cached."""
    config = make_tiny_config()
    config = replace(config, train=replace(config.train, frozen=frozen))
    losses = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        tables = [Table(tiny_tables.train)], [Table(tiny_tables.val)]
        stage = captioning.build_stage(config, *tables, CPU, folder)
        stage.model.train()
        batches = [stage.batches[step] for step in range(3)]
        assert set(batches[0].features) == (set(frozen) - {"prompt_encoder"} if folder else set())
        losses.append([stage.loss(batch) for batch in batches])
    for plain, cached in zip(*losses, strict=True):
        for name in plain:
            torch.testing.assert_close(cached[name], plain[name], atol=1e-6, rtol=1e-6)
