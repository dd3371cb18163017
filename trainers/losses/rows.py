"""Rows of a batch that a loss reads: the one way to take them out."""

import torch


def select_rows(
    states: torch.Tensor, shape: tuple[int, int], batch_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """States `(B, S, D)` at `N` places, `(N, D)`.

    Args:
        states: hidden states or logits of the batch.
        shape: `(B, S)` of the batch that the rows were found in.
        batch_index, position: `(N,)` each.

    Raises:
        ValueError: states of another batch.
    """
    if tuple(states.shape[:2]) != tuple(shape):
        expected = f"({shape[0]}, {shape[1]}, D)"
        raise ValueError(f"states has shape {tuple(states.shape)}, expected {expected}: pass the rows' own batch.")
    return states[batch_index, position]
