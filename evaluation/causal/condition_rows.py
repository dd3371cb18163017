"""From the clean context of an item to what a condition feeds: edits of slots and of structure.

Regimes (specification, section 1): `frozen` replays all other slots from the clean trace; `live` works slots out again
from the first edited one on, from the edited past. Inserted image embeddings keep the choice of the clean run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from .cells import MARKER, PATCH, SLOT, TEXT, Cell, LatentIds, Row, closed_up
from .contexts import CleanItem
from .interventions import Intervention
from .slot_data import NotApplicable, SlotData
from .slot_edits import SLOT_EDITS, Feed


@dataclass(frozen=True)
class RowSettings:
    """What rows depend on beside the item.

    Args:
        ids: latent ids of the model.
        live: whether slots behind an edit are worked out again.
        feeds_back: whether the method feeds states back: learned tokens and searched vectors stay what they are.
        data: of all items.
    """

    ids: LatentIds
    live: bool
    feeds_back: bool
    data: SlotData

    @property
    def works_out(self) -> bool:
        """Whether slots are worked out again."""
        return self.live and self.feeds_back


def content_row(row: Row, item: int, intervention: Intervention, settings: RowSettings) -> Row:
    """A row with edited latents.

    Raises:
        NotApplicable: the item has no such latent, or not what the edit needs.
    """
    rule, data = SLOT_EDITS[intervention.rule], settings.data
    chosen = selected(row, item, intervention.select, data)
    if not chosen:
        raise NotApplicable(f"item {data.items[item].record['id']!r} has no latent to edit")
    feed = rule.make(data, item, *intervention.arguments)
    cells, number, edited = [], -1, False
    for cell in row.cells:
        if cell.kind in (SLOT, PATCH):
            number += 1
            edited = edited or number in chosen
            if number in chosen:
                cell = _edited(cell, number, feed, rule.reads_own, settings)
            elif edited and settings.works_out and cell.kind == SLOT:
                cell = replace(cell, vector=None, feedback=True)
        cells.append(cell)
    return Row(tuple(cells), row.next_offset)


def _edited(cell: Cell, number: int, feed: Feed, reads_own: bool, settings: RowSettings) -> Cell:
    if reads_own and settings.works_out and cell.kind == SLOT:
        return replace(cell, vector=None, feedback=True, edit=partial(_apply, feed, number))
    return replace(cell, vector=feed(number, cell.vector.float()))


def _apply(feed: Feed, number: int, own: torch.Tensor) -> torch.Tensor:
    return feed(number, own.float().cpu())


def selected(row: Row, item: int, select: str, data: SlotData) -> set[int]:
    """Numbers of the latents that a selection means.

    Raises:
        NotApplicable: the attention of the answer is not known for `top`.
    """
    latents = [cell for cell in row.cells if cell.kind in (SLOT, PATCH)]
    every = range(len(latents))
    if not select:
        return set(every)
    if select in ("hidden", "patches"):
        kind = SLOT if select == "hidden" else PATCH
        return {number for number in every if latents[number].kind == kind}
    name, _, value = select.partition("=")
    if name == "span":
        spans = [cell.span for cell in latents]
        span = {"first": min(spans, default=0), "last": max(spans, default=0)}.get(value)
        return {number for number in every if latents[number].span == (int(value) if span is None else span)}
    if name in ("top", "random"):
        if name == "random":
            scores = data.noise(item, -1, len(latents), "select")
        elif not data.attention or data.attention[item] is None:
            raise NotApplicable("the attention of the answer to the latents is not known")
        else:
            scores = data.attention[item]
        return set(scores.argsort(descending=True)[: int(value)].tolist())
    wanted = {int(part) for part in select.split(",")}
    return {number for number in every if latents[number].number in wanted}


def structure_row(
    row: Row, clean: CleanItem, intervention: Intervention, settings: RowSettings, filler: Sequence[int] = ()
) -> Row:
    """A row with another structure.

    Args:
        row: the clean row.
        clean: its item.
        intervention: of the family `"structure"`, not `force_span`.
        settings: see [`RowSettings`].
        filler: ids of the argument of `filler` and `format_only`.

    Raises:
        NotApplicable: the item has no span, or no markers.
    """
    name, cells = intervention.rule, list(row.cells)
    laid_out = [cell for cell in cells if cell.laid_out and cell.kind == TEXT]
    if name in ("no_span", "format_only"):
        written = [Cell(token, 0, laid_out=True) for token in filler] if name == "format_only" else []
        return closed_up(laid_out + written)
    if not any(cell.kind in (SLOT, PATCH, MARKER) for cell in cells):
        raise NotApplicable(f"item {clean.record['id']!r} has no span")
    has_markers = any(cell.kind == MARKER for cell in cells)
    if name in ("markers_only", "slots_only") and not has_markers:
        raise NotApplicable(f"the spans of item {clean.record['id']!r} have no markers")
    if name == "silent":
        return Row(tuple(cell for cell in cells if cell.kind not in (SLOT, PATCH)), row.next_offset)
    if name == "filler":
        return Row(tuple(_filled(cells, filler)), row.next_offset)
    if name == "slots_only":
        return _worked_out(closed_up(cell for cell in cells if cell.kind != MARKER), settings, 0)
    if name == "markers_only":
        return _with_counts(row, settings, lambda count: 0)
    number = int(intervention.arguments[0])
    counts = {"K": lambda count: number, "truncate": lambda count: min(number, count),
              "extend": lambda count: count + number}  # fmt: skip
    return _with_counts(row, settings, counts[name])


def _filled(cells: Sequence[Cell], filler: Sequence[int]) -> list[Cell]:
    """Ordinary tokens, one after the other, in place of the latents."""
    filled, count = [], 0
    for cell in cells:
        if cell.kind in (SLOT, PATCH):
            cell = Cell(filler[count % len(filler)], cell.offset, TEXT, cell.span, laid_out=True)
            count += 1
        filled.append(cell)
    return filled


def _with_counts(row: Row, settings: RowSettings, count_of: Callable[[int], int]) -> Row:
    """Every span with another number of slots; inserted image embeddings go with their slot, further slots have none.

    Slots that follow a changed span are worked out again in the live regime.
    """
    spans = sorted({cell.span for cell in row.cells if cell.span >= 0})
    kept: list[Cell] = []
    done: set[int] = set()
    changed_from = None
    for cell in row.cells:
        if cell.span < 0 or cell.kind == MARKER:
            kept.append(cell)
            if cell.kind == MARKER and cell.token == settings.ids.start and cell.span not in done:
                changed_from = _add_span(row, cell.span, settings, count_of, kept, changed_from)
                done.add(cell.span)
        elif cell.span not in done:  # a span without a start marker
            changed_from = _add_span(row, cell.span, settings, count_of, kept, changed_from)
            done.add(cell.span)
    if set(spans) != done:
        raise NotApplicable("a span has no slot and no marker")
    changed = closed_up(kept)
    return changed if changed_from is None else _worked_out(changed, settings, changed_from)


def _add_span(
    row: Row,
    span: int,
    settings: RowSettings,
    count_of: Callable[[int], int],
    kept: list[Cell],
    changed_from: int | None,
) -> int | None:
    """Append the latents of a span; returns from which cell on the past is another one."""
    latents = [cell for cell in row.cells if cell.span == span and cell.kind in (SLOT, PATCH)]
    numbers = list(dict.fromkeys(cell.number for cell in latents))
    wanted = count_of(len(numbers))
    keep = set(numbers[:wanted])
    kept += [cell for cell in latents if cell.number in keep]
    further = wanted - len(keep)
    if further > 0 and not settings.feeds_back:
        raise NotApplicable("the method has no further latents: they are learned tokens or searched vectors")
    kept += [Cell(settings.ids.slot, 0, SLOT, span, -1, None, feedback=True) for _ in range(further)]
    changed = wanted != len(numbers)
    return len(kept) if changed and changed_from is None else changed_from


def _worked_out(row: Row, settings: RowSettings, first: int) -> Row:
    """The row with its slots from cell `first` on worked out again, in the live regime."""
    if not settings.works_out:
        return row
    cells = [
        replace(cell, vector=None, feedback=True) if place >= first and cell.kind == SLOT else cell
        for place, cell in enumerate(row.cells)
    ]
    return Row(tuple(cells), row.next_offset)


def live_row(row: Row, settings: RowSettings) -> Row:
    """The clean row with every slot worked out again (under a mask, in the live regime)."""
    return _worked_out(row, settings, 0)


__all__ = ["RowSettings", "content_row", "live_row", "selected", "structure_row"]
