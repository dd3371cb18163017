"""Runs beside the clean one: items asked anew with an edit of their input, a forced span, or slots edited as they are
decoded while the stop rule acts (`count="free"`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent import LatentStep
from modeling_latent.latent_strategies import get_latent_strategy
from trainers.data.records import Record

from ..benchmarks.benchmark import AskProtocol
from ..runner import with_images
from .contexts import CleanItem, clean_items
from .input_edits import edited_record
from .interventions import Intervention
from .slot_data import NotApplicable, SlotData
from .slot_edits import SLOT_EDITS, Feed

Ask = Callable[..., list[CleanItem]]  # (records, **options) -> items


def asker(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    protocol: AskProtocol,
    batch_size: int,
    max_new_tokens: int | None,
    options: dict[str, Any],
) -> Ask:
    """[`clean_items`] with the settings of a card; options of a call win."""

    def ask(records: Sequence[Record], **further: Any) -> list[CleanItem]:
        given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, **options, **further}
        return clean_items(model, processor, records, protocol, **given)

    return ask


def edited_items(
    ask: Ask, processor: ProcessorMixin, records: Sequence[Record], each: Intervention, data: SlotData
) -> tuple[list[CleanItem | None], str]:
    """The items of an input edit, None where it does not apply, and the first reason for that."""
    edited, places, reason = [], [], ""
    for place, record in enumerate(records):
        donor = data.donors[place]
        other = records[donor] if donor >= 0 else None
        try:
            edited.append(with_images(edited_record(each.rule, record, data.seed, each.arguments, other), processor))
            places.append(place)
        except NotApplicable as error:
            reason = reason or str(error)
    found: list[CleanItem | None] = [None] * len(records)
    for place, item in zip(places, ask(edited) if edited else [], strict=True):
        found[place] = item
    return found, reason


class EditHook:
    """A trace hook that edits the slots of a batch of items as they are decoded.

    Args:
        feeds: of each row an edit, None for a row that stays as it is.
        most: of each row the number of latents of its clean run: a further slot gets the edit of the last one.
    """

    def __init__(self, feeds: Sequence[Feed | None], most: Sequence[int]) -> None:
        self.feeds, self.most = feeds, most
        self.numbers = [0] * len(feeds)

    def __call__(self, step: LatentStep) -> torch.Tensor:
        """`(R, H)` vectors to feed."""
        vectors = step.latent.clone()
        for row in step.is_slot.nonzero()[:, 0].tolist():
            feed, number = self.feeds[row], self.numbers[row]
            self.numbers[row] += 1
            if feed is not None:
                number = min(number, max(self.most[row] - 1, 0))
                vectors[row] = feed(number, vectors[row].float().cpu()).to(vectors)
        return vectors


def free_items(
    ask: Ask, records: Sequence[Record], each: Intervention, data: SlotData, batch_size: int
) -> tuple[list[CleanItem | None], str]:
    """The items of a content edit with free spans: the stop rule of the strategy reads the edited past."""
    found: list[CleanItem | None] = []
    why = ""
    for first in range(0, len(records), batch_size):
        part = range(first, min(first + batch_size, len(records)))
        feeds: list[Feed | None] = []
        for index in part:
            try:
                feeds.append(SLOT_EDITS[each.rule].make(data, index, *each.arguments))
            except NotApplicable as reason:
                feeds.append(None)
                why = why or str(reason)
        hook = EditHook(feeds, [len(data.items[index].inputs) for index in part])
        items = ask([records[index] for index in part], latent_hook=hook, batch_size=batch_size)
        found += [None if feed is None else item for feed, item in zip(feeds, items, strict=True)]
    return found, why


def check_free(strategy: str, interventions: Sequence[Intervention]) -> None:
    """Refuse `count="free"` where no stop rule acts.

    Raises:
        ValueError: names the strategy, or the intervention.
    """
    if not get_latent_strategy(strategy).opens_span:
        raise ValueError(
            f"count='free' with latent_strategy={strategy!r}, whose slots are laid out: no stop rule acts; use "
            "count='clean'"
        )
    chosen = [each.name for each in interventions if each.select]
    if chosen:
        raise ValueError(f"count='free' with {chosen}: a selection counts the latents of the clean run; leave it out")


def donors_of_runs(
    ask: Ask, processor: ProcessorMixin, records: Sequence[Record], data: SlotData, needed: set[str]
) -> dict[str, list[torch.Tensor | None]]:
    """Latents of further runs of the same items, for edits that feed them: on another image, on the other view of a
    pair, or where a search starts."""
    edits = {"other_image": Intervention("swap_image", "input", "swap_image"),
             "cf_donor": Intervention("counterfactual", "input", "counterfactual")}  # fmt: skip
    runs: dict[str, list[torch.Tensor | None]] = {}
    for name in needed & set(edits):
        items, _ = edited_items(ask, processor, records, edits[name], data)
        runs[name] = [None if item is None else item.inputs for item in items]
    if "initial" in needed:
        runs["initial"] = [item.inputs for item in ask(records, max_num_steps=0)]
    return runs


__all__ = ["Ask", "EditHook", "asker", "check_free", "donors_of_runs", "edited_items", "free_items"]
