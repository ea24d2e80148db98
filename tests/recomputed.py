"""Steps of a trunk without a cache, as `pixelllm.models.trunk.CachedSteps` are with one."""

from __future__ import annotations

from torch import Tensor

from pixelllm.models.trunk import Language, Prompt


class Recomputed:
    """Everything anew from visual tokens, context and the words so far, at every step."""

    def __init__(self, language: Language, prompt: Prompt, num_beams: int):
        self.language, self.prompt = language, prompt.repeat(num_beams)

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        hidden = self.language.decode(self.prompt, token_ids[:, : t + 1])
        return self.language.logits(hidden[:, -1])

    def reorder(self, beams: Tensor) -> None:
        """Nothing is kept."""
