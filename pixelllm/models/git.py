"""The official release's BERT-style text decoder, kept for parity and for its checkpoints.

It follows GIT (Wang et al., 2022): one transformer over [visual tokens; context; words] in
which visual tokens and context see each other and the words see everything before them.
Post-norm BERT layers; positions restart at 0 for context and words, visual tokens have none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, Cache, DynamicCache
from transformers.models.bert.modeling_bert import BertEncoder

from pixelllm.models.git_cache import GitSteps, forget_weights
from pixelllm.models.trunk import Language, Prompt, join


class GitDecoder(Language):
    """A trunk without an encoder, in which padded words are not masked.

    Args:
        prefix_width: width of the visual tokens; the trunk projects them itself.
        max_length: size of the position table.
        ff: width of the feed-forward layers, 4 * width if None.
        The others as in `Language`.
    """

    def __init__(
        self,
        vocab_size: int,
        prefix_width: int,
        width: int = 768,
        num_layers: int = 6,
        num_heads: int = 12,
        ff: int | None = None,
        max_length: int = 1024,
        dropout: float = 0.1,
        pad_id: int = 0,
        bos_id: int = 101,
        eos_id: int = 102,
    ):
        super().__init__(width, vocab_size, pad_id, bos_id, eos_id)
        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=ff or 4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation="sdpa",
        )
        self.visual_projection = nn.Sequential(nn.Linear(prefix_width, width), nn.LayerNorm(width))
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width)
        self.embedding_norm = nn.LayerNorm(width, eps=1e-8)
        self.dropout = nn.Dropout(dropout)
        self.encoder = BertEncoder(config)
        self.output = nn.Linear(width, vocab_size)
        for layer in self.encoder.layer:
            layer.attention.output.LayerNorm.eps = 1e-5  # that of the feed-forward stays 1e-12
        self.apply(_init)

    def encode(self, prefix: Tensor, context_ids: Tensor, context_padding: Tensor) -> Prompt:
        return join(self.visual_projection(prefix), self.embed(context_ids), context_padding)

    def decode(
        self,
        prompt: Prompt,
        token_ids: Tensor,
        token_padding: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        del token_padding  # the words are causal and padding comes last
        T, S = token_ids.shape[1], prompt.states.shape[1]
        seen = 0 if cache is None else cache.get_seq_length()  # positions in the cache
        inputs = self.embed(token_ids, start=max(seen - S, 0))
        if not seen:
            inputs = torch.cat([prompt.states, inputs], dim=1)
        total = seen + inputs.shape[1]
        key = torch.arange(total, device=token_ids.device)
        visible = (key < S) | (key <= key[seen:, None])  # (queries, keys)
        valid = F.pad(~prompt.padding, (0, total - S), value=True)
        mask = visible & valid[:, None, None]  # (R, 1, queries, keys)
        hidden = self.encoder(inputs, mask, past_key_values=cache).last_hidden_state
        return hidden[:, -T:]

    def new_cache(self) -> Cache:
        return DynamicCache()

    def train(self, mode: bool = True) -> GitDecoder:
        forget_weights(self)
        return super().train(mode)

    def new_steps(self, prompt: Prompt, num_beams: int, max_words: int) -> GitSteps:
        return GitSteps(self, prompt, num_beams, max_words)

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.output.weight.float(), self.output.bias.float())

    generate = Language.generate_official  # the only rules this trunk knows
    repeats = False  # one of them

    def embed(self, token_ids: Tensor, start: int = 0) -> Tensor:
        """Words int64[R, T] at the positions from `start` on, float[R, T, D]."""
        positions = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)
        return self.dropout(self.embedding_norm(self.words(token_ids) + self.positions(positions)))


def _init(module: nn.Module) -> None:
    """N(0, 0.02), as in BERT."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
