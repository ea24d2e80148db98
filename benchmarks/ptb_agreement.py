"""How often our PTB tokeniser agrees with the Java program that COCO caption evaluation runs.

    python benchmarks/ptb_agreement.py CAPTIONS...     # .txt, .tsv, .json, .jsonl; default: stress

Needs Java and `pip install pycocoevalcap`. Captions of JSON files are the strings under the keys
of `KEYS`, wherever they lie; of TSV files, the column `caption`. Without files, or with --stress N,
N random mixtures of awkward spellings are compared too.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pixelllm.evaluation.ptb import PUNCTUATION, tokenize

KEYS = {"caption", "captions", "phrase", "sent", "raw", "generated_refexp", "normal_caption",
        "hypothesis", "references"}  # fmt: skip
WORDS = "the A I dog man's dogs' in on two red In The of and café naïve 日本 grey K. left".split()
AWKWARD = """
don't cannot gonna wanna 'tis it’s I'd've y'all o'clock rock'n'roll 'em 'til 's 're n't '90s 90s
U.S. u.k Mr. Dr. St. st etc. Jan. ft. in. oz. No. no. Ph.D. Jr. Ave. a.m. p.m. vs. 5 12 1,000 3.5
1/2 10:30 5pm 4th 2x4 1990s 12/25/2010 555-1234 - -- --- – — ... .. … . ! ? !! ?! , ; : ' " '' ``
` “ ” ‘ ’ ( ) [ ] { } < > <b> </b> & &amp; AT&T a&b #1 #tag @me @ $5 $ US$ € £ % 50% / and/or w/ \\
| * + = ~ ^ _ a_b x-ray well-lit T-shirt black-and-white ½ ² ° © ™ 😀 a@b.com http://a.com/x
www.a.org a.com :) :-) ;) :D C++
""".split()


def captions_in(path: Path) -> Iterator[str]:
    if path.suffix == ".tsv":
        with path.open(newline="") as file:
            yield from (row["caption"] for row in csv.DictReader(file, delimiter="\t"))
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            yield from strings(json.loads(line))
    elif path.suffix == ".json":
        yield from strings(json.loads(path.read_text()))
    else:
        yield from path.read_text().splitlines()


def strings(value, wanted: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, key in KEYS)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, wanted)
    elif wanted and isinstance(value, str):
        yield value


def stress(count: int, generator: random.Random) -> list[str]:
    """Half words with awkward spellings among them, half spellings run together."""
    captions = []
    for index in range(count):
        parts = generator.choices(AWKWARD, k=generator.randint(1, 4))
        if index % 2:
            parts += generator.choices(WORDS, k=6)
            generator.shuffle(parts)
            captions.append(" ".join(parts))
        else:
            captions.append("".join(part + generator.choice(["", " ", " "]) for part in parts))
    return captions


def tokenize_in_java(captions: list[str]) -> list[list[str]]:
    folder = Path(importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0])
    jar = folder / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(captions) + "\n")
        file.flush()
        command = ["java", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-cp", str(jar)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        done = subprocess.run(
            [*command, file.name],
            capture_output=True,
            check=True,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    lines = done.stdout.decode().split("\n")[: len(captions)]
    return [[t for t in line.split(" ") if t and t not in PUNCTUATION] for line in lines]


def compare(name: str, captions: list[str], show: int) -> None:
    captions = [" ".join(caption.splitlines()) for caption in captions]
    theirs = tokenize_in_java(captions)
    start = time.perf_counter()
    ours = [tokenize(*pair) for pair in zip(captions, [*captions[1:], ""], strict=True)]
    rate = len(captions) / (time.perf_counter() - start)
    wrong = [i for i, tokens in enumerate(ours) if tokens != theirs[i]]
    agreed = len(captions) - len(wrong)
    print(f"{name:45} {agreed:6} of {len(captions):6} = {agreed / len(captions):8.3%}"
          f"   {rate:8.0f} captions/s")  # fmt: skip
    for index in wrong[:show]:
        print(f"    {captions[index]!r}\n      java {theirs[index]}\n      ours {ours[index]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--stress", type=int, default=3000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="disagreements to print of each file")
    args = parser.parse_args()
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        sys.exit("skipped: needs Java and `pip install pycocoevalcap`")
    for path in args.files:
        captions = list(dict.fromkeys(captions_in(path)))
        if captions:
            compare(path.name, captions, args.show)
    compare("stress", stress(args.stress, random.Random(args.seed)), args.show)


if __name__ == "__main__":
    main()
