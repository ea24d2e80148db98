"""Greedy and beam search by the rules of the official release, on any next-word model.

The release recomputes everything from the words written so far; a model with a cache reads the
last of them alone and is told which beams go on. Neither search predicts the last position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (token_ids int64[R, T], t) -> float[R, V]: scores of the word after position t = 0, 1, …
NextLogits = Callable[[Tensor, int], Tensor]

_EMPTY = -1.0e7


def greedy_search(next_logits: NextLogits, start: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Most probable word by word, but never the same word twice in a row.

    Args:
        next_logits: scores of the next word.
        start: int64[R, T], BOS, then EOS everywhere.

    Returns:
        token_ids int64[R, T] and scores float32[R]: the sum of log-probabilities (EOS
        included) over the number of words without BOS and EOS.
    """
    token_ids = start.clone()
    R, T = token_ids.shape
    total = torch.zeros(R, device=start.device)
    ended = torch.zeros(R, dtype=torch.bool, device=start.device)
    for t in range(T - 2):
        logits = next_logits(token_ids, t).float()
        previous = token_ids[:, t, None]
        repeated = logits.gather(1, previous).clamp(max=-10000.0)
        logits = logits.scatter(1, previous, repeated)
        log_prob, token = logits.log_softmax(-1).max(-1)
        token_ids[:, t + 1] = token.masked_fill(ended, eos_id)
        total += log_prob.masked_fill(ended, 0.0)
        ended |= token == eos_id
        if ended.all():
            break
    num_words = (token_ids != eos_id).sum(1) - 1
    return token_ids, total / num_words.clamp(min=1)


def beam_search(
    next_logits: NextLogits,
    start: Tensor,
    eos_id: int,
    num_beams: int,
    per_beam: int = 2,
    alpha: float = 0.6,
    reorder: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Beam search with a brevity penalty; repetitions are allowed.

    Args:
        next_logits: scores of the next word for R * num_beams rows, those of one item together.
        start: int64[R, T], BOS, then EOS everywhere.
        num_beams: beams kept per item, finished and live each.
        per_beam: num_beams * per_beam candidates are drawn in each step.
        alpha: finished beams score log-probability / ((5 + position of EOS) / 6) ** alpha.
        reorder: called between two words with the beams that go on, int64[R, num_beams]: the
            row of an item's beam i continues that of its beam `beams[i]`.

    Returns:
        token_ids int64[R, num_beams, T] and scores float32[R, num_beams], the best last. An
        item without any finished beam returns its live ones with plain log-probabilities;
        slots of other items that stayed empty hold zeros and score -1e7.
    """
    R, T = start.shape
    live_ids = start[:, None].repeat(1, num_beams, 1)
    live = torch.full((R, num_beams), _EMPTY, device=start.device)
    live[:, -1] = 0.0  # all beams begin alike: only one may be extended
    done_ids, done = torch.zeros_like(live_ids), torch.full_like(live, _EMPTY)
    for t in range(T - 2):
        # A live beam can still reach its log-probability now over the largest penalty.
        if (done.amin(1) > live.amax(1) / _penalty(T, alpha)).all():
            break
        log_probs = next_logits(live_ids.flatten(0, 1), t).float().log_softmax(-1)
        total = live[..., None] + log_probs.unflatten(0, (R, num_beams))  # (R, beams, V)
        scores, flat = total.flatten(1).topk(per_beam * num_beams)
        beams, tokens = flat // total.shape[-1], flat % total.shape[-1]
        ids = _take(live_ids, beams)
        ids[..., t + 1] = tokens
        ended = tokens == eos_id
        live, kept = _best(scores + ended * _EMPTY, num_beams)
        live_ids = _take(ids, kept)
        if reorder is not None:
            reorder(beams.gather(1, kept))
        finished = (scores / _penalty(t + 1, alpha)).masked_fill(~ended, _EMPTY)
        ids = ids.masked_fill(~ended[..., None], 0)
        done, kept = _best(torch.cat([done, finished], 1), num_beams)
        done_ids = _take(torch.cat([done_ids, ids], 1), kept)
    any_done = (done > _EMPTY).any(1)[:, None]
    return torch.where(any_done[..., None], done_ids, live_ids), torch.where(any_done, done, live)


def _penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def _take(token_ids: Tensor, beams: Tensor) -> Tensor:
    """Rows int64[R, k] of int64[R, beams, T]."""
    return token_ids.gather(1, beams[..., None].expand(-1, -1, token_ids.shape[-1]))


def _best(scores: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    """The best of each item in increasing order, and which they are."""
    scores, beams = scores.topk(num_beams)
    return scores.flip(1), beams.flip(1)
