"""What a condition feeds behind the shared prefix of an item: a list of cells, one a position."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .contexts import CleanItem, ContextSpan

SlotEdit = Callable[[torch.Tensor], torch.Tensor]  # `(H,)` what would be fed -> `(H,)` what is fed

SLOT, PATCH, MARKER, TEXT = "slot", "patch", "marker", "text"


@dataclass(frozen=True, slots=True)
class Cell:
    """One position of a context.

    Args:
        token: id that it carries.
        offset: rotary position, counted from the first one behind the prefix.
        kind: `"slot"`, `"patch"` (an inserted image embedding), `"marker"` or `"text"`.
        span: number of its span, -1 outside.
        number: of a slot, its number from 0 over all spans of the item; of a patch, that of its block's slot.
        vector: `(H,)` fed in place of the token's embedding, None for the embedding, or with `feedback`.
        feedback: a slot that is fed the model's own state before its block, worked out as it is decoded.
        edit: what is done to that state first.
        laid_out: whether the prompt or the strategy put it there; the model wrote the others.
    """

    token: int
    offset: int
    kind: str = TEXT
    span: int = -1
    number: int = -1
    vector: torch.Tensor | None = None
    feedback: bool = False
    edit: SlotEdit | None = None
    laid_out: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The context of one item under one condition.

    Args:
        cells: in order.
        next_offset: rotary position of the first id of the reply.
    """

    cells: tuple[Cell, ...]
    next_offset: int

    @property
    def needs_feedback(self) -> bool:
        """Whether a slot has to be worked out."""
        return any(cell.feedback for cell in self.cells)


class LatentIds(NamedTuple):
    """The ids of a model that carry latents or mark spans, -1 for those that it has not."""

    slot: int
    patch: int
    start: int
    end: int
    learned: tuple[int, ...]

    @classmethod
    def of(cls, config: object) -> "LatentIds":
        """From a configuration."""
        names = ("latent_token_id", "latent_patch_token_id", "latent_start_token_id", "latent_end_token_id")
        found = [getattr(config, name, None) for name in names]
        ids = [-1 if token is None else token for token in found]
        return cls(*ids, tuple(getattr(config, "latent_learned_token_ids", None) or ()))


def clean_row(item: CleanItem, ids: LatentIds) -> Row:
    """The context as the clean run fed it: frozen vectors."""
    cells, latent, number = [], 0, -1
    span_of = _span_of(item.spans, len(item.ids))
    tokens, offsets, mask = item.ids.tolist(), item.offsets.tolist(), item.latent.tolist()
    blocks = _numbers(tokens, mask, ids.patch)
    for place, (token, offset, fed) in enumerate(zip(tokens, offsets, mask, strict=True)):
        kind, vector = TEXT, None
        if fed:
            kind, vector, number = (PATCH if token == ids.patch else SLOT), item.inputs[latent], blocks[place]
            latent += 1
        elif token in (ids.start, ids.end) and span_of[place] >= 0:
            kind = MARKER
        laid_out = place < item.laid_out
        cells.append(Cell(token, offset, kind, span_of[place], number if fed else -1, vector, laid_out=laid_out))
    return Row(tuple(cells), offsets[-1] + 1 if offsets else 0)


def _numbers(tokens: Sequence[int], latent: Sequence[bool], patch: int) -> list[int]:
    """Number of the slot of each latent; a patch belongs to the next slot of its run, else to the one before it."""
    numbers, count = [-1] * len(tokens), 0
    for place, (token, fed) in enumerate(zip(tokens, latent, strict=True)):
        if fed:
            numbers[place] = count
            count += token != patch
    total = max(count, 1)
    return [min(number, total - 1) for number in numbers]


def _span_of(spans: Iterable[ContextSpan], length: int) -> list[int]:
    """Number of the span of each position, its markers included; -1 outside."""
    found = [-1] * length
    for number, span in enumerate(spans):
        places = [*range(span.first, span.first + span.length), span.start, span.end]
        for place in places:
            if 0 <= place < length:
                found[place] = number
    return found


def slots_of(row: Row) -> list[Cell]:
    """The slots of a row, inserted image embeddings left out."""
    return [cell for cell in row.cells if cell.kind == SLOT]


def latents_of(row: Row) -> list[Cell]:
    """Slots and inserted image embeddings."""
    return [cell for cell in row.cells if cell.kind in (SLOT, PATCH)]


def closed_up(cells: Iterable[Cell]) -> Row:
    """A row whose positions follow each other without a gap."""
    placed = tuple(replace(cell, offset=place) for place, cell in enumerate(cells))
    return Row(placed, len(placed))


__all__ = [
    "MARKER",
    "PATCH",
    "SLOT",
    "TEXT",
    "Cell",
    "LatentIds",
    "Row",
    "SlotEdit",
    "clean_row",
    "closed_up",
    "latents_of",
    "slots_of",
]
