"""Rewards of the search over latents (`search_latent.py`): how sure the model is of what it would say.

Sources: DMLR ("Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623); its two
forms of confidence, of the paper and of the published code, are not monotone in confidence: a flat distribution over
the vocabulary scores higher than 0.99 on one token. The default here, one minus the normalised entropy, is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOOR = 1e-10
REWARD_ROWS = ("thoughts", "thoughts_and_end", "answer")


@dataclass(frozen=True)
class SearchReward:
    """A reward and the rows that it reads.

    Args:
        function: `(logits (N, rows, V), top_k) -> (N,)`, differentiable in the logits.
        rows: `"thoughts"`: the logits at the thought tokens; `"thoughts_and_end"`: at these and at the position behind
            them; `"answer"`: at the last position of the prompt, which chooses the first token of the answer.
    """

    function: Callable[[torch.Tensor, int], torch.Tensor]
    rows: str


def confidence(logits: torch.Tensor, top_k: int = 0) -> torch.Tensor:
    """One minus the entropy of the whole distribution in units of its maximum, mean over the rows: 1 is certain, 0 is
    uniform.

    Args:
        logits: `(..., rows, V)`.
        top_k: not read.

    Returns:
        `(...)` float32.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0]]))
        tensor(0.)
    """
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return (1 - entropy / math.log(logits.shape[-1])).mean(-1)


def published_confidence(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The published code: the mean of `-ln(p + 1e-10)` over the `top_k` likeliest tokens, mean over the rows.

    Args:
        logits: `(..., rows, V)`.
        top_k: tokens that count, 1 to V.

    Returns:
        `(...)` float32, between `ln top_k` and `23.03 * (top_k - 1) / top_k`.

    Raises:
        ValueError: `top_k` below 1 or above V.
    """
    return -(_top_probabilities(logits, top_k) + FLOOR).log().mean(-1).mean(-1)


def paper_confidence(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The formula of the paper: one minus the mean over the rows of `-sum p ln p` over the `top_k` likeliest tokens.

    Args:
        logits: `(..., rows, V)`.
        top_k: tokens that count, 1 to V.

    Returns:
        `(...)` float32, at most 1.

    Raises:
        ValueError: `top_k` below 1 or above V.
    """
    probabilities = _top_probabilities(logits, top_k)
    return 1 + (probabilities * (probabilities + FLOOR).log()).sum(-1).mean(-1)


def _top_probabilities(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k={top_k} must be between 1 and the size of the vocabulary, {vocabulary}")
    return logits.float().softmax(-1).topk(top_k, dim=-1).values


REWARDS: dict[str, SearchReward] = {
    "confidence": SearchReward(confidence, "thoughts"),
    "published_confidence": SearchReward(published_confidence, "thoughts_and_end"),
    "paper_confidence": SearchReward(paper_confidence, "thoughts"),
    "answer_entropy": SearchReward(confidence, "answer"),
}

__all__ = [
    "REWARDS",
    "REWARD_ROWS",
    "SearchReward",
    "confidence",
    "paper_confidence",
    "published_confidence",
]
