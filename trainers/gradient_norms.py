"""Gradient norms of parts of a model in the log: whether a loss reaches what it is meant to train."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


class GradientNorms(TrainerCallback):
    """Collects, at each optimizer step, the norm of the gradients of each part, after clipping.

    With DeepSpeed, which takes the gradients away before this point, there is nothing to collect.

    Args:
        model: the model whose parameters are trained.
        parts: name in the log to a piece of the names of its parameters.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, str]) -> None:
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self.parameters = {part: [each for name, each in named if piece in name] for part, piece in parts.items()}
        self.totals: dict[str, torch.Tensor] = {}
        self.steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {part: _norm(parameters) for part, parameters in self.parameters.items()}
        if any(norm is None for norm in found.values()):
            return
        self.steps += 1
        for part, norm in found.items():
            self.totals[part] = self.totals.get(part, 0.0) + norm

    def take(self) -> dict[str, float]:
        """The mean of each part since the last call."""
        means = {part: (total / self.steps).item() for part, total in self.totals.items()}
        self.totals, self.steps = {}, 0
        return means


def _norm(parameters: list[nn.Parameter]) -> torch.Tensor | None:
    """Norm of all gradients together, without gradient; `None` where one is missing."""
    grads = [parameter.grad for parameter in parameters]
    if not grads or any(grad is None for grad in grads):
        return None
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
    return torch.stack([grad.detach().float().norm() for grad in whole]).norm()


__all__ = ["GradientNorms"]
