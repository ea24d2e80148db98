"""One training step by part, and what number formats, compilation, threads and workers change.

    python benchmarks/training_step.py runs/quickstart --table runs/quickstart/data/narrations_val \
        --out profile

starts `scenes-tiny` from the pretrained halves of a finished quickstart, prints the parts of a step
and writes `profile/step.folded` (stacks of operations in microseconds, for speedscope.app or
flamegraph.pl) and `profile/step.json` (for Perfetto). Then it compares ways to run the same steps,
one after another in turns. `--compile` adds torch.compile, which takes minutes.

Times are processor time of this process, medians over steps, so that other jobs on the machine
count through caches and memory alone. Threads are compared by the clock, on a machine that does
nothing else; a number that it cannot run at once is left out. Loader workers are processes of their
own: theirs is not counted. What a feature cache saves is said by `benchmarks/feature_cache.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile, record_function

from pixelllm.config import Config, StartConfig
from pixelllm.scene_recipes import scenes_tiny
from pixelllm.tables import Table
from pixelllm.training.captioning import build_stage
from pixelllm.training.loader import loader
from pixelllm.training.optimizer import build_optimizer
from pixelllm.training.parallel import blocks

WATCHED = ("sam", "eva02", "prompt_encoder.encode_boxes", "extractor", "projection", "language")
WATCHED += ("language.logits", "point_head")
PARTS = ("batch", *WATCHED, "forward", "backward", "clip", "optimizer")


class Parts:
    """Named ranges of a step: processor seconds of each, and marks in the profiler's trace."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        with record_function(name):
            yield
        self.seconds[name].append(time.process_time() - begin)

    def watch(self, model: torch.nn.Module, path: str) -> None:
        """Every call of a module, or of a method of one, is a part from now on."""
        owner, _, name = path.rpartition(".")
        owner, name = (owner, name) if name in ("logits", "encode_boxes") else (path, "forward")
        module = model.get_submodule(owner)
        call = getattr(module, name)

        def ranged(*args: object, **kwargs: object) -> object:
            with self.part(path):
                return call(*args, **kwargs)

        setattr(module, name, ranged)


class Training:
    """A model of its own that takes the loop's steps.

    Args:
        compiled: "blocks" (of encoders and trunk, one by one, so that equal ones are compiled
            once), "loss" (all of the forward pass), or nothing.
        now: the clock; processor time, but where threads are compared, which overlap.
    """

    def __init__(
        self,
        config: Config,
        table: Table,
        compiled: str = "",
        threads: int = 1,
        now: Callable[[], float] = time.process_time,
    ) -> None:
        torch.manual_seed(0)
        self.train = config.train
        self.threads, self.now = threads, now
        self.stage = build_stage(config, [table], [table], torch.device("cpu"))
        self.stage.model.train()
        self.optimizer = build_optimizer(self.stage.model, config.train)
        self.loss = torch.compile(self.stage.loss) if compiled == "loss" else self.stage.loss
        if compiled == "blocks":
            for block in blocks(self.stage.model):
                block.compile()
        self.batches = loader(self.stage.batches, 0, self.train)
        self.parts = Parts()

    def step(self) -> float:
        """One step of the training loop; returns seconds by the clock `now`."""
        torch.set_num_threads(self.threads)
        begin, part = self.now(), self.parts.part
        with part("batch"):
            batch = next(self.batches)
        with part("forward"), torch.autocast("cpu", torch.bfloat16, enabled=self.train.bfloat16):
            total = sum(self.loss(batch).values())
        with part("backward"):
            total.backward()
        with part("clip"):
            clip_grad_norm_(self.stage.model.parameters(), self.train.clip)
        with part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.now() - begin


def print_parts(training: Training, steps: int) -> None:
    """The table; what the forward pass does outside its named parts are losses and the rest."""
    for path in WATCHED:
        training.parts.watch(training.stage.model, path)
    training.step()
    training.parts.seconds.clear()
    total = median(training.step() for _ in range(steps))
    seconds = {name: median(training.parts.seconds[name]) for name in PARTS}
    seconds["forward"] -= sum(seconds[path] for path in WATCHED)
    names = {"forward": "losses, the rest", "language.logits": "vocabulary head"}
    print(f"{'part':28}{'ms':>8}{'share':>8}")
    for name, spent in seconds.items():
        print(f"{names.get(name, name):28}{1e3 * spent:8.1f}{spent / total:8.1%}")
    print(f"{'step':28}{1e3 * total:8.1f}")


def write_flame(training: Training, out: Path, steps: int) -> None:
    """Collapsed stacks of operations below the named parts, and a trace."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            training.step()
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "step.json"))
    stacks: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        names, above = [], event
        while above is not None:
            names.append(above.name.replace(";", ","))
            above = above.cpu_parent
        stacks[";".join(reversed(names))] += event.self_cpu_time_total
    lines = [f"{stack} {round(spent)}" for stack, spent in sorted(stacks.items()) if spent >= 1]
    (out / "step.folded").write_text("\n".join(lines) + "\n")
    print(f"\nwrote {out / 'step.folded'} and {out / 'step.json'}")


def compare(title: str, ways: dict[str, Training], rounds: int) -> None:
    """Steps in turns; the first way is what the others are measured by."""
    for training in ways.values():
        training.step()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, training in ways.items():
            seconds[name].append(training.step())
    first = median(next(iter(seconds.values())))
    print(f"\n{title}\n{'':24}{'ms':>8}{'[range]':>18}{'faster by':>11}")
    for name, spent in seconds.items():
        spread = f"[{1e3 * min(spent):.0f} … {1e3 * max(spent):.0f}]"
        print(f"{name:24}{1e3 * median(spent):8.1f}{spread:>18}{first / median(spent):11.2f}")


class OutOfTime(BaseException):
    """No `Exception`, which the compiler would wrap in one of its own."""


@contextmanager
def at_most(seconds: int, what: str) -> Iterator[None]:
    """Give up with a line when time is over."""

    def give_up(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    except OutOfTime:
        print(f"\n{what}: not compiled within {seconds} s")
    finally:
        signal.alarm(0)


def compare_compiled(build: Callable[..., Training], rounds: int, seconds: int) -> None:
    for compiled in ("blocks", "loss"):
        with at_most(seconds, f"torch.compile of the {compiled}"):
            eager, fast = build(), build(compiled=compiled)
            begin = time.perf_counter()
            for _ in range(3):  # other lengths of captions are compiled once more
                fast.step()
            title = f"torch.compile ({time.perf_counter() - begin:.0f} s to compile)"
            compare(title, {"eager": eager, f"compiled {compiled}": fast}, rounds)


def main(args: argparse.Namespace) -> None:
    config, table = scenes_tiny(), Table(args.table)
    start = StartConfig(sam=str(args.run / "sam"), eva02=str(args.run / "eva02"))
    narrations = replace(config.sources[-1], window=(0.0, 1.0))
    config = replace(config, start=start, sources=(narrations,))

    def build(compiled: str = "", **train: object) -> Training:
        changed = replace(config, train=replace(config.train, **train))
        return Training(changed, table, compiled)

    print(f"{config.name}, {config.train.batch_size} images a step, torch {torch.__version__}\n")
    training = build()
    print_parts(training, args.steps)
    write_flame(training, args.out, steps=3)
    formats = {"float32": build(), "bfloat16 autocast": build(bfloat16=True)}
    compare("number formats", formats, args.steps)
    workers = {f"{n} workers": build(workers=n) for n in (0, 1)}
    compare("loader workers, without their own time", workers, args.steps)
    cores = len(os.sched_getaffinity(0))
    threads = {
        f"{n} thread(s)": Training(config, table, threads=n, now=time.perf_counter)
        for n in (1, 2)
        if n <= cores
    }
    compare("threads, by the clock", threads, args.steps)
    if args.compile:
        compare_compiled(build, args.steps, args.compile_seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile-seconds", type=int, default=600)
    main(parser.parse_args())
