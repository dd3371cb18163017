"""Training heads of LaViT ("LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129).

Both read the final-norm state of the last learned token. Decoding does not use them; they travel with the weights, so
that training goes on where it ended.
"""

import torch
from torch import nn


class ConceptHead(nn.Module):
    """Predicts the pooled states of a teacher ("what it sees"): linear, exact GELU, linear, each with bias.

    Args:
        hidden_size: width of the model.
        concept_size: width of the teacher.
    """

    def __init__(self, hidden_size: int, concept_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, concept_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden)` to `(..., concept)`."""
        return self.mlp(hidden_states)


class AttentionHead(nn.Module):
    """Predicts where a teacher looks: unnormalised scores of the dot products of a projected state and key states,
    without a projection of the keys and without scaling, as published.

    Args:
        hidden_size: width of the model.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Scores `(batch, keys)` of states `(batch, hidden)` over key states `(batch, keys, hidden)`."""
        return (keys @ self.query_proj(states).unsqueeze(-1)).squeeze(-1)


__all__ = ["AttentionHead", "ConceptHead"]
