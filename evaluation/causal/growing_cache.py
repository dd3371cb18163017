"""A KV cache with room behind a shared prompt: conditions write into it, and it is cut back without a copy.

The stock dynamic cache concatenates at every step, which copies the keys and values of the whole prompt for each
decoded token; with a dozen conditions on one prompt that is most of the time. Here every layer has one buffer, grown
by a block at a time, and cutting back is a number.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_BLOCK = 64  # positions added at a time


class GrowingLayer(DynamicLayer):
    """Keys and values `(batch, heads, length, dim)` as views of buffers that have room behind them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new positions behind those that are there, and returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self._make_room(start, stop, key_states, value_states)
        keys, values = self._buffers
        keys[..., start:stop, :], values[..., start:stop, :] = key_states, value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def _make_room(self, start: int, stop: int, *states: torch.Tensor) -> None:
        if self._buffers is not None and self._buffers[0].shape[-2] >= stop:
            return
        wider = tuple(state.new_empty(*state.shape[:-2], stop + _BLOCK, state.shape[-1]) for state in states)
        if start:
            for new, old in zip(wider, (self.keys, self.values), strict=True):
                new[..., :start, :] = old
        self._buffers = wider


class GrowingCache(DynamicCache):
    """A dynamic cache of [`GrowingLayer`]s.

    Raises:
        ValueError: a model with layers of another kind (sliding windows, linear attention).
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        kinds = {type(layer).__name__ for layer in self.layers} - {"DynamicLayer"}
        if kinds:
            raise ValueError(f"the model's cache has layers {sorted(kinds)}; interventions need full attention layers")
        self.layers = [GrowingLayer() for _ in self.layers] or self.layers
        if not self.layers:
            self.layer_class_to_replicate = GrowingLayer

    def cut(self, length: int) -> None:
        """Cuts back to the first `length` positions."""
        surplus = self.get_seq_length() - length
        if surplus > 0:
            self.crop(-surplus)


__all__ = ["GrowingCache", "GrowingLayer"]
