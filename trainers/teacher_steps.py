"""Options of the gradient method of LaViT's teacher (arXiv 2601.10129), the prompts of its steps, and how the tokens
of a step become one distribution (section 5.3 of the method card). `teacher_gradients.py` runs the model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import ProcessorMixin

from .teacher_parts import end_of_turn, teacher_prompt

AGGREGATIONS = ("weighted_by_strength", "simple_avg", "filter_by_threshold", "entropy_weighted")
STEP_SYSTEM_MESSAGE = (
    "Look at the image carefully and answer the question in exactly {num_steps} reasoning steps. Write each step "
    "between <step> and </step>, one observation a step, and no reasoning outside of these tags. After the last step "
    "write FINAL ANSWER: on a line of its own and below it nothing but the answer."
)
SMALL = 1e-10


@dataclass(frozen=True)
class GradientOptions:
    """Options of the gradient method; the defaults are those of the published builder.

    Args:
        tau: temperature of the softmax over image tokens.
        skip_markup: leave out tokens whose text contains `<` or `>`.
        downsample: look at every so many-th token of a piece.
        max_tokens_per_step: look at the first so many tokens of a piece, those left out included.
        max_grad_calls_per_step: differentiate at most so many.
        aggregation: one of `AGGREGATIONS`, see [`aggregate_tokens`].
        attribution_threshold: of `"filter_by_threshold"`.
        min_entropy: of `"entropy_weighted"`, in nats.
        deep_stack: Qwen3-VL: the features that enter behind the first layers count, too, as further channels. `False`
            takes those that enter at the bottom alone, as in the other families.
        system_message: of the prompts; `{num_steps}` becomes the number of pieces. `None` for what the template says
            by itself.
        user_text: what the user says behind the image; `{question}` becomes the question.

    Raises:
        ValueError: a value out of range; names option and value.
    """

    tau: float = 0.01
    skip_markup: bool = True
    downsample: int = 1
    max_tokens_per_step: int = 50
    max_grad_calls_per_step: int = 10
    aggregation: str = "weighted_by_strength"
    attribution_threshold: float = 0.1
    min_entropy: float = 0.5
    deep_stack: bool = False
    system_message: str | None = STEP_SYSTEM_MESSAGE
    user_text: str = "Question: {question}"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation)
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau!r} must be above 0")
        for name, low in (("downsample", 1), ("max_tokens_per_step", 0), ("max_grad_calls_per_step", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least {low}")
        if "{question}" not in self.user_text:
            raise ValueError(f"user_text={self.user_text!r} has no {{question}}, so the question would be lost")

    def system_message_for(self, num_steps: int) -> str | None:
        """The system message that asks for `num_steps` steps; for [`generate_answers`], too."""
        return None if self.system_message is None else self.system_message.replace("{num_steps}", str(num_steps))

    def user_text_for(self, question: str) -> str:
        """What the user says for a question; for [`generate_answers`], too."""
        return self.user_text.replace("{question}", question)


def split_steps(text: str, num_steps: int) -> list[str]:
    """The first `num_steps` steps of an answer, each as `<step>text</step>`; tags in any case, across lines.

    Raises:
        ValueError: fewer steps than asked for.

    Example:
        >>> split_steps("<step> a </step><STEP>b</STEP> c", 2)
        ['<step>a</step>', '<step>b</step>']
    """
    found = re.findall(r"<step>(.*?)</step>", text, re.DOTALL | re.IGNORECASE)
    if len(found) < num_steps:
        raise ValueError(
            f"the answer has {len(found)} <step> tags and {num_steps} steps are asked for; drop the sample, or ask "
            f"for fewer: {text[:200]!r}"
        )
    return [f"<step>{step.strip()}</step>" for step in found[:num_steps]]


def gradient_prompts(
    processor: ProcessorMixin, question: str, pieces: Sequence[str], options: GradientOptions | None = None
) -> list[str]:
    """The prompts with the first 0, 1, .. all pieces, each with one image token.

    Without pieces a prompt ends behind the user's turn, otherwise with the text of its last piece and the blanks that
    the template writes behind a turn: the end of turn itself is taken off.
    """
    options = options or GradientOptions()
    given = {"system_message": options.system_message_for(len(pieces)), "opens_reply": False}
    user, ending = options.user_text_for(question), end_of_turn(processor)
    blanks = ending[len(ending.rstrip()) :]
    prompts = [teacher_prompt(processor, user, **given)]
    for count in range(1, len(pieces) + 1):
        text = teacher_prompt(processor, user, "\n".join(pieces[:count]), **given)
        prompts.append(text.removesuffix(ending) + blanks)
    return prompts


def aggregate_tokens(
    p: torch.Tensor,
    strength: torch.Tensor,
    entropy: torch.Tensor,
    method: str = "weighted_by_strength",
    *,
    attribution_threshold: float = 0.1,
    min_entropy: float = 0.5,
) -> torch.Tensor:
    """One distribution `(N,)` from those of some tokens.

    Args:
        p: `(tokens, N)`.
        strength: `(tokens,)` largest gradient of a token, divided by the sum of its gradients.
        entropy: `(tokens,)` of each distribution, in nats.
        method: `"simple_avg"`: the mean. `"weighted_by_strength"`: weighted by it. `"filter_by_threshold"`: mean of
            those of at least `attribution_threshold`. `"entropy_weighted"`: of those of at least `min_entropy`,
            weighted by the softmax of their entropies. The last two take the plain mean where nothing passes.
        attribution_threshold, min_entropy: see `method`.

    Raises:
        ValueError: an unknown method.
    """
    check_aggregation(method)
    if method == "weighted_by_strength":
        return strength / (strength.sum() + SMALL) @ p
    if method == "filter_by_threshold":
        passing = strength >= attribution_threshold
        return p[passing].mean(dim=0) if passing.any() else p.mean(dim=0)
    passing = entropy >= min_entropy
    if method == "entropy_weighted" and passing.any():
        return entropy[passing].softmax(dim=0) @ p[passing]
    return p.mean(dim=0)


def check_aggregation(method: str) -> None:
    if method not in AGGREGATIONS:
        raise ValueError(f"aggregation={method!r} is unknown; choose one of {list(AGGREGATIONS)}")


__all__ = [
    "AGGREGATIONS",
    "SMALL",
    "STEP_SYSTEM_MESSAGE",
    "GradientOptions",
    "aggregate_tokens",
    "check_aggregation",
    "gradient_prompts",
    "split_steps",
]
