"""Answers of a teacher and where it looks by its attention: the signals that LaViT distils (arXiv 2601.10129).

A padded batch is run once: concept and attention come from the same forward. The prompts are padded on the right, so
the causal mask alone keeps padding out, and fused attention stays on in all layers. Beside it the weights of the
needed rows are worked out, some at a time, and added up at once; nothing of size `length x length` is allocated.

The other way, by gradients, is in `teacher_gradients.py` and `teacher_steps.py`; its names are here, too.

Example:
    ```python
    texts = generate_answers(teacher, processor, images, questions)
    for signals in capture_attention(teacher, processor, images, questions, texts):
        signals.concept.mean(0), signals.attention, signals.grid
    ```
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent.latent_attention import capture_attention_rows

from .teacher_gradients import capture_gradient
from .teacher_parts import (
    CapturedSignals,
    TeacherBatch,
    concept_at,
    encode_batch,
    end_of_turn,
    observed_residuals,
    reading,
    teacher_prompt,
    topk_indices,
)
from .teacher_steps import (
    AGGREGATIONS,
    STEP_SYSTEM_MESSAGE,
    GradientOptions,
    aggregate_tokens,
    gradient_prompts,
    split_steps,
)

ROWS = ("after_image", "answer")
_ROWS_AT_ONCE = 128  # query rows whose weights exist at a time


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 1024,
    repetition_penalty: float = 1.05,
    system_message: str | None = None,
    with_image: bool = True,
) -> list[str]:
    """What the teacher says, greedily, one batch; the text without special tokens.

    Args:
        model: the teacher: a stock or latent class of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Chameleon. A latent class
            answers without latents.
        processor: its processor.
        images: one a question.
        questions: what the user says behind the image.
        max_new_tokens: budget of an answer.
        repetition_penalty: over prompt and answer; 1.0 for none.
        system_message: of the system turn; `None` for what the template says by itself.
        with_image: `False` asks without the image (can the question be answered blindly?).

    Raises:
        ValueError: other numbers of images than of questions.
    """
    _check_counts(images=images, questions=questions)
    if not questions:
        return []
    prompts = [
        teacher_prompt(processor, question, system_message=system_message, with_image=with_image)
        for question in questions
    ]
    batch = encode_batch(model, processor, prompts, images if with_image else None, padding_side="left")
    with reading(model) as head:
        sequences = model.generate(
            **batch.inputs,
            attention_mask=batch.mask,
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            do_sample=False,
            num_beams=1,
            **({"latent_strategy": "off"} if hasattr(head, "latent_step") else {}),
        )
    written = sequences[:, batch.mask.shape[1] :]
    return processor.batch_decode(written, skip_special_tokens=True)


@torch.no_grad()
def capture_attention(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    *,
    num_layers: int | None = 8,
    rows: str = "after_image",
    system_message: str | None = None,
) -> list[CapturedSignals]:
    """Concept and attention of a batch, in one forward (section 5.3 of the method card).

    `scores` is the attention to each image token, averaged over layers, heads and query rows; `attention` is that
    brought to 0..1: `(scores - min) / (max - min + 1e-10)`.

    Args:
        model: the teacher: a stock or latent class of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Chameleon, in any precision.
            Load it with SDPA or flash attention; it is left as it was.
        processor: its processor.
        images: one a question.
        questions: what the user says behind the image.
        answers: the teacher's answer to each, or its pieces, which are joined by newlines.
        num_layers: the last so many layers (fewer where there are fewer); `None` for all.
        rows: query rows: `"after_image"` (published), all behind the image, the end of the turn included, or
            `"answer"`, the tokens of the answer alone. Without any, the last row of the prompt.
        system_message: of the system turn; `None` for what the template says by itself.

    Returns:
        One [`CapturedSignals`] a sample. The concept cannot depend on question or answer: both come after the image.

    Raises:
        ValueError: an unknown option, numbers of samples that differ, image tokens in a text, or a template whose
            answer does not stand behind the opening of the reply (`rows="answer"`).
    """
    _check_counts(images=images, questions=questions, answers=answers)
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r} is unknown; choose one of {list(ROWS)}")
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"num_layers={num_layers!r} must be at least 1, or None for all layers")
    if not questions:
        return []
    texts = [answer if isinstance(answer, str) else "\n".join(answer) for answer in answers]
    prompts = [
        teacher_prompt(processor, question, text, system_message=system_message)
        for question, text in zip(questions, texts, strict=True)
    ]
    batch = encode_batch(model, processor, prompts, images)
    if rows == "after_image":
        spans = [
            (int(places[-1]) + 1, length) for places, length in zip(batch.image_index, batch.lengths, strict=True)
        ]
    else:
        openings = [teacher_prompt(processor, question, system_message=system_message) for question in questions]
        spans = _answer_spans(processor, batch, openings, prompts)
    index, kept = _padded_rows(spans, batch.lengths, model.device)
    with reading(model) as head, observed_residuals(head) as residuals:
        scores = _mean_attention(head, batch, index, kept, num_layers)
    return [
        CapturedSignals(
            concept=concept_at(residuals[0][row], places),
            attention=_to_unit_range(scores[row][places]).cpu(),
            scores=scores[row][places].cpu(),
            grid=grid,
        )
        for row, (places, grid) in enumerate(zip(batch.image_index, batch.grids, strict=True))
    ]


def _check_counts(**samples: Sequence) -> None:
    counts = {name: len(values) for name, values in samples.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"one image, question and answer a sample: {counts}; pass lists of the same length")


def _answer_spans(
    processor: ProcessorMixin, batch: TeacherBatch, openings: Sequence[str], prompts: Sequence[str]
) -> list[tuple[int, int]]:
    """First position of each answer, and the one behind its last token.

    Raises:
        ValueError: a template that opens a reply in another way than it writes an answer.
    """
    tokenizer, spans = processor.tokenizer, []
    behind = len(tokenizer(end_of_turn(processor), add_special_tokens=False).input_ids)
    for row, (opening, prompt) in enumerate(zip(openings, prompts, strict=True)):
        if not prompt.startswith(opening):
            raise ValueError(
                f"row {row}: the chat template writes something before an answer that a prompt does not end with, so "
                "its tokens cannot be told apart; use rows='after_image'"
            )
        before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (opening, prompt))
        common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        length = batch.lengths[row]
        spans.append((length - (len(whole) - common), length - behind))
    return spans


def _padded_rows(
    spans: Sequence[tuple[int, int]], lengths: Sequence[int], device: torch.device
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Query rows `(B, R)`, short ones filled up with their last row, and `(B, R)`, 1 at those that count."""
    spans = [span if span[1] > span[0] else (length - 1, length) for span, length in zip(spans, lengths, strict=True)]
    start, end = torch.tensor(spans, device=device).T.unsqueeze(-1)
    index = start + torch.arange(int((end - start).max()), device=device)
    return index.minimum(end - 1), (index < end).float()


class _ColumnSums(dict):
    """Of the weights of each layer, as they come, keeps the sum over heads and chosen rows: `(B, keys)`."""

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.kept = kept

    def __setitem__(self, layer: int, weights: torch.Tensor) -> None:
        super().__setitem__(layer, torch.einsum("bhrk,br->bk", weights, self.kept.to(weights.device)))


def _mean_attention(
    head: PreTrainedModel, batch: TeacherBatch, index: torch.LongTensor, kept: torch.Tensor, num_layers: int | None
) -> torch.Tensor:
    """`(B, L)` attention to each position, averaged over layers, heads and the chosen rows: one forward."""
    config = head.config.get_text_config()
    count = config.num_hidden_layers
    layers = list(range(count - min(num_layers or count, count), count))
    with ExitStack() as stack:
        captures = []
        for part, counted in zip(index.split(_ROWS_AT_ONCE, 1), kept.split(_ROWS_AT_ONCE, 1), strict=True):
            captured = stack.enter_context(capture_attention_rows(head, part, layers, gradients=False))
            captured.weights = _ColumnSums(counted)
            captures.append(captured)
        head.model(**batch.inputs, use_cache=False)
    sums = sum(weights.to(kept.device) for captured in captures for weights in captured.weights.values())
    return sums / (len(layers) * config.num_attention_heads * kept.sum(dim=1, keepdim=True))


def _to_unit_range(scores: torch.Tensor) -> torch.Tensor:
    """The smallest becomes 0 and the largest 1; all 0 when they are equal."""
    low, high = scores.aminmax()
    return (scores - low) / (high - low + 1e-10)


__all__ = [
    "AGGREGATIONS",
    "ROWS",
    "STEP_SYSTEM_MESSAGE",
    "CapturedSignals",
    "GradientOptions",
    "aggregate_tokens",
    "capture_attention",
    "capture_gradient",
    "generate_answers",
    "gradient_prompts",
    "split_steps",
    "teacher_prompt",
    "topk_indices",
]
