"""The next words of the official release's text decoder, from keys and values that are kept.

The release recomputes visual tokens, context and all words at every step (reference
`auto_regressive_decode.py`); here a step reads the words' last position alone. Beams of an item
share one cache: choosing among them changes which keys each beam may see, and moves no keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from pixelllm.models.trunk import Prompt

if TYPE_CHECKING:
    from pixelllm.models.git import GitDecoder

# Letters beyond those of pixelllm/__init__.py: A beams of an item, H heads, d their width.

# From so many rows on, and for float32 on a CPU, weights in oneDNN's own layout are read 1.2 to
# 1.6 times as fast as parameters; the copy costs about 10 steps and serves all later searches.
_PACKED_ROWS = 4


class _Linear(NamedTuple):
    """Weights of one product, in the number format that the steps compute in."""

    weight: Tensor
    bias: Tensor
    is_packed: bool

    def __call__(self, x: Tensor, with_gelu: bool = False) -> Tensor:
        if self.is_packed:
            after = "gelu" if with_gelu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], "none")
        result = F.linear(x, self.weight, self.bias)
        return F.gelu(result) if with_gelu else result


class _Layer(NamedTuple):
    """One post-norm layer."""

    query_key_value: _Linear
    output: _Linear
    attention_norm: nn.LayerNorm
    inner: _Linear
    outer: _Linear
    norm: nn.LayerNorm


class _Weights(NamedTuple):
    """What steps read of a decoder, and what of it they were made from."""

    source: tuple[object, ...]
    layers: list[_Layer]
    head: _Linear


_last_weights: WeakKeyDictionary[GitDecoder, _Weights] = WeakKeyDictionary()


class GitSteps:
    """Logits of the word after each position; a `NextLogits` of `pixelllm.decoding`.

    Args:
        decoder: in evaluation mode; later changes of its weights are not seen.
        prompt: of R items.
        num_beams: A, hypotheses per item.
        max_words: T, positions that will be asked for at most, BOS included.
    """

    def __init__(self, decoder: GitDecoder, prompt: Prompt, num_beams: int, max_words: int):
        R, S, _ = prompt.states.shape
        device = prompt.states.device
        self.decoder, self.num_beams, self.num_keys = decoder, num_beams, S
        keys = S + max_words * num_beams
        visible = ~prompt.padding[:, None, None]  # (R, 1, 1, S)
        # Keys and values by layer, float[2, R, H, S + T * A, d]: of the prompt, then of every step.
        self.kept = [_room(seen, keys) for seen in _read_prompt(decoder, prompt.states, visible)]
        self.weights = _weights(decoder, R * num_beams)
        self.hidden_keys = torch.full((R, 1, num_beams, keys), -torch.inf, device=device)
        self.hidden_keys[..., :S] = torch.where(visible, 0.0, -torch.inf)
        self.own = torch.full((num_beams, num_beams), -torch.inf, device=device)
        self.own.fill_diagonal_(0.0)

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        """int64[R * A, T], t -> float32[R * A, V]; every t from 0 on once, in order."""
        decoder, start = self.decoder, self.num_keys
        self.num_keys = end = start + self.num_beams
        self.hidden_keys[..., start:end] = self.own
        mask = self.hidden_keys[..., :end]
        hidden = decoder.embed(token_ids[:, t : t + 1], start=t)[:, 0]  # (R * A, D)
        for layer, kept in zip(self.weights.layers, self.kept, strict=True):
            hidden = self._step(layer, kept, hidden, mask.to(kept.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            return self.weights.head(hidden.float())

    def reorder(self, beams: Tensor) -> None:
        """Every beam goes on from another one of its item, int64[R, A]."""
        seen = self.hidden_keys[..., : self.num_keys]
        seen.copy_(seen.gather(2, beams[:, None, :, None].expand_as(seen)))

    def _step(self, layer: _Layer, kept: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        _, R, H, _, d = kept.shape
        projected = layer.query_key_value(hidden).view(R, self.num_beams, 3, H, d)
        projected = projected.permute(2, 0, 3, 1, 4)  # (3, R, H, A, d)
        kept = kept[:, :, :, : self.num_keys]
        kept[:, :, :, -self.num_beams :] = projected[1:]
        read = F.scaled_dot_product_attention(projected[0], *kept, attn_mask=mask)
        read = read.transpose(1, 2).reshape(hidden.shape)
        hidden = layer.attention_norm(hidden + layer.output(read))
        return layer.norm(hidden + layer.outer(layer.inner(hidden, with_gelu=True)))


def _read_prompt(decoder: GitDecoder, states: Tensor, visible: Tensor) -> list[Tensor]:
    """Keys and values of every layer, float[2, R, H, S, d] each."""
    seen = DynamicCache()
    *others, last = decoder.encoder.layer
    for module in others:
        states = module(states, visible, past_key_values=seen)
    own = last.attention.self  # nobody reads what the last layer makes of the prompt
    heads = (own.num_attention_heads, own.attention_head_size)
    key, value = (
        part(states).unflatten(-1, heads).transpose(1, 2) for part in (own.key, own.value)
    )
    seen.update(key, value, len(others))
    return [torch.stack([layer.keys, layer.values]) for layer in seen.layers]


def _room(seen: Tensor, length: int) -> Tensor:
    """float[2, R, H, S, d] at the beginning of float[2, R, H, length, d]."""
    room = seen.new_empty(*seen.shape[:3], length, seen.shape[-1])
    room[:, :, :, : seen.shape[3]] = seen
    return room


def _weights(decoder: GitDecoder, rows: int) -> _Weights:
    """Those of the last search, unless rows, number format or parameters have changed since.

    Changes that go past autograd's count (`.data`) are seen after `train()` or `eval()`.
    """
    parameters = list(decoder.parameters())
    kind = parameters[0].device.type
    number_format = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if any(parameter.is_inference() for parameter in parameters):  # their changes are not counted
        return _make_weights(decoder, rows, ())
    state = ((parameter.data_ptr(), parameter._version) for parameter in parameters)
    source = (rows, number_format, *state)
    if decoder not in _last_weights or _last_weights[decoder].source != source:
        forget_weights(decoder)  # before there are two of them
        _last_weights[decoder] = _make_weights(decoder, rows, source)
    return _last_weights[decoder]


def forget_weights(decoder: GitDecoder) -> None:
    """Have the next search make its weights anew."""
    _last_weights.pop(decoder, None)


def _make_weights(decoder: GitDecoder, rows: int, source: tuple[object, ...]) -> _Weights:
    layers = [_layer(module, rows) for module in decoder.encoder.layer]
    with torch.autocast(decoder.output.weight.device.type, enabled=False):
        head = _linear(rows, decoder.output.weight.float(), decoder.output.bias.float())
    return _Weights(source, layers, head)


def _layer(module: nn.Module, rows: int) -> _Layer:
    attention = module.attention
    projections = (attention.self.query, attention.self.key, attention.self.value)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    return _Layer(
        _linear(rows, weight, bias),
        _linear(rows, attention.output.dense.weight, attention.output.dense.bias),
        attention.output.LayerNorm,
        _linear(rows, module.intermediate.dense.weight, module.intermediate.dense.bias),
        _linear(rows, module.output.dense.weight, module.output.dense.bias),
        module.output.LayerNorm,
    )


def _linear(rows: int, weight: Tensor, bias: Tensor) -> _Linear:
    """A product with so many rows, in the number format of `forward`."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):  # once, where autocast would convert at every step
        weight, bias = (p.to(torch.get_autocast_dtype(kind)) for p in (weight, bias))
    is_packed = rows >= _PACKED_ROWS and kind == "cpu" and weight.dtype == torch.float32
    if is_packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return _Linear(weight, bias, is_packed)
