"""Results of conditions made by hand."""

from collections.abc import Sequence
from typing import Any

from evaluation.causal.card_data import ConditionResult


def condition(name: str, correct: Sequence[bool], **fields: Any) -> ConditionResult:
    """A condition with given right and wrong items; what is not given is the same everywhere."""
    count = len(correct)
    values: dict[str, Any] = {
        "family": "content", "regime": "live", "count": "clean", "applied": [True] * count,
        "answers": ["A" if right else "B" for right in correct], "texts": [""] * count,
        "gold_log_prob": [-1.0] * count, "gold_tokens": [2] * count, "option_log_probs": [None] * count,
        "first_token_kl": [0.0] * count, "first_token_js": [0.0] * count, "num_latent_steps": [3] * count,
        "num_spans": [1] * count, "forced_closed": [0] * count, "answer_tokens": [4] * count,
    }  # fmt: skip
    return ConditionResult(name=name, correct=list(correct), **{**values, **fields})
