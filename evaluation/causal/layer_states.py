"""The outputs of every decoder layer at some positions: read them, or put others in their place.

Learned tokens are fed the same vectors for every item (specification, section 9: LaViT, LIVR), so edits of what slots
are fed say nothing there. What differs between items is what the layers make of them; replacing every layer's output
at the latents replaces their keys and values, rotated as they should be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the text decoder."""
    return model.get_decoder().layers


@contextmanager
def read_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the outputs `(B, n, H)` of the layers, in order, of the last forward in the context."""
    layers = decoder_layers(model)
    found: list[torch.Tensor] = [torch.empty(0)] * len(layers)

    def reader(number: int) -> Any:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            found[number] = output if torch.is_tensor(output) else output[0]

        return read

    handles = [layer.register_forward_hook(reader(number)) for number, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_states(model: PreTrainedModel, mask: torch.BoolTensor, states: torch.Tensor) -> Iterator[None]:
    """Puts states in place of the layers' outputs during a forward over `n` positions.

    Args:
        mask: `(B, n)` where.
        states: `(layers, B, n, H)` what; read where the mask is true.
    """

    def writer(number: int) -> Any:
        def write(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output if torch.is_tensor(output) else output[0]
            hidden = torch.where(mask.unsqueeze(-1), states[number].to(hidden), hidden)
            return hidden if torch.is_tensor(output) else (hidden, *output[1:])

        return write

    handles = [layer.register_forward_hook(writer(number)) for number, layer in enumerate(decoder_layers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["decoder_layers", "read_states", "replaced_states"]
