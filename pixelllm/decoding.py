"""Greedy and beam search by the rules of the official release, on any next-word model.

Both recompute from the words written so far, and neither predicts the last position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (token_ids int64[R, T], t) -> float[R, V]: scores of the word after position t
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
    num_words = (token_ids != eos_id).sum(1) - 1
    return token_ids, total / num_words.clamp(min=1)


def beam_search(
    next_logits: NextLogits, start: Tensor, eos_id: int, num_beams: int
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
