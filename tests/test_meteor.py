from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import golden_root
from numpy.testing import assert_allclose

from benchmarks.meteor import agreement_sets, one_line, scores_in_java
from benchmarks.ptb_agreement import captions_in
from pixelllm.evaluation import meteor, meteor_data
from pixelllm.evaluation.captions import tokenize_pairs
from pixelllm.evaluation.meteor import meteor_scores, normalize, score_meteor
from pixelllm.evaluation.meteor_align import EXACT, PARAPHRASE, STEM, SYNONYM, Caption, align
from pixelllm.evaluation.meteor_data import MeteorUnavailable, Paraphrases, Word, java_hash

REASON = meteor.unavailable_reason()
needs_tables = pytest.mark.skipif(REASON is not None, reason=str(REASON))
REAL = Path(
    os.environ.get("PIXELLLM_REAL_DATA", Path(__file__).parents[2] / "shared" / "data" / "real")
)


@needs_tables
def test_golden_meteor_of_the_corpus_and_of_each_item():
    for path in sorted(golden_root().glob("caption_metrics/*.json")):
        golden = json.loads(path.read_text())
        items = golden["items"]
        hypotheses = {item["id"]: item["hypothesis"] for item in items}
        references = {item["id"]: item["references"] for item in items}
        candidates, truths = tokenize_pairs(hypotheses, references)
        corpus, scores = meteor_scores(
            [" ".join(tokens) for tokens in candidates],
            [[" ".join(tokens) for tokens in texts] for texts in truths],
        )
        assert_allclose(corpus, golden["corpus"]["METEOR"], atol=1e-12)
        assert_allclose(scores, [item["scores"]["METEOR"] for item in items], atol=1e-12)
        assert score_meteor(hypotheses, references) == corpus


@needs_tables
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="the Java program needs `java`")
def test_real_captions_score_as_in_the_java_program():
    """Catches what hand-made cases do not: order of ties in the search, tables, odd spellings."""
    file = REAL / "coco" / "annotations" / "captions_val2014_first500.tsv"
    if not file.exists():
        pytest.skip(f"no real captions at {file}; set PIXELLLM_REAL_DATA to their folder")
    sets = agreement_sets(list(captions_in(file)), 300, random.Random(0))
    items = [item for found in sets.values() for item in found]
    theirs_corpus, theirs = scores_in_java(items)
    corpus, scores = meteor_scores(*zip(*items, strict=True))
    assert len(items) > 2000
    assert_allclose(scores, theirs, atol=1e-9)
    assert_allclose(corpus, theirs_corpus, atol=1e-9)


def test_what_the_java_program_reads_is_one_line_without_its_separator():
    assert one_line("a ||| b\nc") == "a  b c"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("A Dog, 3,5 m (old)!", "a dog , 3,5 m ( old ) !"),
        ("the dog's U.S.-based T-shirt", "the dog 's us based t shirt"),
        ("Mr. X, xy. No. 5. Then No. x No. X", "mr. x , xy . no. 5 . then no. x no . x"),
        ("wait... what..", "wait ... what .."),
        ("“quoted” ''twice'' ‘once’", '" quoted " " twice " \' once \''),
        ("5 – 6 — 7 -- 8", "5 - 6 — 7 - 8"),
        ("café 日本 50% a||| b\nc", "café 日 本 50 % a b c"),
        ("", ""),
    ],
)  # fmt: skip
def test_lines_are_normalized_as_by_the_java_program(line, words):
    """The right side is what the program's own normaliser gives."""
    assert normalize(line, {"Mr": False, "No": True}) == words.split()


def caption(text: str, **synsets: str) -> Caption:
    """Stems are words without a last s; synsets by word."""
    return Caption([
        Word(word, java_hash(word), java_hash(word.removesuffix("s")),
             frozenset(synsets.get(word, "").split()), word == "a")
        for word in text.split()
    ])  # fmt: skip


def test_exact_stem_and_synonym_matches_in_one_chunk():
    first, second = caption("a dog runs", dog="1 2"), caption("a hound run", hound="2 3")
    matches, chunks = align(first, second)
    assert sorted(matches) == [(0, 1, 0, 1, EXACT), (1, 1, 1, 1, SYNONYM), (2, 1, 2, 1, STEM)]
    assert chunks == 1


def test_a_paraphrase_covers_phrases_of_different_lengths_in_either_direction():
    table = {"in front of": frozenset(["before"])}
    for texts in (("cat before a dog", "cat in front of a dog"),
                  ("cat in front of a dog", "cat before a dog")):  # fmt: skip
        first, second = map(caption, texts)
        for item in (first, second):
            item.relate(table, frozenset(["before"]))
        matches, chunks = align(first, second)
        assert [match[-1] for match in sorted(matches)] == [EXACT, PARAPHRASE, EXACT, EXACT]
        assert chunks == 1 and sum(match[1] for match in matches) == len(second.words)


def test_words_of_one_hash_match_as_in_the_java_program():
    assert align(caption("a boy. runs"), caption("bowl"))[0] == [(0, 1, 1, 1, EXACT)]


def test_equal_captions_have_exact_matches_alone():
    """Catches synonyms in the way of a perfect score: the search could leave exact matches."""
    item = caption("dog hound dog hound", dog="1", hound="1")
    matches, chunks = align(item, item)
    assert [match[-1] for match in matches] == [EXACT] * 4 and chunks == 1


def test_the_search_prefers_fewer_chunks():
    """Catches a greedy choice of the first free word: "a" of "a cat" must stay with its cat."""
    matches, chunks = align(caption("a dog and a cat"), caption("a cat"))
    assert sorted(matches) == [(0, 1, 3, 1, EXACT), (1, 1, 4, 1, EXACT)] and chunks == 1
    assert align(caption("b a"), caption("a b"))[1] == 2


def test_a_lone_match_by_stem_is_dropped_where_it_could_be_another():
    """The program values it at half, rounded down: less than the chunk it begins."""
    assert align(caption("dogs x dogs"), caption("dog"))[0] == []


@needs_tables
def test_scores_that_the_java_program_gives():
    corpus, scores = meteor_scores(
        ["A man rides a horse on the beach", "two dogs playing with a ball", "a red bus", "", "x"],
        [
            ["someone is riding a brown horse along the shore", "A horse with its rider"],
            ["2 puppies play with balls in the grass", "dogs at play", "a ball and two dogs"],
            ["a red bus"],
            ["nothing here"],
            ["a table"],
        ],
    )
    assert_allclose(scores, [0.19011727841684598, 0.40437643345805335, 1, 0, 0], atol=1e-12)
    assert_allclose(corpus, 0.2778207671631416, atol=1e-12)


@needs_tables
def test_a_perfect_caption_adds_no_chunk_to_the_corpus():
    assert meteor_scores(["a dog", "a cat"], [["a dog"], ["a cat"]]) == (1.0, [1.0, 1.0])


def write_table(file: Path, *entries: tuple[str, str]) -> Path:
    lines = [line for entry in entries for line in ("0.5", *entry)]
    file.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return file


def test_the_paraphrase_table_is_cached_whole_and_anew_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entries = [("a", "one"), ("a", "the"), ("in front of", "before"), ("café", "bar")]
    table = write_table(tmp_path / "table.gz", *entries)
    phrases = {"a", "the", "one", "in front of", "café", "x"}
    written = set()
    for _ in range(2):
        found = Paraphrases(table).among(phrases)
        assert found == {"a": frozenset(["one", "the"])}
        written |= {(f, f.stat().st_ino) for f in (tmp_path / "cache" / "pixelllm").iterdir()}
    assert len(written) == 1
    write_table(table, *entries, ("x", "a"))
    assert Paraphrases(table).among({"x", "a"}) == {"x": frozenset(["a"])}


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        Paraphrases(write_table(tmp_path / "table.gz", ("a", "one")))


@pytest.mark.parametrize("absent", ["pycocoevalcap", "snowballstemmer"])
def test_absence_is_explained(monkeypatch, absent):
    monkeypatch.setattr(
        meteor_data.importlib.util, "find_spec", lambda name: None if name == absent else object()
    )
    assert f"{absent}: pip install" in meteor.unavailable_reason()
    meteor._tables.cache_clear()
    with pytest.raises(MeteorUnavailable, match="pip install"):
        meteor_scores(["a"], [["a"]])


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="1 hypotheses and 2 lists"):
        meteor_scores(["a"], [["b"], ["c"]])
    with pytest.raises(ValueError, match="item 1: expected a list of references"):
        meteor_scores(["a", "b"], [["b"], []])
    with pytest.raises(ValueError, match="item 0: expected a list of references, got 'b'"):
        meteor_scores(["a"], ["b"])
    with pytest.raises(ValueError, match="one at least"):
        meteor_scores([], [])
