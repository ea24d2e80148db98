"""Kill a training at random moments, resume it every time, and compare with one left alone.

    python -m benchmarks.survive --kills 100

A tiny model learns from streamed shards of generated scenes. SIGKILL comes at any moment since
the process began, after some steps, or while a checkpoint is being written, which happens at
every second step. Processes of the same program are forked from one that has torch loaded, so
that a hundred starts take no hour. Every resume draws anew whether a process of its own loads
the data. At the end weights, optimizer, loader state and log must be those of the other run.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file
from tqdm import tqdm

import train
from data import localized_narratives
from data.scene_worlds import World
from data.scenes import Options, write_scenes
from pixelllm.config import Config, LanguageConfig, PromptConfig, Source
from pixelllm.scene_recipes import scenes_tiny

SAVE_EVERY = 2


def tiny(steps: int, workers: int) -> Config:
    """A recipe whose step takes milliseconds, with dropout, which shows any lost random state."""
    base = scenes_tiny()
    eyes = {"width": 16, "depth": 1, "num_heads": 2, "table_size": 48}
    small = {"width": 16, "num_layers": 1, "mlp_width": 32, "num_heads": 2}
    prompt = PromptConfig(num_tokens=4, output_width=32, **small)
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "ff_width": 48}
    language = LanguageConfig(
        trunk=None, lora_rank=0, width=32, dropout=0.1, vocab_size=300, **layers
    )
    model = replace(
        base.model,
        frame=48,
        sam=replace(base.model.sam, out_channels=16, window_size=2, global_blocks=(0,), **eyes),
        eva02=replace(base.model.eva02, **eyes),
        prompt=prompt,
        language=language,
    )
    often = {"save_every": SAVE_EVERY, "log_every": 1, "eval_every": 50, "eval_batches": 1}
    training = replace(
        base.train, steps=steps, batch_size=4, lr_scales={}, workers=workers, threads=1, **often
    )
    return replace(base, model=model, sources=(Source("narration"),), train=training)


def write_data(folder: Path) -> Path:
    """Narrations of 64 small scenes in four shards."""
    world = World(image_size=(48, 64), min_size=0.3, max_size=0.5)
    write_scenes(Options(folder, train=64, val=1, seed=1, world=world, num_proc=1))
    file = folder / "annotations" / "scenes_train_localized_narratives.jsonl"
    options = localized_narratives.Options(folder)
    localized_narratives.convert([file], options, folder / "shards", shard_size=16)
    return folder / "shards"


def run(shards: Path, out: Path, steps: int, workers: int) -> None:
    """What a process does: train, going on where `out` was left."""
    multiprocessing.set_start_method("fork", force=True)  # of the loader, as from a shell
    out.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (out / "output.txt").open("a")
    data = (str(shards),)
    train.run_training(train.Run(data, data, out, resume=True, device="cpu"), tiny(steps, workers))


def start(*arguments: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pixelllm.scene_recipes"])
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


def is_writing(out: Path) -> bool:
    """Whether something is in the folder of checkpoints that is not one yet, or no longer."""
    return any(path.suffix for path in (out / "checkpoints").glob("*"))


def wait_for_moment(process: BaseProcess, out: Path, startup: float, rng: random.Random) -> str:
    """Wait until a random moment to kill; returns its kind, "ended" where the run did.

    `startup` are the seconds that a process takes to its first step.
    """
    kind = rng.choice(("any moment", "after steps", "checkpoint"))
    begun = time.monotonic()
    lines = _num_lines(out)
    left = {"any moment": rng.uniform(0, 2 * startup), "after steps": rng.uniform(1, 8)}
    left["checkpoint"] = rng.randint(1, 3)
    was_writing = False
    while process.is_alive():
        if kind == "any moment" and time.monotonic() - begun > left[kind]:
            return kind
        if kind == "after steps" and _num_lines(out) - lines > left[kind]:
            time.sleep(rng.uniform(0, 0.1))
            return kind
        if kind == "checkpoint" and lines < _num_lines(out):
            writes = is_writing(out)
            left[kind] -= writes and not was_writing
            was_writing = writes
            if left[kind] <= 0:
                time.sleep(rng.uniform(0, 0.004))
                return kind
        time.sleep(0.0002 if kind == "checkpoint" else 0.005)
    return "ended"


def _num_lines(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def torment(
    shards: Path, out: Path, steps: int, kills: int, startup: float, rng: random.Random
) -> Counter[str]:
    """Run to the end through `kills` kills; returns how many there were of each kind."""
    counts: Counter[str] = Counter()
    for _ in tqdm(range(kills), desc="kills"):
        process = start(shards, out, steps, rng.randint(0, 1))
        kind = wait_for_moment(process, out, startup, rng)
        process.kill()
        process.join()
        if kind == "ended":
            _require_killed(process, out, counts)
        counts[kind] += 1
        counts["checkpoint half written or removed"] += is_writing(out)
    finish(shards, out, steps)
    return counts


def _require_killed(process: BaseProcess, out: Path, counts: Counter[str]) -> None:
    said = (out / "output.txt").read_text()[-2000:]
    what = "came to its end" if process.exitcode == 0 else f"failed:\n{said}"
    raise SystemExit(f"after {dict(counts)} the run {what}; more steps leave room for all kills")


def finish(shards: Path, out: Path, steps: int) -> float:
    """Run to the end; returns the seconds to the first step."""
    process, begun = start(shards, out, steps, 0), time.monotonic()
    while process.is_alive() and not _num_lines(out):
        time.sleep(0.01)
    startup = time.monotonic() - begun
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run failed:\n{(out / 'output.txt').read_text()[-2000:]}")
    return startup


def differences(first: Path, second: Path) -> list[str]:
    """Names of all that is not equal bit for bit in two finished runs."""
    checkpoints = [max((out / "checkpoints").glob("step-????????")) for out in (first, second)]
    different = []
    for one, other in (
        [out / "model.safetensors" for out in (first, second)],
        [folder / "state.safetensors" for folder in checkpoints],
    ):
        tensors, others = load_file(one), load_file(other)
        different += sorted(tensors.keys() ^ others.keys())
        different += [k for k in tensors.keys() & others.keys() if not _same(tensors[k], others[k])]
    facts = [json.loads((folder / "state.json").read_text()) for folder in checkpoints]
    different += ["state.json"] if facts[0] != facts[1] else []
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (first, second)]
    logs = [[{**json.loads(line), "images_per_s": 0} for line in lines] for lines in logs]
    return different + (["log.jsonl"] if logs[0] != logs[1] else [])


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits: NaN equals itself, 0 not -0."""
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def main(kills: int = 100, seed: int = 0, keep: Path | None = None) -> None:
    """Kill a training again and again.

    Args:
        kills: how often.
        seed: of the moments.
        keep: leave both runs in this folder.
    """
    folder = keep or Path(tempfile.mkdtemp(prefix="survive-"))
    steps, since = 8 * kills + 10, time.monotonic()
    try:
        shards = write_data(folder / "data")
        finish(shards, folder / "warm", 1)  # the first start also loads torch
        startup = finish(shards, folder / "undisturbed", steps)
        print(f"undisturbed: {steps} steps in {time.monotonic() - since:.0f} s", flush=True)
        killed = torment(shards, folder / "killed", steps, kills, startup, random.Random(seed))
        different = differences(folder / "undisturbed", folder / "killed")
        print(f"killed: {dict(killed)}; in all {time.monotonic() - since:.0f} s")
        if different:
            raise SystemExit(f"{len(different)} things differ: {', '.join(different[:20])}")
        print("weights, optimizer, loader state and log are equal bit for bit")
    finally:
        if keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
