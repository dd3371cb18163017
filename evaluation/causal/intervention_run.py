"""Interventions run over the items of a clean run: batch by batch, all conditions behind prompts that are run once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..benchmarks.benchmark import AskProtocol
from ..runner import Prediction
from .answering import ItemAnswers
from .card_data import ConditionResult
from .cells import MARKER, PATCH, SLOT, LatentIds, Row, clean_row
from .condition_rows import RowSettings, content_row, live_row, structure_row
from .contexts import CleanItem
from .interventions import Intervention
from .layer_states import decoder_layers
from .shared_prompts import Fed, SharedPrompts
from .slot_data import NotApplicable, SlotData

CLEAN = Intervention("clean", "clean", "clean")


@dataclass
class Measured:
    """One item under one condition."""

    reply: list[int]
    row: Row
    gold: float | None = None
    options: list[float] | None = None
    first: torch.Tensor | None = None  # (V,) log-probabilities of the first id of the content
    divergences: tuple[float | None, float | None] = (None, None)  # KL and JS from the clean run there


@dataclass
class InterventionRun:
    """Everything that the conditions of a card share.

    Args:
        model: a latent model in eval mode.
        processor: its processor.
        items: the clean run.
        answers: gold replies and options of the items.
        protocol: how they were asked and are scored.
        data: what edits draw on.
        regime: `"live"` or `"frozen"`.
        feeds_back: whether the method feeds states back.
        batch_size: items that are run together.
        scores: whether replies are teacher-forced too (gold, options, KL).
        fillers: from the argument of `filler` or `format_only` to ids.
        progress: show a progress bar.
        left_out: the first reason why a condition left an item out, by its name; filled as they come up.
        further: items that were asked anew, by the name of the condition.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    items: Sequence[CleanItem]
    answers: Sequence[ItemAnswers]
    protocol: AskProtocol
    data: SlotData
    regime: str = "live"
    feeds_back: bool = True
    batch_size: int = 16
    scores: bool = True
    fillers: Callable[[str], list[int]] | None = None
    progress: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    further: dict[str, Sequence[CleanItem | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = LatentIds.of(self.model.config)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.settings = RowSettings(self.ids, self.regime == "live", self.feeds_back, self.data)
        self.banned = [self.ids.slot, self.ids.patch, self.ids.start, *self.ids.learned]

    def run(self, interventions: Sequence[Intervention]) -> dict[str, ConditionResult]:
        """The clean condition and all others, in order; those that are in `further` read their items there."""
        conditions = [CLEAN, *interventions]
        found: dict[str, list[Measured | None]] = {each.name: [] for each in conditions}
        self._layer_means(conditions)
        steps = range(0, len(self.items), self.batch_size)
        for first in tqdm(steps, desc="interventions", disable=not self.progress):
            part = range(first, min(first + self.batch_size, len(self.items)))
            for name, measured in self._run_batch(part, conditions).items():
                found[name] += measured
        return {each.name: self._result(each, found[each.name], found["clean"]) for each in conditions}

    # One batch

    def _run_batch(self, part: range, conditions: Sequence[Intervention]) -> dict[str, list[Measured | None]]:
        shared = self.shared([self.items[index] for index in part])
        clean = self._measure(shared, part, [self._clean_row(index) for index in part])
        found: dict[str, list[Measured | None]] = {CLEAN.name: list(clean)}
        for each in conditions[1:]:
            measured = self._condition(shared, part, each)
            found[each.name] = [_against(own, base) for own, base in zip(measured, clean, strict=True)]
        for base in clean:
            base.first = None
        return found

    def shared(self, items: Sequence[CleanItem], edges: Sequence[Any] = ()) -> SharedPrompts:
        """The prompts of some items, run."""
        images = [item.record["images"] for item in items]
        pictures = {"images": images} if any(images) else {}
        inputs = self.processor(
            text=[item.prompt for item in items], **pictures, padding=True, padding_side="left", return_tensors="pt",
            **self.protocol.processor_options,
        ).to(self.model.device)  # fmt: skip
        return SharedPrompts(self.model, inputs, [item.prefix for item in items], edges)

    def _clean_row(self, index: int) -> Row:
        return clean_row(self.items[index], self.ids)

    def _condition(self, shared: SharedPrompts, part: range, each: Intervention) -> list[Measured | None]:
        if each.name in self.further:
            return self._asked_anew(part, each)
        if each.family == "graft":
            return self._grafted(part, each)
        rows, applied = [], []
        for index in part:
            row, edit = self._clean_row(index), None
            try:
                edit = self._row(row, index, each)
            except NotApplicable as reason:
                self.left_out.setdefault(each.name, str(reason))
            rows.append(row if edit is None else edit)
            applied.append(edit is not None)
        if not any(applied):
            return [None] * len(part)
        edges = each.cut_edges(len(decoder_layers(self.model))) if each.edges else ()
        if any(edge.in_prefix for edge in edges):
            shared = self.shared([self.items[index] for index in part], edges)
        states = self._states(part, each) if each.family == "state" else None
        measured = self._measure(shared, part, rows, edges, states)
        return [own if is_applied else None for own, is_applied in zip(measured, applied, strict=True)]

    def _row(self, row: Row, index: int, each: Intervention) -> Row:
        """What a condition feeds for an item.

        Raises:
            NotApplicable: the item does not allow it.
        """
        if each.family == "content":
            return content_row(row, index, each, self.settings)
        if each.family == "structure":
            filler = self.fillers(str(each.arguments[0])) if each.rule in ("filler", "format_only") else ()
            return structure_row(row, self.items[index], each, self.settings, filler)
        if not any(cell.kind in (SLOT, PATCH, MARKER) for cell in row.cells):
            raise NotApplicable(f"item {self.items[index].record['id']!r} has no span")
        recomputes = any(queries in ("L", "Q") for queries, _, _ in each.edges)
        return live_row(row, self.settings) if recomputes else row

    # Measuring

    def _measure(
        self,
        shared: SharedPrompts,
        part: Iterable[int],
        rows: Sequence[Row],
        edges: Sequence[Any] = (),
        states: Sequence[torch.Tensor | None] | None = None,
        items: Sequence[CleanItem] | None = None,
    ) -> list[Measured]:
        answers = [self.answers[index] for index in part]
        items = [self.items[index] for index in part] if items is None else items
        starts = [answer.reply.start for answer in answers if answer.reply is not None]
        with shared.behind(rows, edges, min(starts, default=0), states) as fed:
            return self._read(shared, fed, rows, items, answers)

    def _read(
        self,
        shared: SharedPrompts,
        fed: Fed,
        rows: Sequence[Row],
        items: Sequence[CleanItem],
        answers: Sequence[ItemAnswers],
    ) -> list[Measured]:
        budgets = [self._budget(item, row) for item, row in zip(items, rows, strict=True)]
        replies = shared.decode(fed, budgets, self.ends, self.banned)
        measured = [Measured(reply, row) for reply, row in zip(replies, rows, strict=True)]
        if not self.scores:
            return measured
        golds, first = _log_probs(shared, fed, [answer.reply for answer in answers])
        most = max((len(answer.options) for answer in answers), default=0)
        columns = [
            _log_probs(shared, fed, [_nth(answer.options, number) for answer in answers])[0] for number in range(most)
        ]
        for row, (own, answer) in enumerate(zip(measured, answers, strict=True)):
            own.gold = golds[row]
            own.first = first[row].cpu() if answer.reply is not None else None
            if answer.options:
                own.options = [columns[number][row] for number in range(len(answer.options))]
        return measured

    def _budget(self, item: CleanItem, row: Row) -> int:
        """A reply has what the clean one has; where the model's own text in front of a span is gone, that too."""
        written = len(item.ids) - item.laid_out
        has_span = any(cell.kind in (SLOT, PATCH, MARKER) for cell in row.cells)
        return item.budget + (0 if has_span or not item.spans else max(written, 0))

    # Items that are asked anew

    def _asked_anew(self, part: range, each: Intervention) -> list[Measured | None]:
        items = [self.further[each.name][index] for index in part]
        known = [place for place, item in enumerate(items) if item is not None]
        found: list[Measured | None] = [None] * len(items)
        if known:
            present = [items[place] for place in known]
            rows = [clean_row(item, self.ids) for item in present]
            measured = self._measure(self.shared(present), [part[place] for place in known], rows, items=present)
            for place, own in zip(known, measured, strict=True):
                found[place] = own
        return found

    def _grafted(self, part: range, each: Intervention) -> list[Measured | None]:
        """Slots from the own image, then another item's image in its place."""
        found: list[Measured | None] = []
        for index in part:
            try:
                found.append(self._graft(index))
            except (NotApplicable, ValueError) as reason:
                self.left_out.setdefault(each.name, str(reason))
                found.append(None)
        return found

    def _graft(self, index: int) -> Measured:
        item, row = self.items[index], self._clean_row(index)
        last = max((place for place, cell in enumerate(row.cells) if cell.kind in (SLOT, PATCH)), default=-1)
        donor = self.data.donors[index]
        if last < 0 or donor < 0:
            raise NotApplicable(f"item {item.record['id']!r} has no latents, or there is no other item")
        images = self.items[donor].record["images"]
        other = replace(item, record={**item.record, "images": images})
        shared, graft = self.shared([item]), self.shared([other])
        head, tail = (
            Row(row.cells[: last + 1], row.cells[last].offset + 1),
            Row(row.cells[last + 1 :], row.next_offset),
        )
        with shared.behind([head]) as fed, shared.grafted(graft):
            fed = shared.extend(fed, [tail])
            fed.next_offset = torch.tensor([row.next_offset], device=shared.device)
            return self._read(shared, fed, [row], [item], [self.answers[index]])[0]

    # States of the layers

    def _layer_means(self, conditions: Sequence[Intervention]) -> None:
        """Outputs of the layers at the latents of all items, for conditions that put others in their place."""
        self._layers: list[torch.Tensor] = []
        if not any(each.family == "state" for each in conditions):
            return
        for first in range(0, len(self.items), self.batch_size):
            items = self.items[first : first + self.batch_size]
            self._layers += self.shared(items).layer_states([clean_row(item, self.ids) for item in items])

    def _states(self, part: range, each: Intervention) -> list[torch.Tensor | None]:
        return [self._state(index, each) for index in part]

    def _state(self, index: int, each: Intervention) -> torch.Tensor | None:
        own = self._layers[index]
        if not own.shape[1]:
            return None
        if each.rule == "zero_kv":
            return torch.zeros_like(own)
        alike = [other for place, other in enumerate(self._layers) if place != index and other.shape == own.shape]
        if each.rule == "mean_kv":
            return torch.stack(alike).mean(dim=0) if alike else None
        donor = self._layers[self.data.donors[index]] if self.data.donors[index] >= 0 else own[:, :0]
        if not donor.shape[1]:
            return None
        places = torch.arange(own.shape[1]).clamp(max=donor.shape[1] - 1)
        return donor[:, places]

    # Results

    def _result(
        self, each: Intervention, measured: Sequence[Measured | None], clean: Sequence[Measured]
    ) -> ConditionResult:
        result = ConditionResult(each.name, each.family, self.regime, "clean", *([] for _ in range(13)))
        for index, (own, base) in enumerate(zip(measured, clean, strict=True)):
            self._add(result, index, base if own is None else own, own is not None)
        return result

    def _add(self, result: ConditionResult, index: int, own: Measured, applied: bool) -> None:
        item, answer = self.items[index], self.answers[index]
        scored = self.protocol.score(item.record, self.prediction(item, own))
        values: Mapping[str, Any] = {
            "applied": applied,
            "correct": bool(scored.correct),
            "answers": scored.answer,
            "texts": self.prediction(item, own).text,
            "gold_log_prob": own.gold,
            "gold_tokens": 0 if answer.reply is None else answer.reply.stop - answer.reply.start,
            "option_log_probs": own.options,
            "first_token_kl": own.divergences[0],
            "first_token_js": own.divergences[1],
            "num_latent_steps": sum(cell.kind == SLOT for cell in own.row.cells),
            "num_spans": len({cell.span for cell in own.row.cells if cell.span >= 0}),
            "forced_closed": sum(span.forced for span in item.spans),
            "answer_tokens": len(own.reply),
        }
        for name, value in values.items():
            getattr(result, name).append(value)

    def prediction(self, item: CleanItem, own: Measured) -> Prediction:
        """What a condition wrote, as the scorers of a protocol read it."""
        written = [cell.token for cell in own.row.cells if not cell.laid_out]
        ids = written + own.reply
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        raw = self.processor.decode(ids)
        steps = sum(cell.kind == SLOT for cell in own.row.cells)
        return Prediction(item.record["id"], text, text, steps, len(ids), (), raw=raw)


def _nth(options: Sequence[Any], number: int) -> Any:
    return options[number] if number < len(options) else None


def _log_probs(shared: SharedPrompts, fed: Fed, replies: Sequence[Any]) -> tuple[list[float | None], torch.Tensor]:
    ids = [None if reply is None else reply.ids for reply in replies]
    return shared.log_probs(fed, ids, [(0, 0) if reply is None else (reply.start, reply.stop) for reply in replies])


def _against(own: Measured | None, clean: Measured) -> Measured | None:
    """With the divergence from the clean run at the first id of the content, which is let go then."""
    if own is not None and own.first is not None and clean.first is not None:
        own.divergences = kl_and_js(clean.first, own.first)
        own.first = None
    return own


def kl_and_js(clean: torch.Tensor, edited: torch.Tensor) -> tuple[float, float]:
    """KL(clean ‖ edited) and the Jensen-Shannon divergence of two `(V,)` log-probabilities, nats."""
    middle = torch.logaddexp(clean, edited) - torch.log(torch.tensor(2.0))

    def kl(first: torch.Tensor, second: torch.Tensor) -> float:
        return float(torch.nn.functional.kl_div(second, first, reduction="sum", log_target=True))

    return max(kl(clean, edited), 0.0), max((kl(clean, middle) + kl(edited, middle)) / 2, 0.0)


__all__ = ["CLEAN", "InterventionRun", "Measured", "kl_and_js"]
