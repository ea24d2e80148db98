"""What the README, the docs and the Makefile tell people to type: it runs, or its options exist."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

import data.scenes
import eval as evaluation
import train
from pixelllm import cli

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = ("git", "cd", "pip", "hf", "for", "done")  # programs of others
TOOLS = ("pip", "pytest", "ruff")  # modules of others
# Options that running text names without a value.
VALUED = ("--train.workers", "--train.accumulate", "--start.run", "--start.eyes")
# What the entry points call once their options are parsed.
WORK = {
    "data.scenes": (data.scenes, "write_scenes"),
    "train.py": (train, "run_training"),
    "eval.py": (evaluation, "evaluate"),
    "pixelllm.cli caption": (cli, "caption"),
    "pixelllm.cli locate": (cli, "locate"),
    "pixelllm.cli dense": (cli, "dense"),
    "pixelllm.cli info": (cli, "info"),
    "pixelllm.cli ask": (cli, "ask"),
    "pixelllm.cli plan": (cli, "plan"),
    "pixelllm.cli convert": (cli, "convert"),
}


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code blocks of the languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(script: str) -> list[list[str]]:
    """Words of every command: continued lines joined, comments and redirections dropped."""
    lines = re.split(r"\n|&&", script.replace("\\\n", " "))
    lines = [re.sub(r"\$\(.*?\)", "photo.jpg", line).split(" > ")[0] for line in lines]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shown_commands() -> list[list[str]]:
    """Commands of the fenced blocks, and of running text where they are whole."""
    texts = [text.read_text() for text in TEXTS]
    fenced = [c for text in texts for b in blocks(text, "bash", "sh") for c in commands(b)]
    inline = re.findall(r"`(make [^`]+|python [^`]+ --list)`", "\n".join(texts))
    return [*fenced, *indented_commands(texts), *map(shlex.split, inline)]


def indented_commands(texts: list[str]) -> list[list[str]]:
    """Those of indented blocks, where they are our programs and not cut short."""
    found = []
    for block in re.findall(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", "\n\n".join(texts)):
        for words in commands(textwrap.dedent(block).replace(" &\n", "\n")):
            if "torchrun" in words[:2]:
                words = ["python", *words[words.index("train.py") :]]
            if words[0] in ("python", "pixelllm") and "..." not in words:
                found.append(words)
    return found


def shown_options() -> list[str]:
    """What running text and help say to add to a training command."""
    texts = [path.read_text() for path in [*TEXTS, ROOT / "pixelllm" / "commands" / "plan.py"]]
    found = re.findall(r"[`(](--(?:train|model|start)\.[^`)]+)[`)]", "\n".join(texts))
    return [" ".join(options.split()) for options in found]


def parse_only(main: Callable[..., None], arguments: list[str]) -> None:
    """Parse as `tyro.cli(main)` does, without doing anything."""
    tyro.cli(functools.wraps(main)(lambda *_, **__: None), args=arguments)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the program of this command knows all of its words."""
    program, *rest = words
    if program in ELSEWHERE or program.startswith("held_out="):
        return
    if program == "pixelllm":
        program, rest = "pixelllm.cli", rest
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        return
    else:
        assert Path(program).name.startswith("python"), f"how is {words} checked?"
        program, rest = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    if program == "torch.distributed.run":
        program, *rest = rest[rest.index("train.py") :]
    if program.startswith("benchmarks"):
        file = ROOT / f"{program.removesuffix('.py').replace('.', '/')}.py"
        names = [word[2:].replace("-", "_") for word in rest if word.startswith("--")]
        assert not [name for name in names if name not in file.read_text()], words
        return
    if program in TOOLS:
        return
    name = f"{program} {rest[0]}" if program == "pixelllm.cli" else program
    if name not in WORK:
        parse_only(importlib.import_module(program).main, rest)
        return
    module, work = WORK[name]
    done = []
    monkeypatch.setattr(module, work, lambda *_: done.append(True))
    monkeypatch.setattr(sys, "argv", [program, *rest])
    module.main()
    assert done or rest == ["--list"], words


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_options_of_shown_commands_exist(words, monkeypatch):
    """A renamed option, recipe, module or make target fails here."""
    check(words, monkeypatch)


@pytest.mark.parametrize("options", shown_options())
def test_shown_options_exist(options, monkeypatch):
    words = options.split()
    needs_value = len(words) == 1 and words[0] in VALUED
    recipe = "perceptiongpt-7b" if ".vis." in options or ".clip." in options else "joint-t5xl"
    command = f"python train.py {recipe} --data a --val b --out c".split()
    check([*command, *words, *(["1"] if needs_value else [])], monkeypatch)


def test_a_wrong_command_is_noticed(monkeypatch):
    """The check itself can fail: for every kind of program."""
    for wrong in (
        "python train.py scenes-tiny --data a --val b --out c --train.step 3",
        "python train.py scenes-tinny --data a --val b --out c",
        "python eval.py run --data a --tusk trace",
        "pixelllm caption photo.jpg --modell run",
        "python -m data.coco a.json --image b --out c",
        "python -m data.scenes out --trains 3",
    ):
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            check(wrong.split(), monkeypatch)
    with pytest.raises(AssertionError):
        check(["make", "quickstrat"], monkeypatch)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, list[list[str]]]:
    """The commands that make would run for a target where nothing is made yet."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # This may itself run under make; its flags are not for the inner one.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    run = f"RUN={tmp_path_factory.mktemp('make') / 'run'}"
    plans = {}
    for target in ("quickstart", "small", "joint", "joint-long", "perceptiongpt", "test", "lint"):
        command = ["make", "--no-print-directory", "-n", target, run]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plans[target] = [c for c in commands(done.stdout) if Path(c[0]).name == "python"]
    return plans


def test_make_plans_parse(planned, monkeypatch, capsys):
    for words in (words for plan in planned.values() for words in plan):
        check(words, monkeypatch)
    programs = [words[1] if words[1] != "-m" else words[2] for words in planned["quickstart"]]
    assert {"data.scenes", "train.py", "eval.py", "pixelllm.cli"} <= set(programs)
    assert ["-m", "pytest"] in [words[1:] for words in planned["test"]]


@pytest.fixture
def home(tiny_run, tiny_joint, tiny_tables, tiny_scenes, tmp_path, monkeypatch) -> Path:
    """A folder in which the README's names lead to the tiny runs."""
    run = tmp_path / "runs" / "quickstart"
    shutil.copytree(tiny_run.main, run)
    (tmp_path / "runs" / "joint-refseg").symlink_to(tiny_joint)
    (run / "data").mkdir()
    (run / "data" / "scenes").symlink_to(tiny_scenes)
    (run / "data" / "narrations_val").symlink_to(tiny_tables.val)
    photo, other, *_ = sorted((tiny_scenes / "val").iterdir())
    shutil.copy(photo, tmp_path / "photo.jpg")
    shutil.copy(other, tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_commands(program: str) -> list[list[str]]:
    found = [c for b in blocks(TEXTS[0].read_text(), "bash") for c in commands(b)]
    return [words for words in found if program in words[:2] and words[0] != "cd"]


def test_the_python_example_runs(home, capsys):
    names: dict = {}
    for example in blocks(TEXTS[0].read_text(), "python"):
        exec(compile(example, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == len(names["caption"].words) > 0


def test_the_model_card_is_front_matter_and_an_example_that_runs(home, monkeypatch, capsys):
    card = (home / "runs" / "quickstart" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    assert fields["library_name"] == "pixelllm" and body.lstrip().startswith("# ")
    (example,) = blocks(card, "python")
    monkeypatch.chdir(home / "runs" / "quickstart")
    shutil.copy(home / "photo.jpg", "image.jpg")
    exec(compile(example, "model card", "exec"), {})
    assert capsys.readouterr().out


def test_captions_of_the_readme_are_made(home, capsys):
    shown = readme_commands("pixelllm")
    assert len(shown) >= 3
    for words in shown:
        cli.main([*words[1:], "--device", "cpu"])
        out = capsys.readouterr().out
        assert out or "dense" in words  # the tiny model may find nothing
        if "--json" in words:
            assert [json.loads(line)["image"] for line in out.splitlines()] == words[2:4]
    for name in ("photo.html", "photo.gif", "out.png", "objects.html"):
        assert (home / name).exists(), name


def test_the_evaluation_of_the_readme_writes_what_it_says(home, capsys):
    (words,) = readme_commands("eval.py")
    evaluation.main([*words[2:], "--device", "cpu"])
    assert "point_l1" in capsys.readouterr().out
    written = {path.name for path in (home / "runs" / "quickstart" / "eval").iterdir()}
    assert written == {"trace.json", "trace_predictions.jsonl"}


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text):
    links = re.findall(r"\]\((?!http)([^)#]+)", text.read_text())
    assert [link for link in links if not (text.parent / link).exists()] == []
