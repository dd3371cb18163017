"""Attention of slots and of the answer, from the rows that are needed (specification, section 6).

The clean context and reply are fed once behind the shared prompts, as known cells; the softmax is computed for the
slots' and the answer's rows alone (`modeling_latent/latent_attention.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modeling_latent import capture_attention_rows

from .cells import PATCH, SLOT, TEXT, Cell, Row, clean_row
from .contexts import CleanItem
from .edges import Layout
from .shared_prompts import SharedPrompts


@dataclass(frozen=True)
class ItemAttention:
    """Attention of one item; `L` layers, `h` heads, `N` latents, `n` image tokens; post-softmax, not renormalised.

    Args:
        latent_to_image: `(L, N, n)` mean over heads.
        latent_to_question: `(N,)` mean over layers and heads, the sink left out.
        answer_to_latents: `(N,)` mean over layers, heads and the ids of the reply.
        answer_heads: `(L, h)` mass of the reply on the latents, by head.
        answer_to_image: `(n,)` mean over layers, heads and ids.
        reads: mass of the reply on `image`, `slots`, `markers`, `question`, `sink` and `other`.
    """

    latent_to_image: torch.Tensor
    latent_to_question: torch.Tensor
    answer_to_latents: torch.Tensor
    answer_heads: torch.Tensor
    answer_to_image: torch.Tensor
    reads: dict[str, float]


@torch.no_grad()
def item_attentions(
    model: PreTrainedModel, shared: SharedPrompts, items: Sequence[CleanItem]
) -> list[ItemAttention | None]:
    """The attention of a batch of items behind their prompts, None for an item without latents or reply."""
    rows = [_with_reply(item, clean_row(item, shared.ids)) for item in items]
    width = max(len(row.cells) for row in rows)
    queries = [_queries(row, width) for row in rows]
    most = max((len(found) for found in queries), default=0)
    if not most:
        return [None] * len(items)
    index = torch.tensor([found + [width - 1] * (most - len(found)) for found in queries], device=model.device)
    with capture_attention_rows(model, index, gradients=False) as captured, shared.behind(rows) as fed:
        weights = torch.stack([captured.weights[layer] for layer in sorted(captured.weights)]).cpu()
        layout = fed.layout
    sink = _first(shared.mask)
    return [
        _of_item(weights[:, number, :, : len(queries[number])], row, layout, number, int(sink[number]))
        for number, row in enumerate(rows)
    ]


def _with_reply(item: CleanItem, row: Row) -> Row:
    reply = [Cell(token, row.next_offset + place, TEXT) for place, token in enumerate(item.reply_ids)]
    return Row((*row.cells, *reply), row.next_offset + len(reply))


def _queries(row: Row, width: int) -> list[int]:
    """Columns of the latents, then those of the text behind them; none without either."""
    start = width - len(row.cells)
    latents = [start + place for place, cell in enumerate(row.cells) if cell.kind in (SLOT, PATCH)]
    text = [start + place for place, cell in enumerate(row.cells)
            if cell.kind == TEXT and latents and start + place > latents[-1]]  # fmt: skip
    return [*latents, *text] if latents and text else []


def _of_item(weights: torch.Tensor, row: Row, layout: Layout, number: int, sink: int) -> ItemAttention | None:
    """From the rows `(L, h, queries, keys)` of one item."""
    count = sum(cell.kind in (SLOT, PATCH) for cell in row.cells)
    if not weights.shape[2]:
        return None
    images, latents = layout.images[number].cpu(), layout.latents[number].cpu()
    question, markers = layout.question[number].cpu(), layout.markers[number].cpu()
    slots, answer = weights[:, :, :count], weights[:, :, count:]
    mass = answer.mean(dim=(0, 1, 2))
    reads = {"image": mass[images].sum(), "slots": mass[latents].sum(), "markers": mass[markers].sum(),
             "question": mass[question].sum(), "sink": mass[sink]}  # fmt: skip
    reads = {name: float(value) for name, value in reads.items()}
    return ItemAttention(
        latent_to_image=slots[..., images].mean(dim=1),
        latent_to_question=slots[..., question].sum(dim=-1).mean(dim=(0, 1)),
        answer_to_latents=mass[latents],
        answer_heads=answer[..., latents].sum(dim=-1).mean(dim=-1),
        answer_to_image=mass[images],
        reads={**reads, "other": max(1.0 - sum(reads.values()), 0.0)},
    )


def _first(mask: torch.Tensor) -> torch.Tensor:
    """`(B,)` column of the first token."""
    return mask.argmax(dim=1).cpu()


__all__ = ["ItemAttention", "item_attentions"]
