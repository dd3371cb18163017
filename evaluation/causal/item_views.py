"""One item as a picture shows it: heat maps of its slots, what they say, and what the answer reads."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .card_data import ConditionResult, ItemView, SlotView
from .intervention_run import InterventionRun
from .item_attention import ItemAttention
from .slot_sources import ItemImages

VIEW_CONDITIONS = ("clean", "gauss_norm", "markers_only", "no_span", "shuffle_items", "shuffle_kv")
TOP_TOKENS = 5


@torch.no_grad()
def item_view(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    run: InterventionRun,
    index: int,
    attention: ItemAttention | None,
    images: ItemImages | None,
    conditions: Mapping[str, ConditionResult],
) -> ItemView:
    """The view of one item; `images` of the view are named `item<index>_<number>.png`.

    Args:
        model, processor: of the card.
        run: its items and answers.
        index: of the item.
        attention: of the item, None when it was not read.
        images: its image embeddings, for the grids.
        conditions: shown beside each other.
    """
    item, answers = run.items[index], run.answers[index]
    clean, grids = conditions["clean"], () if images is None else images.grids
    pictures = [f"item{index}_{number}.png" for number in range(len(item.record["images"]))]
    boxes = [[box["image"], *box["xyxy"]] for box in item.record.get("boxes") or ()]
    probs = {name: torch.tensor(result.option_log_probs[index]).softmax(dim=0).tolist()
             for name, result in conditions.items() if result.option_log_probs[index]}  # fmt: skip
    return ItemView(
        index=index,
        images=pictures,
        question=item.record["question"],
        answer=clean.texts[index],
        gold=answers.gold,
        correct=clean.correct[index],
        grids=list(grids),
        slots=_slots(model, processor, run, index, attention, grids),
        reads={} if attention is None else attention.reads,
        roi=boxes,
        options=list(answers.names),
        option_probs=probs,
        replies={name: result.texts[index] for name, result in conditions.items()},
    )


def _slots(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    run: InterventionRun,
    index: int,
    attention: ItemAttention | None,
    grids: tuple[tuple[int, int], ...],
) -> list[SlotView]:
    item = run.items[index]
    inputs, scale = item.inputs.float(), run.data.embedding_norm
    logits = model.head_logits(item.outputs.to(model.device, model.dtype)).float().cpu() if len(inputs) else inputs
    is_patch = [int(token) == run.ids.patch for token in item.ids[item.latent].tolist()]
    views, before = [], None
    for number, vector in enumerate(inputs):
        if is_patch[number]:
            continue
        tokens = _top(processor, logits[number]) if bool(item.has_output[number]) else []
        cosine = None if before is None else float(torch.cosine_similarity(vector, before, dim=0))
        heat = [] if attention is None else _heat(attention.latent_to_image[:, number].mean(dim=0), grids)
        views.append(SlotView(len(views) + 1, heat, tokens, float(vector.norm()) / scale, cosine))
        before = vector
    return views


def _top(processor: ProcessorMixin, logits: torch.Tensor) -> list[tuple[str, float]]:
    probs, ids = logits.softmax(dim=0).topk(min(TOP_TOKENS, len(logits)))
    texts = [processor.tokenizer.decode([token]) for token in ids.tolist()]
    return list(zip(texts, probs.tolist(), strict=True))


def _heat(weights: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> list[list[list[float]]]:
    """`(n,)` weights of the image tokens as one table for each image."""
    tables, start = [], 0
    for height, width in grids:
        stop = start + height * width
        tables.append(weights[start:stop].reshape(height, width).tolist())
        start = stop
    return tables


__all__ = ["VIEW_CONDITIONS", "item_view"]
