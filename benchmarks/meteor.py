"""Our METEOR against the Java program: how far the scores differ, and how fast both are.

    python -m benchmarks.meteor CAPTIONS...     # .txt, .tsv, .json, .jsonl as in ptb_agreement

Needs Java and `pip install pycocoevalcap`. Every pair of captions that follow one another in a
file (captions of one image, mostly), random pairs, pairs with spoiled words, and narrations made of
several captions are compared; without files only random mixtures of awkward spellings are. Speed is
that of a workload like dense captioning, 20,000 short phrases with 1 to 5 references; pin the
process to one core (`taskset -c 1`) to compare like with like.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.ptb_agreement import captions_in, stress
from pixelllm.evaluation.meteor import meteor_scores

Items = list[tuple[str, list[str]]]  # a caption and its references


def scores_in_java(items: Items) -> tuple[float, list[float]]:
    """Corpus METEOR and METEOR of every item by the jar of `pycocoevalcap`, as COCO calls it."""
    package = Path(importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0])
    command = ["java", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Xmx2G"]
    command += ["-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        cwd=package / "meteor",
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as java:
        lines = [["SCORE", *map(one_line, texts), one_line(caption)] for caption, texts in items]
        text = "".join(" ||| ".join(parts) + "\n" for parts in lines).encode()

        def write() -> None:
            java.stdin.write(text)
            java.stdin.flush()

        # All at once: the program would be slower if it had to wait for us after every line.
        writer = threading.Thread(target=write)
        writer.start()
        statistics = [java.stdout.readline().decode().strip() for _ in items]
        writer.join()
        java.stdin.write((" ||| ".join(["EVAL", *statistics]) + "\n").encode())
        java.stdin.close()
        *scores, corpus = [float(java.stdout.readline()) for _ in range(len(items) + 1)]
    return corpus, scores


def one_line(caption: str) -> str:
    """A caption that cannot be taken for the program's own separators."""
    return " ".join(caption.splitlines()).replace("|||", "")


def spoil(caption: str, generator: random.Random) -> str:
    """Some words swapped, doubled, dropped, or with punctuation and numbers between them."""
    words = caption.split() or ["x"]
    for _ in range(generator.randint(1, 4)):
        place, other = generator.randrange(len(words)), generator.randrange(len(words))
        match generator.randrange(4):
            case 0:
                words[place], words[other] = words[other], words[place]
            case 1:
                words.insert(other, words[place])
            case 2:
                words[place] += generator.choice([",", ".", "...", "'s", "-", "!", " 3,5", " 12"])
            case 3 if len(words) > 1:
                del words[place]
    return " ".join(words)


def agreement_sets(captions: list[str], count: int, generator: random.Random) -> dict[str, Items]:
    """Named lists of items; `count` is the length of those that are drawn at random."""

    def draw(number: int) -> list[str]:
        return generator.choices(captions, k=number)

    def narration() -> str:
        place = generator.randrange(len(captions))
        return ". ".join(captions[place : place + 12])

    follow = [(a, [b]) for i, a in enumerate(captions) for b in captions[i + 1 : i + 5]]
    spoiled = [(spoil(text, generator), [text]) for text in draw(count)]
    awkward = stress(2 * count, generator)
    return {
        "neighbours": follow + [(b, [a]) for a, [b] in follow],
        "random pairs": [(a, [b]) for a, b in zip(draw(count), draw(count), strict=True)],
        "one to five references": [(a, draw(generator.randint(1, 5))) for a in draw(count)],
        "spoiled words": spoiled + [(b, [a]) for a, [b] in spoiled],
        "narrations": [(narration(), [narration()]) for _ in range(count // 10)]
        + [(spoil(text, generator), [text]) for text in [narration() for _ in range(count // 10)]],
        "awkward spellings": [
            (a, [b, spoil(a, generator)])
            for a, b in zip(awkward[::2], awkward[1::2], strict=True)
        ],
    }  # fmt: skip


def compare(name: str, items: Items, show: int) -> None:
    corpus, theirs = scores_in_java(items)
    our_corpus, ours = meteor_scores(*zip(*items, strict=True))
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    worst = sorted(range(len(items)), key=apart.__getitem__, reverse=True)
    print(f"{name:25} {len(items):6} pairs   largest difference {apart[worst[0]]:.1e}   mean "
          f"{sum(apart) / len(apart):.1e}   corpus {abs(corpus - our_corpus):.1e}")  # fmt: skip
    for index in worst[:show]:
        if apart[index] > 1e-9:
            print(f"    java {theirs[index]:.6f}, ours {ours[index]:.6f}: {items[index]}")


def dense_workload(captions: list[str], count: int, generator: random.Random) -> Items:
    """Short phrases as of dense captioning: of 2 to 8 words, with 1 to 5 similar references."""
    phrases = []
    for text in captions:
        words = text.split()
        phrases += [
            " ".join(words[i : i + generator.randint(2, 8)]) for i in range(0, len(words), 5)
        ]
    items = []
    for _ in range(count):
        place = generator.randrange(len(phrases))
        near = phrases[max(0, place - 10) : place + 10]
        items.append((phrases[place], generator.choices(near, k=generator.randint(1, 5))))
    return items


def compare_speed(items: Items) -> None:
    """Both from nothing, in seconds of CPU time: other programs do not count, Java's threads do."""
    start = time.process_time()
    meteor_scores(["a"], [["a"]])
    loading = time.process_time() - start
    meteor_scores(*zip(*items, strict=True))
    ours = time.process_time() - start
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    scores_in_java(items)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    theirs = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{len(items)} items of dense captioning, {sum(len(texts) for _, texts in items)} "
          f"references: java {theirs:.1f} s, ours {ours:.1f} s, {loading:.1f} s of it to read the "
          f"tables: {len(items) / theirs:.0f} and {len(items) / ours:.0f} items/s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=3000, help="items drawn for each random set")
    parser.add_argument("--workload", type=int, default=20_000, help="items that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="disagreements to print of each set")
    args = parser.parse_args()
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        sys.exit("skipped: needs Java and `pip install pycocoevalcap`")
    generator = random.Random(args.seed)
    captions = [text for path in args.files for text in captions_in(path)]
    captions = list(dict.fromkeys(captions or stress(1000, generator)))
    compare_speed(dense_workload(captions, args.workload, generator))
    for name, items in agreement_sets(captions, args.count, generator).items():
        compare(name, items, args.show)


if __name__ == "__main__":
    main()
