"""Decoding with a cache against recomputing everything at every step, at the official BERT size.

    python benchmarks/decoding.py                 # half a minute of processor time a round
    python benchmarks/decoding.py --every 1       # every step both ways: about five minutes
    python benchmarks/decoding.py --rounds 3 --threads 2

searches 128 words of one prompt with 4 beams and 40 words of 32 prompts greedily, 32 visual tokens
each; no caption may end. The official way (`auto_regressive_decode.py` of the release) takes all
positions, written or not, through the decoder and the vocabulary head, and reads one: each of its
steps costs the same. "Growing" recomputes the words so far and has a head for the last one alone.
At every n-th step of the cached search both are timed on the same words, and must rank the same
words first; a shorter search is run to its end each way, and must find the same captions. It is
the model's first, which lays out the weights for those that follow.

Times are processor time per thread, so that other jobs on the machine count through caches and
memory alone. Memory bandwidth is that of a sum over 1 GiB, between the same steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor

from pixelllm.decoding import beam_search, greedy_search
from pixelllm.models.git import GitDecoder
from pixelllm.models.trunk import Prompt, Steps

VISUAL_TOKENS, VISUAL_WIDTH = 32, 1024


class Case(NamedTuple):
    name: str
    prompts: int
    beams: int
    words: int
    target: float  # times faster than the official way


CASES = (
    Case("1 prompt, 4 beams, 128 words", 1, 4, 128, 20),
    Case("32 prompts, greedy, 40 words", 32, 1, 40, 30),
)


class Official:
    """All positions anew at every step, and all words they predict."""

    def __init__(self, model: GitDecoder, prompt: Prompt, num_beams: int):
        self.model, self.prompt = model, prompt.repeat(num_beams)

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        return self.model.logits(self.model.decode(self.prompt, token_ids))[:, t]

    def reorder(self, beams: Tensor) -> None:
        """Nothing is kept."""


class Growing(Official):
    """The words so far anew at every step, and the word that the last one predicts."""

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        hidden = self.model.decode(self.prompt, token_ids[:, : t + 1])
        return self.model.logits(hidden[:, -1])


def timed(call: Callable[..., Tensor], *arguments: object) -> tuple[Tensor, float]:
    """What a call returns, and processor seconds per thread."""
    begin = time.process_time()
    result = call(*arguments)
    return result, (time.process_time() - begin) / torch.get_num_threads()


class Compared:
    """Cached steps, with the other ways beside every n-th of them."""

    def __init__(self, model: GitDecoder, prompt: Prompt, case: Case, every: int):
        self.every, self.num_candidates = every, 2 * case.beams
        begin = time.process_time()
        self.cached = model.new_steps(prompt, case.beams, case.words)
        self.preparation = (time.process_time() - begin) / torch.get_num_threads()
        self.others = {way.__name__: way(model, prompt, case.beams) for way in (Official, Growing)}
        self.seconds: dict[str, list[float]] = {name: [] for name in ("cached", *self.others)}
        self.beside = 0.0  # seconds that are no part of the cached search
        self.buffer = torch.ones(1 << 28)
        self.rates: list[float] = []  # bytes per second
        self.reorder = self.cached.reorder

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        logits, seconds = timed(self.cached, token_ids, t)
        self.seconds["cached"].append(seconds)
        if t % self.every == self.every // 2:
            _, seconds = timed(self._measure_others, token_ids, t, logits)
            self.beside += seconds
        return logits

    def _measure_others(self, token_ids: Tensor, t: int, logits: Tensor) -> None:
        first = logits.topk(self.num_candidates)
        for name, way in self.others.items():
            expected, seconds = timed(way, token_ids, t)
            self.seconds[name].append(seconds)
            assert torch.equal(expected.topk(self.num_candidates).indices, first.indices), name
        _, seconds = timed(self.buffer.sum)
        self.rates.append(4 * len(self.buffer) / seconds)


def search(model: GitDecoder, steps: Steps, case: Case) -> Tensor:
    start = torch.full((case.prompts, case.words + 2), model.eos_id)
    start[:, 0] = model.bos_id
    if case.beams == 1:
        return greedy_search(steps, start, model.eos_id)[0]
    return beam_search(steps, start, model.eos_id, case.beams, reorder=steps.reorder)[0]


@torch.inference_mode(False)  # its parameters are made as those of a loaded model
def build() -> GitDecoder:
    """Random weights, but with words as sure as a trained model's, and none of them EOS."""
    torch.manual_seed(0)
    model = GitDecoder(30522, VISUAL_WIDTH).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    model.output.bias[model.eos_id] = -1e9
    return model


def weight_bytes(model: GitDecoder) -> int:
    """What every step has to read: layers and vocabulary head, not the tables it looks up."""
    parameters = [*model.encoder.parameters(), *model.output.parameters()]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def encode(model: GitDecoder, case: Case) -> Prompt:
    nothing = torch.zeros(case.prompts, 0, dtype=torch.long)
    visual = torch.randn(case.prompts, VISUAL_TOKENS, VISUAL_WIDTH)
    return model.encode(visual, nothing, nothing.bool())


def check_captions(model: GitDecoder, case: Case) -> None:
    """All words of a short search, cached and the official way."""
    case = case._replace(prompts=min(case.prompts, 4), words=10)
    prompt = encode(model, case)
    found = search(model, model.new_steps(prompt, case.beams, case.words), case)
    assert torch.equal(found, search(model, Official(model, prompt, case.beams), case))


def compare(model: GitDecoder, case: Case, every: int) -> dict[str, float]:
    """One cached search, in seconds and against the other ways; prints its line."""
    steps = Compared(model, encode(model, case), case, every)
    _, seconds = timed(search, model, steps, case)
    seconds += steps.preparation - steps.beside
    around = seconds - sum(steps.seconds["cached"])  # preparation, choosing of words
    ratios = {
        name: (case.words * mean(steps.seconds[name]) + around - steps.preparation) / seconds
        for name in steps.others
    }
    step, bandwidth = median(steps.seconds["cached"]), median(steps.rates)
    rate = weight_bytes(model) / step
    official = median(steps.seconds["Official"])
    print(f"{seconds:9.2f}{1e3 * steps.preparation:9.0f}{1e3 * step:9.1f}{1e3 * official:10.0f}"
          f"{ratios['Official']:10.1f}{ratios['Growing']:9.1f}{rate / 1e9:9.1f}"
          f"{bandwidth / 1e9:11.1f}{rate / bandwidth:8.0%}", flush=True)  # fmt: skip
    return {**ratios, "share": rate / bandwidth}


@torch.inference_mode()
def main(rounds: int, every: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build()
    print(f"weights of a step: {weight_bytes(model) / 1e6:.0f} MB in float32; {threads} thread(s)")
    for case in CASES:
        check_captions(model, case)
        print(
            f"\n{case.name}: {case.target:.0f} times, and 60 % of the bandwidth, are to be reached"
        )
        print("  seconds  prepare     step  official   times as slow     GB/s  bandwidth   share\n"
              "                ms       ms        ms  official  growing")  # fmt: skip
        found = [compare(model, case, every) for _ in range(rounds)]
        for name in found[0]:
            values = sorted(result[name] for result in found)
            print(f"{name.lower()}: {median(values):.2f} [{values[0]:.2f} … {values[-1]:.2f}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--every", type=int, default=16, help="steps between two compared ones")
    parser.add_argument("--threads", type=int, default=1)
    main(**vars(parser.parse_args()))
