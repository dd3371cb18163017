"""Where a teacher looks by gradients: how much each image token changes the probability of what the teacher said.

Method: LaViT, arXiv 2601.10129 (section 5.3 of the method card). The teacher answers in steps; the text of one step is
a piece. For some tokens of a piece the negative log-likelihood is differentiated with respect to the image embeddings,
and the distributions of these tokens are put together. The image is encoded once, and a piece is run once: its tokens
are vector-Jacobian products on one graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .teacher_parts import (
    CapturedSignals,
    TeacherBatch,
    concept_at,
    encode_batch,
    observed_residuals,
    reading,
    teacher_prompt,
)
from .teacher_steps import SMALL, GradientOptions, aggregate_tokens, gradient_prompts


def capture_gradient(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    pieces: Sequence[str],
    options: GradientOptions | None = None,
) -> list[CapturedSignals]:
    """Where the teacher looks in each piece of its answer.

    Args:
        model: the teacher: a stock or latent class of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Chameleon, in any precision;
            it is left as it was. Nothing is kept for gradients of its weights.
        processor: its processor.
        image: the image.
        question: the question itself, without what `options.user_text` puts around it.
        pieces: the texts of the steps, e.g. of [`split_steps`].
        options: default [`GradientOptions`].

    Returns:
        One [`CapturedSignals`] a piece. The concept is that of the plain prompt, as in [`capture_attention`]: the
        system message of the steps stands before the image and would change it.

    Raises:
        ValueError: no pieces, or image tokens in a text.
    """
    if not pieces:
        raise ValueError("no pieces: the gradient method looks at what the teacher said; pass the steps of its answer")
    options = options or GradientOptions()
    texts = [teacher_prompt(processor, question), *gradient_prompts(processor, question, pieces, options)]
    batch = encode_batch(model, processor, texts, [image] * len(texts))
    with reading(model) as head:
        encoded = _encode_image(head, batch)
        end = int(batch.image_index[0][-1]) + 1
        with torch.no_grad(), observed_residuals(head) as residuals:
            head.model(**_row_inputs(batch, 0, end), mm_encoder_outputs={"image": encoded}, use_cache=False)
        concept = concept_at(residuals[0][0], batch.image_index[0])
        signals = []
        for row in range(2, len(texts)):
            start, end = batch.lengths[row - 1], batch.lengths[row]
            ids = batch.inputs["input_ids"][row, :end].tolist()
            chosen = _chosen_tokens(processor, ids, start, options)
            gradients = _token_gradients(head, batch, row, encoded, chosen, options.deep_stack)
            signals.append(_signals(gradients, [(each - 1, ids[each]) for each in chosen], concept, batch, options))
    return signals


def _chosen_tokens(processor: ProcessorMixin, ids: list[int], start: int, options: GradientOptions) -> list[int]:
    """Positions of the tokens of the span `[start, end)` that are differentiated; the last one where none is."""
    chosen: list[int] = []
    for position in range(start, min(len(ids), start + options.max_tokens_per_step), options.downsample):
        if len(chosen) == options.max_grad_calls_per_step:
            break
        text = processor.tokenizer.decode([ids[position]]) if options.skip_markup else ""
        if "<" not in text and ">" not in text:
            chosen.append(position)
    return chosen or [len(ids) - 1]


def _row_inputs(batch: TeacherBatch, row: int, end: int) -> dict[str, torch.Tensor]:
    """Ids, and what positions are worked out from, of the first tokens of one row."""
    inputs = {name: batch.inputs[name] for name in ("input_ids", "mm_token_type_ids") if name in batch.inputs}
    inputs = {name: value[row : row + 1, :end] for name, value in inputs.items()}
    if "image_grid_thw" in batch.inputs:
        inputs["image_grid_thw"] = batch.inputs["image_grid_thw"][row : row + 1]
    return inputs


@torch.no_grad()
def _encode_image(head: PreTrainedModel, batch: TeacherBatch) -> Any:
    """The image of the first row, which all rows have, as the image encoder returns it."""
    pixels = batch.inputs["pixel_values"]
    given = {"pixel_values": pixels[: len(pixels) // len(batch.grids)]}
    if "image_grid_thw" in batch.inputs:
        given["image_grid_thw"] = batch.inputs["image_grid_thw"][:1]
    return head.model.get_image_features(**given, return_dict=True)


def _as_leaves(encoded: Any, deep_stack: bool) -> tuple[Any, list[torch.Tensor]]:
    """The output of the image encoder with leaves in place of its features, and the leaves, each `(N, D)`."""

    def leaf(features: Any, wants_gradient: bool) -> Any:
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        rows = rows.detach().clone().requires_grad_(wants_gradient)
        if wants_gradient:
            leaves.append(rows)
        return rows.unsqueeze(0) if torch.is_tensor(features) else [rows]

    leaves: list[torch.Tensor] = []
    parts = {"pooler_output": leaf(encoded.pooler_output, True)}
    deep = encoded.get("deepstack_features")
    if deep is not None:
        parts["deepstack_features"] = [leaf(layer, deep_stack) for layer in deep]
    return type(encoded)(**parts), leaves


def _token_gradients(
    head: PreTrainedModel, batch: TeacherBatch, row: int, encoded: Any, chosen: list[int], deep_stack: bool
) -> torch.Tensor:
    """`(tokens, N)` mean over the channels of the absolute gradient of each token's negative log-likelihood."""
    inputs = _row_inputs(batch, row, batch.lengths[row])
    positions = torch.tensor(chosen, device=inputs["input_ids"].device)
    with torch.enable_grad():
        features, leaves = _as_leaves(encoded, deep_stack)
        output = head(**inputs, mm_encoder_outputs={"image": features}, logits_to_keep=positions - 1, use_cache=False)
        scores = output.logits[0].float().log_softmax(dim=-1)
        targets = inputs["input_ids"][0, positions].to(scores.device)
        losses = -scores.gather(1, targets.unsqueeze(1))[:, 0]
        found = []
        for index, loss in enumerate(losses):
            parts = torch.autograd.grad(loss, leaves, retain_graph=index + 1 < len(losses))
            channels = torch.cat([part.float() for part in parts], dim=-1)
            found.append(channels.abs().mean(dim=-1).cpu())
    return torch.stack(found)


def _signals(
    gradients: torch.Tensor,
    tokens: list[tuple[int, int]],
    concept: torch.Tensor,
    batch: TeacherBatch,
    options: GradientOptions,
) -> CapturedSignals:
    """The signals of one piece from its gradients `(tokens, N)`."""
    p = (gradients / options.tau).softmax(dim=-1)
    shifted = p + SMALL
    facts = {
        "max": gradients.amax(dim=-1),
        "mean": gradients.mean(dim=-1),
        "sum": gradients.sum(dim=-1),
        "entropy": -(shifted * shifted.log()).sum(dim=-1),
    }
    facts["strength"] = facts["max"] / (facts["sum"] + SMALL)
    attention = aggregate_tokens(
        p,
        facts["strength"],
        facts["entropy"],
        options.aggregation,
        attribution_threshold=options.attribution_threshold,
        min_entropy=options.min_entropy,
    )
    steps = [
        {"position": position, "token_id": token_id, **{name: float(values[i]) for name, values in facts.items()}}
        for i, (position, token_id) in enumerate(tokens)
    ]
    return CapturedSignals(concept, attention, None, batch.grids[0], steps, p)


__all__ = ["capture_gradient"]
