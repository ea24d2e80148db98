"""Keys and values of generated tokens in memory with room to grow, instead of copied every step.

`transformers` copies the whole cache to append a token: at SmolLM2's size a ninth of a step.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens that are made room for at once


class RoomyLayer(DynamicLayer):
    """A layer's cache, for inference: what it returns are views that the next token goes behind."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append float[R, H, T, d] to both; all that is held, float[R, H, S + T, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.rooms = self.keys, self.values
        total = self.keys.shape[2] + key_states.shape[2]
        self.rooms = (
            append(self.rooms[0], self.keys, key_states),
            append(self.rooms[1], self.values, value_states),
        )
        self.keys, self.values = (room[:, :, :total] for room in self.rooms)
        return self.keys, self.values


def append(room: Tensor, held: Tensor, new: Tensor) -> Tensor:
    """Memory that begins with `held` float[R, H, S, d] and goes on with `new` float[R, H, T, d].

    That is `room` where it begins with them already, as it does unless rows changed places.
    """
    R, H, S, d = held.shape
    total = S + new.shape[2]
    if room.shape[2] < total or room.data_ptr() != held.data_ptr():
        room = held.new_empty(R, H, total + ROOM, d)
        room[:, :, :S] = held
    room[:, :, S:total] = new
    return room


def roomy_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for a model; layers with a sliding window keep transformers' own."""
    layers = DynamicCache(config=config).layers
    return Cache([RoomyLayer() if type(layer) is DynamicLayer else layer for layer in layers])
