"""Memory of preparing and reading a large corpus: generated Localized Narratives.

    python benchmarks/streaming.py --records 500000 --forms shards

Writes JSON Lines in the published layout, prepares them with `data.localized_narratives` as
Parquet shards and as one Arrow table, and takes every batch of an epoch of each from the
training loader. Peaks are of the memory that belongs to the processes, Pss_Anon and Pss_Shmem in
/proc/self/smaps_rollup, sampled twice a second: pages of a memory-mapped file are counted apart
(Pss_File), since the system drops them whenever it needs room. Each part runs in a process of its
own; children count too.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tyro
from PIL import Image
from tqdm import tqdm

from data import localized_narratives
from pixelllm.batches import TextLimits
from pixelllm.config import Source, TrainConfig
from pixelllm.mixture import Mixture
from pixelllm.shards import open_table
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.loader import loader

WORDS = "a red car is parked on the left side of street and two people walk behind it".split()
IMAGES = 1000
SHARD = 10_000


def write_narratives(folder: Path, count: int) -> None:
    """`count` narratives of about 24 words and 70 trace points over a thousand small images."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(IMAGES):
        pixels = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:012d}.jpg")
    told = [_narrative(rng) for _ in range(200)]
    with (folder / "narratives.jsonl").open("w") as file:
        for number in tqdm(range(count), desc="narratives written"):
            head = {"dataset_id": "mscoco_train2017", "image_id": str(number % IMAGES)}
            head["annotator_id"] = number // IMAGES
            file.write(json.dumps(head)[:-1] + ", " + told[int(rng.integers(len(told)))])


def _narrative(rng: np.random.Generator) -> str:
    """What follows the head of a line."""
    words = rng.choice(WORDS, int(rng.integers(12, 36))).tolist()
    timed = [
        {"utterance": word, "start_time": 0.4 * i, "end_time": 0.4 * i + 0.35}
        for i, word in enumerate(words)
    ]
    path = np.clip(rng.normal(0, 0.03, (70, 2)).cumsum(0) + 0.5, 0, 1).round(4)
    seconds = np.linspace(0, 0.4 * len(words), len(path)).round(3)
    trace = [{"x": x, "y": y, "t": t} for (x, y), t in zip(path.tolist(), seconds, strict=True)]
    rest = {"caption": " ".join(words), "timed_caption": timed, "traces": [trace]}
    return json.dumps(rest)[1:] + "\n"


def prepare(folder: Path, out: Path, num_proc: int, shard_size: int | None) -> int:
    options = localized_narratives.Options(folder / "images")
    files = [folder / "narratives.jsonl"]
    return localized_narratives.convert(files, options, out, num_proc, shard_size)["kept"]


def read(table: Path, count: int, workers: int) -> int:
    """Take batches of 32 until `count` records have come; returns their number."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 300)
    steps = count // 32
    facts = {"frame": 16, "batch_size": 32, "num_steps": steps, "seed": 0}
    limits = TextLimits(0, 128, 8)
    batches = Mixture([open_table(table)], [Source("narration")], tokenizer, limits, **facts)
    config = TrainConfig(steps=steps, workers=workers)
    return sum(len(batch) for batch in tqdm(loader(batches, 0, config), total=steps))


def memory() -> tuple[float, float]:
    """Anonymous or shared memory, and mapped files, of this process and its children, GiB.

    Pages that processes share count once in the sum.
    """
    own = psutil.Process()
    anonymous = mapped = 0
    for process in (own, *own.children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # a child that has just ended
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line[:3] == "Pss"}
        anonymous += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
        mapped += sizes["Pss_File"]
    return anonymous / 2**20, mapped / 2**20


def _measure(answers: Any, part: Callable[..., int], arguments: tuple) -> None:
    samples, done = [memory()], threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            samples.append(memory())

    watch = threading.Thread(target=sample)
    watch.start()
    since = time.monotonic()
    facts = {"records": part(*arguments), "seconds": time.monotonic() - since}
    done.set()
    watch.join()
    own = np.array([anonymous for anonymous, _ in samples])
    facts["peaks"] = [float(part.max()) for part in np.array_split(own, min(5, len(own)))]
    facts["mapped"] = max(mapped for _, mapped in samples)
    answers.put(facts)


def measure(name: str, part: Callable[..., int], *arguments: Any) -> None:
    """Run a part in a process of its own and print a line about it."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measure, args=(answers, part, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: exit code {process.exitcode}")
    facts = answers.get()
    peaks = " ".join(f"{peak:.2f}" for peak in facts["peaks"])
    print(
        f"{name:16}{facts['records']:9,} records in {facts['seconds']:.0f} s; peak "
        f"{max(facts['peaks']):.2f} GiB, by fifths of the time {peaks}; "
        f"mapped files {facts['mapped']:.2f} GiB",
        flush=True,
    )


def main(
    records: int = 20_000,
    forms: tuple[Literal["shards", "table"], ...] = ("shards", "table"),
    processes: int = 1,
    keep: Path | None = None,
) -> None:
    """Prepare and read generated narratives.

    Args:
        records: how many narratives.
        forms: Parquet shards, which are streamed, or an Arrow table.
        processes: that prepare, and that load.
        keep: leave everything in this folder; what of it is there already is not made again.
    """
    folder = keep or Path(tempfile.mkdtemp(prefix="narratives-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "narratives.jsonl").exists():
            write_narratives(folder, records)
        for name in forms:
            shard_size = SHARD if name == "shards" else None
            if not (folder / name).exists():
                measure(f"prepare {name}", prepare, folder, folder / name, processes, shard_size)
            measure(f"read {name}", read, folder / name, records, processes)
    finally:
        if keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
