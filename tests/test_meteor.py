from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest
from conftest import golden_root
from numpy.testing import assert_allclose

from pixelllm.evaluation import meteor
from pixelllm.evaluation.captions import tokenize_pairs
from pixelllm.evaluation.meteor import Meteor, MeteorUnavailable, score_meteor

REASON = meteor.unavailable_reason()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a `java` on the PATH that is a Python program speaking (or breaking) the protocol."""

    def install(body: str) -> None:
        (tmp_path / "jar" / "meteor").mkdir(parents=True)
        jar = tmp_path / "jar" / "meteor" / "meteor-1.5.jar"
        jar.touch()
        program = tmp_path / "java"
        program.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(meteor, "_find_jar", lambda: jar)

    return install


@pytest.fixture(scope="module")
def program():
    """One program for all tests that need the real one: it reads for seconds before it answers."""
    if REASON is not None:
        pytest.skip(REASON)
    with Meteor() as running:
        yield running


def test_golden_meteor_of_the_corpus_and_of_each_item(program):
    for path in sorted(golden_root().glob("caption_metrics/*.json")):
        golden = json.loads(path.read_text())
        items = golden["items"]
        candidates, truths = tokenize_pairs(
            {item["id"]: item["hypothesis"] for item in items},
            {item["id"]: item["references"] for item in items},
        )
        corpus, scores = program.scores(
            [" ".join(tokens) for tokens in candidates],
            [[" ".join(tokens) for tokens in texts] for texts in truths],
        )
        assert_allclose(corpus, golden["corpus"]["METEOR"], atol=1e-6)
        assert_allclose(scores, [item["scores"]["METEOR"] for item in items], atol=1e-6)


def test_separators_accents_and_line_breaks_do_not_upset_the_program(program):
    corpus, scores = program.scores(
        ["a ||| café", "a\ndog", ""], [["a café"], ["a dog", "x"], ["nothing"]]
    )
    assert scores[:2] == [1.0, 1.0] and scores[2] == 0.0 and 0 < corpus < 1


SCORER = """
for line in sys.stdin:
    if line.startswith("SCORE"):
        print(len(line.split(" ||| ")) - 2, flush=True)
    else:
        fields = line.strip().split(" ||| ")[1:]
        print(*fields, sum(map(int, fields)), sep="\\n", flush=True)
"""


def test_the_protocol_pairs_captions_with_their_own_scores(stand_in):
    """The stand-in scores the number of references and their sum: shows order and pooling."""
    stand_in(SCORER)
    with Meteor() as program:
        assert program.scores(["x", "y", "z"], [["a"], ["a", "b"], ["c"]]) == (4.0, [1.0, 2.0, 1.0])
        assert program.scores(["x"], [["a", "b", "c"]]) == (3.0, [3.0])
        process = program._process
    assert process.returncode is not None and process.stdin.closed and process.stdout.closed


def test_score_meteor_sends_tokens_of_raw_captions_in_the_order_of_the_hypotheses(stand_in):
    """The stand-in scores 1 where the last field, the caption, is the tokens expected."""
    stand_in(
        """
for line in sys.stdin:
    fields = line.strip().split(" ||| ")
    if fields[0] == "SCORE":
        print(int(fields[1:] in (["a dog", "a dog 's"], ["x", "y"])), flush=True)
    else:
        print(*fields[1:], sum(map(int, fields[1:])), sep="\\n", flush=True)
"""
    )
    references = {"2": ["X!"], "1": ["A dog."]}
    assert score_meteor({"1": "A dog's", "2": "Y?"}, references) == 2.0


def test_a_program_that_stops_is_reported_with_its_words(stand_in):
    stand_in("sys.exit('Could not reserve enough space for object heap')")
    with Meteor() as program, pytest.raises(MeteorUnavailable, match="stopped.*Could not reserve"):
        program.scores(["a"] * 10, [["b"]] * 10)
    assert program._process.returncode is not None


def test_a_program_that_hangs_is_given_up_and_ended(stand_in):
    stand_in("time.sleep(600)")
    with pytest.raises(MeteorUnavailable, match="did not answer in 0.2 s"):
        with Meteor(timeout=0.2) as program:
            program.scores(["a"], [["b"]])
    assert isinstance(program._process, subprocess.Popen) and program._process.returncode == -9


def test_absence_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Java" in meteor.unavailable_reason()
    with pytest.raises(MeteorUnavailable, match="Java"), Meteor():
        pass
    monkeypatch.setattr(meteor.shutil, "which", lambda name: "/bin/java")
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in meteor.unavailable_reason()


def test_unusable_input_is_refused(stand_in):
    stand_in(SCORER)
    with Meteor() as program:
        with pytest.raises(ValueError, match="1 hypotheses and 2 lists"):
            program.scores(["a"], [["b"], ["c"]])
        with pytest.raises(ValueError, match="item 1: expected a list of references"):
            program.scores(["a", "b"], [["b"], []])
        with pytest.raises(ValueError, match="one at least"):
            program.scores([], [])
