"""What both ways of reading a teacher share: its prompts, its batches, its image tokens and the signals.

Method: LaViT, arXiv 2601.10129. A prompt is the chat template around the image and the question, and behind it the
teacher's answer. Chameleon, whose published checkpoints have no template, is given the library's.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent.processing_latent_chameleon import LATENT_CHAT_TEMPLATE_CHAMELEON

_MODEL_INPUTS = ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")
_ANSWER = "@answer@"  # stands for an answer where only what follows it is wanted


@dataclass(frozen=True)
class CapturedSignals:
    """Signals of a teacher for one image and one text. `N` image tokens, row by row; teacher width `D`. On the CPU,
    in float32.

    Args:
        concept: `(N, D)` residual stream after the last decoder layer, before the final norm, at the image tokens.
        attention: `(N,)` where the teacher looks: for the attention method in 0..1 (smallest 0, largest 1), for the
            gradient method a distribution (sums to 1).
        scores: `(N,)` mean attention before it is brought to 0..1; `None` for the gradient method.
        grid: rows and columns of the image tokens.
        steps: gradient method, one entry for each token that was differentiated: `position` (whose next token it
            is), `token_id` (that next token), `max`, `mean` and `sum` of the gradient over the image tokens, `entropy`
            and `strength`.
        token_attention: gradient method, `(tokens, N)`, the distribution of each of these tokens.
    """

    concept: torch.Tensor
    attention: torch.Tensor
    scores: torch.Tensor | None
    grid: tuple[int, int]
    steps: list[dict[str, Any]] = field(default_factory=list)
    token_attention: torch.Tensor | None = None


@dataclass(frozen=True)
class TeacherBatch:
    """Texts and their images as a model takes them, padded on one side.

    Args:
        inputs: what the forward takes, without the mask.
        mask: `(B, L)`, 1 at tokens.
        image_index: `(N,)` positions of the image tokens, for each row.
        grids: rows and columns of the image tokens, for each row.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor
    image_index: list[torch.LongTensor]
    grids: list[tuple[int, int]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.mask.sum(dim=1).tolist()


# Prompts


def teacher_prompt(
    processor: ProcessorMixin,
    question: str,
    answer: str | None = None,
    *,
    system_message: str | None = None,
    with_image: bool = True,
    opens_reply: bool = True,
) -> str:
    """Text of a prompt, with one image token.

    Args:
        processor: of the teacher.
        question: what the user says behind the image.
        answer: what the teacher said; `None` leaves its turn out.
        system_message: of the system turn; `None` for what the template says by itself.
        with_image: put the image before the question.
        opens_reply: without an answer, end with the opening of the reply.
    """
    parts = [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": [{"type": "image"}, *parts] if with_image else parts}]
    if system_message is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_message}]})
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    given = {"add_generation_prompt": answer is None and opens_reply}
    if getattr(processor, "chat_template", None) is None:
        if not hasattr(processor, "image_seq_length"):
            raise ValueError(f"{type(processor).__name__} has no chat template; give it one (chat_template=...)")
        given["chat_template"] = LATENT_CHAT_TEMPLATE_CHAMELEON
    return processor.apply_chat_template(messages, tokenize=False, **given)


def end_of_turn(processor: ProcessorMixin) -> str:
    """What the template writes behind an answer, e.g. `"<|im_end|>\\n"`."""
    return teacher_prompt(processor, "", _ANSWER, with_image=False).rpartition(_ANSWER)[2]


# Batches


def encode_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Image.Image] | None,
    *,
    padding_side: str = "right",
) -> TeacherBatch:
    """Texts, each with its image, on the device of the model.

    Args:
        model: the teacher; its configuration and the precision of its image encoder are read.
        processor: its processor.
        texts: see [`teacher_prompt`].
        images: one a text, or `None` for texts without image token.
        padding_side: `"right"`, or `"left"` for `generate`.

    Raises:
        ValueError: a row whose image tokens are not those of its image.
    """
    given = {} if images is None else {"images": list(images)}
    if hasattr(processor, "return_for_text_completion"):
        given["return_for_text_completion"] = True  # Chameleon: the template writes the separators
    encoded = processor(text=list(texts), padding=True, padding_side=padding_side, return_tensors="pt", **given)
    head = head_of(model)
    encoded = encoded.to(model.device)
    inputs = {name: encoded[name] for name in _MODEL_INPUTS if name in encoded}
    token = head.config.image_token_id
    is_image = (inputs["input_ids"] == token) & encoded["attention_mask"].bool()
    if images is not None and hasattr(head.model, "vqmodel"):
        inputs["pixel_values"] = inputs["pixel_values"].to(head.model.vqmodel.dtype)
    if "image_grid_thw" in inputs:
        inputs.setdefault("mm_token_type_ids", is_image.int())
    grids = [] if images is None else _grids(head, processor, inputs)
    index = [row.nonzero()[:, 0] for row in is_image]
    for row, (places, (height, width)) in enumerate(zip(index, grids, strict=False)):
        if len(places) != height * width:
            raise ValueError(
                f"row {row} has {len(places)} image tokens (id {token}), and its image is {height} x {width} tokens; "
                "pass the processor of this model, and no image token in question or answer"
            )
    return TeacherBatch(inputs, encoded["attention_mask"], index, grids)


def _grids(head: nn.Module, processor: ProcessorMixin, inputs: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of each image: the merged grid of Qwen-VL, the square of Chameleon."""
    if "image_grid_thw" not in inputs:
        side = math.isqrt(processor.image_seq_length)
        return [(side, side)] * len(inputs["pixel_values"])
    merge = head.config.vision_config.spatial_merge_size
    return [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]


# Model


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The head class itself, without the wrapper of adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The head class in evaluation mode, without gradients of its parameters; all as it was afterwards.

    Qwen-VL keeps the offset of the positions of its last call; that, too, is put back.
    """
    head = head_of(model)
    modes = [(module, module.training) for module in head.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in head.parameters()]
    deltas = getattr(head.model, "rope_deltas", None)
    head.eval()
    head.requires_grad_(False)
    try:
        yield head
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        if hasattr(head.model, "rope_deltas"):
            head.model.rope_deltas = deltas


@contextmanager
def observed_residuals(head: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects, for each forward inside the context, what enters the final norm: `(B, L, D)`, the output of the last
    decoder layer."""
    states: list[torch.Tensor] = []
    norm = head.get_decoder().norm
    handle = norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach()))
    try:
        yield states
    finally:
        handle.remove()


def concept_at(states: torch.Tensor, places: torch.LongTensor) -> torch.Tensor:
    """`(N, D)` of one row `(L, D)`, in float32 on the CPU."""
    return states[places.to(states.device)].float().cpu()


def topk_indices(values: torch.Tensor, k: int) -> torch.LongTensor:
    """Indices of the `k` largest entries of `(N,)`, the largest first; all when there are fewer."""
    return values.topk(min(k, len(values))).indices


__all__ = [
    "CapturedSignals",
    "TeacherBatch",
    "concept_at",
    "encode_batch",
    "end_of_turn",
    "head_of",
    "observed_residuals",
    "reading",
    "teacher_prompt",
    "topk_indices",
]
