"""Prompts run once, and what conditions feed behind them (specification, section 7: cost).

[`SharedPrompts`] keeps the keys and values of a batch of prefixes. A condition appends its cells, decodes a reply,
scores given replies, and is cut off again; the prefix is neither run nor copied for it. Cells are known (frozen
vectors), or slots that are worked out one after the other from the model's own states (live). Every condition has the
same rows, so that a row's numbers do not depend on the company it is in.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_latent import Visibility, visible_attention

from .cells import PATCH, SLOT, Cell, LatentIds, Row
from .edges import Edge, Layout, rules_of
from .growing_cache import GrowingCache
from .layer_states import decoder_layers, read_states, replaced_states


@dataclass
class Fed:
    """What feeding the cells of a batch returned; `B` rows, `W` columns, padded on the left.

    Args:
        mask: `(B, W)` 1 at cells.
        embeds: `(B, W, H)` vectors fed, zero where a token was.
        logits: `(B, V)` for the first id of the reply.
        next_offset: `(B,)` its rotary position.
        layout: where everything is.
        edges: attention edges that are cut.
        content_start: number of ids of a reply before the answer's content, for the edge `A_only`.
    """

    mask: torch.LongTensor
    embeds: torch.Tensor
    logits: torch.Tensor
    next_offset: torch.LongTensor
    layout: Layout
    edges: tuple[Edge, ...]
    content_start: int = 0


class SharedPrompts:
    """A batch of prefixes in a cache.

    Args:
        model: a latent model in eval mode.
        inputs: the processed prompts: ids, mask and images, padded on the left.
        prefixes: of each row the ids to keep, the beginning of its prompt.
        edges: cut while the prefixes are run (question to image).
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, inputs: Any, prefixes: Sequence[torch.LongTensor], edges: Sequence[Edge] = ()
    ) -> None:
        self.model, self.device = model, model.device
        self.ids = LatentIds.of(model.config)
        self.width, given = _cut_inputs(inputs, prefixes, model.device)
        self.mask, self.input_ids = given["attention_mask"], given["input_ids"]
        image = getattr(model.config, "image_token_id", None)
        self.images = torch.zeros_like(self.mask, dtype=torch.bool) if image is None else self.input_ids == image
        self.cache = GrowingCache(model.config)
        layout = Layout.of(self.images, self.mask, [Row((), 0)] * len(prefixes), 0)
        rules = [rule for edge in edges for rule in edge.prefix_rules(layout)]
        positions = self._positions(given)
        with visible_attention(model, rules):
            out = model(**given, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits, self.state = out.logits[:, -1].float(), out.latent_states[:, -1]
        self._head = self.mask[:, :0]  # cells fed before those of `extend`

    def __len__(self) -> int:
        return len(self.mask)

    def _positions(self, given: dict[str, Any]) -> torch.LongTensor:
        """Positions of the prefixes; sets `(B,)` that of the first cell of each row."""
        names = ("image_grid_thw", "mm_token_type_ids", "pixel_values")
        known = {name: given[name] for name in names if given.get(name) is not None}
        positions = self.model.model.plan_positions(self.input_ids, self.mask, **known)
        self._has_axes = positions.dim() == 3
        largest = positions[-3:].amax(dim=0) if self._has_axes else positions
        self.base = largest.masked_fill(self.mask == 0, -1).amax(dim=1).to(self.device) + 1
        return positions

    # Feeding

    @contextmanager
    def behind(
        self,
        rows: Sequence[Row],
        edges: Sequence[Edge] = (),
        content_start: int = 0,
        states: Sequence[torch.Tensor | None] | None = None,
    ) -> Iterator[Fed]:
        """Feed the cells of a condition, one row an item; the cache is cut back at the end of the context.

        Args:
            rows: cells of each item.
            edges: attention edges to cut.
            content_start: number of ids of a reply before its content.
            states: of each row `(layers, N, H)` outputs of the layers at its latents, put in place of its own.
        """
        try:
            if states is None:
                yield self._feed(rows, tuple(edges), content_start)
            else:
                with replaced_states(self.model, *self._placed(rows, states)):
                    fed = self._feed(rows, tuple(edges), content_start)
                yield fed
        finally:
            self.cache.cut(self.width)

    def layer_states(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Of each row `(layers, N, H)`, what the layers return at its latents; on the CPU."""
        with read_states(self.model) as found, self.behind(rows) as fed:
            stacked = torch.stack(found)[:, :, -fed.mask.shape[1] :] if fed.mask.shape[1] else None
        width = fed.mask.shape[1]
        return [
            torch.zeros(len(found), 0, self.state.shape[-1])
            if stacked is None
            else stacked[:, number, _latent_columns(row, width)].float().cpu()
            for number, row in enumerate(rows)
        ]

    def _placed(
        self, rows: Sequence[Row], states: Sequence[torch.Tensor | None]
    ) -> tuple[torch.BoolTensor, torch.Tensor]:
        """Mask `(B, W)` and states `(layers, B, W, H)` for [`replaced_states`]."""
        width = max(len(row.cells) for row in rows)
        layers = len(decoder_layers(self.model))
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        placed = torch.zeros(layers, len(rows), width, self.state.shape[-1])
        for number, (row, given) in enumerate(zip(rows, states, strict=True)):
            if given is not None:
                columns = _latent_columns(row, width)
                mask[number, columns], placed[:, number, columns] = True, given.float()
        return mask.to(self.device), placed.to(self.device)

    @torch.no_grad()
    def _feed(self, rows: Sequence[Row], edges: tuple[Edge, ...], content_start: int) -> Fed:
        width = max((len(row.cells) for row in rows), default=0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        embeds = torch.zeros(len(rows), width, self.state.shape[-1], dtype=self.model.dtype)
        columns = [[None] * (width - len(row.cells)) + list(row.cells) for row in rows]
        for number, cells in enumerate(columns):
            for column, cell in enumerate(cells):
                if cell is not None:
                    mask[number, column] = 1
                    if cell.vector is not None:
                        embeds[number, column] = cell.vector.to(embeds.dtype)
        ends = torch.tensor([row.next_offset for row in rows], device=self.device)
        layout = Layout.of(self.images, self.mask, rows, width)
        fed = Fed(mask.to(self.device), embeds.to(self.device), self.logits, ends, layout, edges, content_start)
        with visible_attention(self.model, self._rules(fed)):
            self._run_columns(columns, fed)
        return fed

    def _rules(self, fed: Fed) -> list[Visibility]:
        return rules_of(fed.edges, fed.layout, fed.content_start)

    def _run_columns(self, columns: Sequence[Sequence[Cell | None]], fed: Fed) -> None:
        """Known columns together, a column with a slot to be worked out alone."""
        states, start, width = [], 0, fed.mask.shape[1]
        live = [any(cells[column] is not None and cells[column].feedback for cells in columns)
                for column in range(width)]  # fmt: skip
        keep_all = any(live)
        while start < width:
            stop = start + 1
            if live[start]:
                self._work_out(columns, fed, start, states)
            while stop < width and not live[stop]:
                stop += 1
            out = self._forward(columns, fed, start, stop, keep_all)
            if keep_all:
                states.extend(out.latent_states.unbind(dim=1))
            present = fed.mask[:, stop - 1] > 0
            fed.logits = torch.where(present.unsqueeze(1), out.logits[:, -1].float(), fed.logits)
            start = stop

    def _work_out(
        self, columns: Sequence[Sequence[Cell | None]], fed: Fed, column: int, states: list[torch.Tensor]
    ) -> None:
        """The vectors of the slots of one column, from the state before their block."""
        for number, cells in enumerate(columns):
            cell = cells[column]
            if cell is None or not cell.feedback:
                continue
            source = column - 1
            while source >= 0 and cells[source] is not None and cells[source].kind == PATCH:
                source -= 1
            is_prefix = source < 0 or cells[source] is None
            vector = self.state[number] if is_prefix else states[source][number]
            fed.embeds[number, column] = vector if cell.edit is None else cell.edit(vector).to(vector)

    def _forward(
        self, columns: Sequence[Sequence[Cell | None]], fed: Fed, start: int, stop: int, keep_all: bool
    ) -> Any:
        part = [cells[start:stop] for cells in columns]
        ids = torch.tensor([[0 if cell is None else cell.token for cell in cells] for cells in part])
        latent = torch.tensor([[_is_vector(cell) for cell in cells] for cells in part])
        offsets = torch.tensor([[0 if cell is None else cell.offset for cell in cells] for cells in part])
        return self._step(
            ids.to(self.device),
            offsets.to(self.device),
            torch.cat([self.mask, self._head, fed.mask[:, :stop]], dim=1),
            fed.embeds[:, start:stop],
            latent.to(self.device),
            stop - start if keep_all else 1,
        )

    def _step(
        self,
        ids: torch.LongTensor,
        offsets: torch.LongTensor,
        mask: torch.LongTensor,
        embeds: torch.Tensor | None = None,
        latent: torch.BoolTensor | None = None,
        keep: int = 1,
    ) -> Any:
        """One forward over new columns `(B, n)`; `mask` covers prefix and all columns so far."""
        positions = self.base.unsqueeze(1) + offsets
        if embeds is None:
            latent = torch.zeros_like(ids, dtype=torch.bool)
            embeds = torch.zeros(*ids.shape, self.state.shape[-1], dtype=self.model.dtype, device=self.device)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.expand(3, -1, -1) if self._has_axes else positions,
            past_key_values=self.cache,
            use_cache=True,
            latent_embeds=embeds,
            latent_mask=latent,
            logits_to_keep=keep,
        )

    @torch.no_grad()
    def extend(self, fed: Fed, rows: Sequence[Row]) -> Fed:
        """Feed further cells behind those of [`behind`], inside its context; without edges."""
        head = fed.mask.shape[1]
        self._head = fed.mask
        try:
            more = self._feed(rows, (), 0)
        finally:
            self._head = fed.mask[:, :0]
        more.mask = torch.cat([fed.mask, more.mask], dim=1)
        more.embeds = torch.cat([fed.embeds, more.embeds], dim=1)
        more.logits = torch.where(more.mask[:, head:].any(dim=1, keepdim=True), more.logits, fed.logits)
        return more

    @contextmanager
    def grafted(self, other: "SharedPrompts") -> Iterator[None]:
        """The keys and values of the images of other prompts in place of the own ones.

        Raises:
            ValueError: the images do not stand in the same positions.
        """
        if self.images.shape != other.images.shape or not self.images.equal(other.images):
            raise ValueError("the images of the two prompts differ in size; graft images of the same grid")
        where = self.images[:, None, :, None]
        own = []
        for layer, graft in zip(self.cache.layers, other.cache.layers, strict=True):
            for mine, theirs in ((layer.keys, graft.keys), (layer.values, graft.values)):
                kept = mine[..., : self.width, :]
                own.append((kept, kept.clone()))
                kept.copy_(torch.where(where, theirs[..., : self.width, :], kept))
        try:
            yield
        finally:
            for place, values in own:
                place.copy_(values)

    # Replies

    @torch.no_grad()
    def decode(
        self, fed: Fed, budgets: Sequence[int], ends: set[int], banned: Sequence[int], text: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy replies, with the end of the turn, each up to its budget.

        Args:
            fed: of [`behind`], inside its context; the cache is left as it was.
            budgets: number of ids of each row.
            ends: ids that end a turn.
            banned: ids that are never written.
            text: ids written first.
        """
        length = self.cache.get_seq_length()
        replies: list[list[int]] = [[] for _ in budgets]
        going = [budget > 0 for budget in budgets]
        logits, mask = fed.logits, torch.cat([self.mask, fed.mask], dim=1)
        closed = torch.tensor(sorted({token for token in banned if token >= 0}), device=self.device, dtype=torch.long)
        with visible_attention(self.model, self._rules(fed)):
            for step in range(max(budgets, default=0)):
                chosen = logits.index_fill(1, closed, -float("inf")).argmax(dim=-1).tolist()
                chosen = [text[step]] * len(replies) if step < len(text) else chosen
                for row, token in enumerate(chosen):
                    if going[row]:
                        replies[row].append(token)
                        going[row] = token not in ends and len(replies[row]) < budgets[row]
                if not any(going):
                    break
                ids = torch.tensor(chosen, device=self.device).unsqueeze(1)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                out = self._step(ids, fed.next_offset.unsqueeze(1) + step, mask)
                logits = out.logits[:, -1].float()
        self.cache.cut(length)
        return replies

    @torch.no_grad()
    def log_probs(
        self, fed: Fed, replies: Sequence[Sequence[int] | None], content: Sequence[tuple[int, int]]
    ) -> tuple[list[float | None], torch.Tensor]:
        """Log-probabilities of given replies, teacher-forced.

        Args:
            fed: of [`behind`], inside its context; the cache is left as it was.
            replies: ids of one reply a row, None for a row without.
            content: `(start, stop)` of the scored ids in each.

        Returns:
            Their sum in nats for each row (None without reply), and `(B, V)` log-probabilities of the first scored
            id, zeros without reply.
        """
        length, width = self.cache.get_seq_length(), max((len(ids) for ids in replies if ids), default=0)
        first = torch.zeros_like(fed.logits)
        sums: list[float | None] = [None] * len(replies)
        if width == 0:
            return sums, first
        ids = torch.zeros(len(replies), width, dtype=torch.long, device=self.device)
        for row, reply in enumerate(replies):
            if reply:
                ids[row, : len(reply)] = torch.tensor(list(reply), device=self.device)
        steps = torch.arange(width, device=self.device)
        mask = torch.cat([self.mask, fed.mask, torch.ones_like(ids)], dim=1)
        with visible_attention(self.model, self._rules(fed)):
            out = self._step(ids, fed.next_offset.unsqueeze(1) + steps, mask, keep=width)
        logits = torch.cat([fed.logits.unsqueeze(1), out.logits[:, :-1].float()], dim=1).log_softmax(dim=-1)
        self.cache.cut(length)
        for row, (reply, (begin, stop)) in enumerate(zip(replies, content, strict=True)):
            if reply:
                chosen = logits[row, begin:stop].gather(1, ids[row, begin:stop].unsqueeze(1))
                sums[row], first[row] = float(chosen.sum()), logits[row, begin]
        return sums, first


def _latent_columns(row: Row, width: int) -> list[int]:
    """Columns of the latents of a row, padded on the left to a width."""
    start = width - len(row.cells)
    return [start + place for place, cell in enumerate(row.cells) if cell.kind in (SLOT, PATCH)]


def _is_vector(cell: Cell | None) -> bool:
    return cell is not None and (cell.vector is not None or cell.feedback)


def _cut_inputs(inputs: Any, prefixes: Sequence[torch.LongTensor], device: torch.device) -> tuple[int, dict[str, Any]]:
    """The inputs of the forward with every row cut to its prefix, padded on the left; their width.

    Raises:
        ValueError: a prefix that is not the beginning of its prompt.
    """
    width = max(len(prefix) for prefix in prefixes)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    new = {"input_ids": ids.new_zeros(len(prefixes), width), "attention_mask": mask.new_zeros(len(prefixes), width)}
    types = inputs.get("mm_token_type_ids")
    if types is not None:
        new["mm_token_type_ids"] = types.new_zeros(len(prefixes), width)
    for row, prefix in enumerate(prefixes):
        own, length = mask[row].bool(), len(prefix)
        if not ids[row][own][:length].equal(prefix.to(ids)):
            raise ValueError(f"row {row}: the prefix is not the beginning of its prompt; ask with the same processor")
        new["input_ids"][row, width - length :] = prefix.to(ids)
        new["attention_mask"][row, width - length :] = 1
        if types is not None:
            new["mm_token_type_ids"][row, width - length :] = types[row][own][:length]
    others = {name: value for name, value in inputs.items() if name not in new}
    return width, {name: _moved(value, device) for name, value in {**others, **new}.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value


__all__ = ["Fed", "SharedPrompts"]
