"""The contract of a language trunk: visual tokens and context in, words and features out.

PixelLLM paper, section 3.3. The feature at position t has seen the words 0..t: it predicts
word t + 1 and carries the point of word t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from pixelllm.decoding import beam_search, greedy_search


class Prompt(NamedTuple):
    """What the words are conditioned on: visual tokens, then context."""

    states: Tensor  # float[R, S, D], encoded if the trunk has an encoder
    padding: Tensor  # bool[R, S], True on padding

    def repeat(self, times: int) -> Prompt:
        """Every row `times` times in a row, as beams want it."""
        return Prompt(*(tensor.repeat_interleave(times, dim=0) for tensor in self))


def join(visual: Tensor, context: Tensor, context_padding: Tensor) -> Prompt:
    """Visual tokens float[R, N, D], never padding, before context float[R, C, D]."""
    states = torch.cat([visual.to(context.dtype), context], dim=1)
    return Prompt(states, F.pad(context_padding, (visual.shape[1], 0), value=False))


class Generation(NamedTuple):
    """Finished words with the features that a parallel (teacher forced) pass over them gives.

    Log-probabilities are natural and those of the model, without temperature or penalties; that
    of the sentence is their sum, EOS included.
    """

    token_ids: Tensor  # int64[R, T], from BOS to EOS, then padding
    padding: Tensor  # bool[R, T], True after EOS
    log_probs: Tensor  # float32[R, T], 0 at BOS and on padding
    hidden: Tensor  # float[R, T, D]


class Steps(Protocol):
    """The model inside a search of `pixelllm.decoding`; it has a cache for one search."""

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        """Logits float[R * beams, V] after position t of int64[R * beams, T]; t = 0, 1, …"""

    def reorder(self, beams: Tensor) -> None:
        """Go on with these beams of every item, int64[R, beams]."""


class CachedSteps:
    """The steps of any trunk, through its `decode` and `new_cache`."""

    def __init__(self, language: Language, prompt: Prompt, num_beams: int):
        self.language = language
        self.prompt = prompt
        self.num_beams = num_beams
        self.cache = language.new_cache()

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        last = token_ids[:, t, None]
        if t:
            return self._logits(last)
        logits = self._logits(last[:: self.num_beams])  # all beams begin alike
        self.cache.batch_repeat_interleave(self.num_beams)
        self.prompt = self.prompt.repeat(self.num_beams)
        return logits.repeat_interleave(self.num_beams, dim=0)

    def _logits(self, words: Tensor) -> Tensor:
        language = self.language
        return language.logits(language.decode(self.prompt, words, cache=self.cache)[:, -1])

    def reorder(self, beams: Tensor) -> None:
        first = torch.arange(len(beams), device=beams.device) * self.num_beams
        self.cache.reorder_cache((first[:, None] + beams).flatten())


class Language(nn.Module, ABC):
    """The contract of a trunk.

    Args:
        width: D, the width of visual tokens going in and of features coming out.
        vocab_size: V.
        pad_id, bos_id, eos_id: `token_ids` begin with BOS; for T5 that is its padding id, 0.
    """

    def __init__(self, width: int, vocab_size: int, pad_id: int, bos_id: int, eos_id: int):
        super().__init__()
        self.width = width
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.bos_id = bos_id
        self.eos_id = eos_id

    def forward(
        self,
        prefix: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        token_ids: Tensor,
        token_padding: Tensor,
    ) -> Tensor:
        """Features of given words (teacher forcing), float[R, T, D] after the final norm.

        Args:
            prefix: float[R, N, D], visual tokens.
            context_ids, context_padding: int64 and bool[R, C], True on padding; C may be 0.
            token_ids, token_padding: int64 and bool[R, T], BOS first, padded at the end.
        """
        prompt = self.encode(prefix, context_ids, context_padding)
        return self.decode(prompt, token_ids, token_padding)

    @abstractmethod
    def encode(self, prefix: Tensor, context_ids: Tensor, context_padding: Tensor) -> Prompt:
        """The part of `forward` that does not depend on the words."""

    @abstractmethod
    def decode(
        self,
        prompt: Prompt,
        token_ids: Tensor,
        token_padding: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The rest of `forward`; with a cache, `token_ids` continue the words already in it."""

    @abstractmethod
    def new_cache(self) -> Cache:
        """An empty key-value cache for `decode`."""

    def new_steps(self, prompt: Prompt, num_beams: int, max_words: int) -> Steps:
        """What a search of so many beams and at most so many words, BOS included, asks."""
        del max_words  # these caches grow
        return CachedSteps(self, prompt, num_beams)

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary head, outside autocast: float[..., D] -> float32[..., V]."""

    repeats = True  # whether greedy search may write a word twice in a row

    @torch.no_grad()
    def stream(
        self, prefix: Tensor, context_ids: Tensor, context_padding: Tensor, max_new_tokens: int
    ) -> Iterator[tuple[int, Tensor, float]]:
        """Greedy decoding of one row that yields every word as soon as its feature exists.

        Yields:
            token id, feature float[1, D] of that token, its log-probability; EOS only ends.
        """
        prompt = self.encode(prefix, context_ids, context_padding)
        cache = self.new_cache()
        token = torch.tensor([self.bos_id], device=prefix.device)
        hidden = self.decode(prompt, token[:, None], cache=cache)[:, -1]
        for _ in range(max_new_tokens):
            log_probs = self.logits(hidden).log_softmax(-1)
            allowed = log_probs if self.repeats else log_probs.index_fill(1, token, -torch.inf)
            token = allowed.argmax(-1)
            if token.item() == self.eos_id:
                return
            hidden = self.decode(prompt, token[:, None], cache=cache)[:, -1]
            yield token.item(), hidden, log_probs[0, token.item()].item()

    @torch.no_grad()
    def generate_official(
        self, *inputs: Tensor, max_new_tokens: int, num_beams: int = 1
    ) -> Generation:
        """Decode by the rules of the official release (`pixelllm.decoding`), but with a cache.

        `inputs` are prefix, context_ids and context_padding as in `forward`.
        """
        prompt = self.encode(*inputs)
        R, length = len(prompt.states), max_new_tokens + 2  # the last slot is never filled
        start = torch.full((R, length), self.eos_id, device=prompt.states.device)
        start[:, 0] = self.bos_id
        steps = self.new_steps(prompt, num_beams, max_new_tokens)
        if num_beams == 1:
            token_ids, _ = greedy_search(steps, start, self.eos_id)
        else:
            found, _ = beam_search(steps, start, self.eos_id, num_beams, reorder=steps.reorder)
            token_ids = found[:, -1]
        return self._finish(prompt, token_ids[:, : length - 1])

    def _finish(self, prompt: Prompt, token_ids: Tensor) -> Generation:
        """One parallel pass over generated words (T may shrink to the longest row)."""
        is_eos = token_ids == self.eos_id
        is_eos[:, 0] = False  # BOS and EOS may share an id
        padding = is_eos.cumsum(1) - is_eos.long() > 0
        T = int((~padding).sum(1).max())
        padding = padding[:, :T]
        token_ids = token_ids[:, :T].masked_fill(padding, self.pad_id)
        hidden = self.decode(prompt, token_ids, padding)
        predicted = self.logits(hidden[:, :-1]).log_softmax(-1)  # (R, T - 1, V)
        log_probs = predicted.gather(-1, token_ids[:, 1:, None])[..., 0]
        log_probs = F.pad(log_probs, (1, 0)).masked_fill(padding, 0.0)
        return Generation(token_ids, padding, log_probs, hidden)
