"""State of one `generate` call: which rows are inside a span, what was written, and the vectors to feed.

Rows are independent. What is known of a position is kept by position, in tensors with one entry per row, so that a
rejected candidate is simply overwritten (assisted decoding) and rows can be gathered (beam search). Steps are recorded
un-gathered for the trace.

A step in which every row is outside a span costs next to nothing: whether there is one is read once a step, where the
stock loop waits for the device anyway (`advance`). Nothing else here waits for the device.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .latent_inputs import latent_positions
from .latent_strategies import LATENT_OPTIONS, STOP_RULES, LatentOptions, LatentStep
from .latent_trace import LatentTrace, find_spans

_NO_TOKEN = -1  # in place of an id that the model has not


@dataclass(slots=True)
class _Rows:
    """What the rows `(R,)` are at one position: slots, slots written in the open span so far, index of the span, what
    the LM head said, and the answer id forced there (1 is the first one; `None` when the call has none)."""

    is_slot: torch.BoolTensor
    count: torch.LongTensor
    span: torch.LongTensor
    said: torch.LongTensor
    pending: torch.LongTensor | None = None

    def gather(self, index: torch.LongTensor) -> "_Rows":
        values = (getattr(self, name) for name in self.__slots__)
        return _Rows(*(None if value is None else value.index_select(0, index) for value in values))


@dataclass(slots=True)
class _Record:
    """What one step decided, in the row order of that step; `fired` holds one `(R,)` entry per stop rule."""

    is_slot: torch.BoolTensor
    closing: torch.BoolTensor
    fired: list[torch.BoolTensor]
    said: torch.LongTensor
    vector: torch.Tensor
    topk_ids: torch.LongTensor | None
    topk_probs: torch.Tensor | None


def _close_reason(closing: torch.BoolTensor, fired: list[torch.BoolTensor]) -> torch.LongTensor:
    """`(R,)` 0 while the row goes on, else 1 + index of the first stop rule that fired."""
    reason = torch.zeros_like(closing, dtype=torch.long)
    for index in range(len(fired), 0, -1):
        reason = torch.where(fired[index - 1], index, reason)
    return reason * closing


class _Step(LatentStep):
    """A step whose `recent` and `before` are worked out when a rule asks for them: they are given as functions."""

    @property
    def recent(self) -> torch.LongTensor:
        return self._recent()

    @recent.setter
    def recent(self, value: Callable[[], torch.LongTensor]) -> None:
        self._recent = value

    @property
    def before(self) -> torch.Tensor | None:
        return self._before()

    @before.setter
    def before(self, value: Callable[[], torch.Tensor | None]) -> None:
        self._before = value


class LatentState:
    """Per-call state of latent decoding. `R` rows (prompts times beams or return sequences), `H` hidden size.

    Args:
        options: resolved options of the call.
        config: model configuration (latent token ids).
        num_prompts: rows before the expansion by beams.
        dtype: of the model, in which vectors are fed.
        use_cache: whether earlier positions stay in a cache; without one every vector is fed again.
        chunked: whether the prompt is fed in chunks.
        sample: whether what the LM head says is sampled.
        keep_trace: whether to record steps for a [`LatentTrace`].
        prompt_latents: `(latent_embeds, latent_mask or None)` for slots that stand in the prompt.
        attention_mask: of the prompt, `None` without padding.
    """

    def __init__(
        self,
        options: LatentOptions,
        config: Any,
        num_prompts: int,
        dtype: torch.dtype = torch.float32,
        use_cache: bool = True,
        chunked: bool = False,
        sample: bool = False,
        keep_trace: bool = False,
        prompt_latents: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        attention_mask: torch.LongTensor | None = None,
    ) -> None:
        self.options, self.config, self.num_prompts, self.dtype = options, config, num_prompts, dtype
        self.use_cache, self.chunked, self.sample, self.keep_trace = use_cache, chunked, sample, keep_trace
        self.prompt_latents, self.attention_mask = prompt_latents, attention_mask
        self.prompt_record: dict[str, torch.Tensor] = {}  # of a plan, by prompt and position
        self.strategy, self.readable_ids = options.strategy, options.values.latent_ids == "readable"
        # Read once: an attribute of a configuration costs as much as an operation on a tensor.
        ids = [getattr(config, f"latent_{role}token_id") for role in ("start_", "", "end_")]
        self.start_id, self.slot_id, self.end_id = (_NO_TOKEN if token is None else token for token in ids)
        self.patch_id, self.hidden_size = config.latent_patch_token_id, config.get_text_config().hidden_size
        self.writes_end = self.strategy.writes_end or options.values.force_end
        self.prompt_length = 0
        self.length = 0  # positions whose outputs are known
        self.fed = 0  # prompt positions fed so far, for chunked prefill
        self.cached = 0  # prompt positions that a cache had before assisted decoding, which would feed them again
        self.row_options = None
        self.position_ids: torch.LongTensor | None = None
        self.rows: dict[int, _Rows] = {}  # a position without an entry is text in all rows
        self.vectors: dict[int, torch.Tensor] = {}
        self.records: dict[int, _Record] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.finished: torch.BoolTensor | None = None  # rows that a stopping rule ended
        self._advanced: tuple[int, torch.BoolTensor, bool] | None = None
        self._states = self._hidden = self._logits = self._banned = None
        self._single: dict[int, torch.Tensor] = {}  # scores that leave one id
        # (length, latent states) of the last forward and of the one before it, for strategies that read them
        self._last_states: tuple[int, torch.Tensor] | None = None
        self._earlier_states: tuple[int, torch.Tensor] | None = None

    @property
    def kept_of_prompt(self) -> int:
        """From how many last positions of the prompt the prefill keeps states and logits: those that choose and those
        that follow the learned tokens, for the trace; 0: as the stock loop wants it."""
        if not self.keep_trace or self.strategy.tokens != "learned" or self.prompt_latents is None:
            return 0
        return min(int(self.prompt_latents[1].sum(dim=1).amax()) + 1, self.prompt_latents[1].shape[1])

    # --- views by position ---

    def _start(self, input_ids: torch.LongTensor) -> None:
        rows, length = input_ids.shape
        device = input_ids.device
        self.row_options = self.options.tensors(self.num_prompts, rows, device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        pending = None if self.row_options.latent_answer_ids is None else zeros
        self._text = _Rows(zeros > 0, zeros, zeros - 1, zeros, pending)
        self._no_slot = self._text.is_slot.unsqueeze(1)
        self._no_latent = torch.zeros(rows, 1, self.hidden_size, dtype=self.dtype, device=device)
        if self.prompt_latents is not None:
            mask = self._prompt_mask(input_ids)
            text = torch.where(mask, -1, torch.arange(length, device=device)).amax(dim=1)
            self.rows[length - 1] = _Rows(
                mask[:, -1], length - 1 - text, self._text.span, input_ids[:, -1], self._text.pending
            )

    def _prompt_mask(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        mask = self.prompt_latents[1]
        if mask is not None:
            return mask.to(input_ids.device).repeat_interleave(input_ids.shape[0] // mask.shape[0], dim=0)
        return latent_positions(input_ids, (self.slot_id, self.patch_id))

    def is_slot(self, position: int) -> torch.BoolTensor:
        """`(R,)` rows whose id at `position` is a slot."""
        return self.rows.get(position, self._text).is_slot

    def readable(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Ids with every slot replaced by what it would have said."""
        if self.row_options is None:
            return input_ids
        prompt = input_ids[:, : self.prompt_length]
        return torch.cat([prompt, self._readable_from(input_ids, self.prompt_length)], dim=1)

    def _readable_from(self, input_ids: torch.LongTensor, first: int) -> torch.LongTensor:
        """Readable ids of the positions from `first` on."""
        ids, positions = input_ids[:, first:], range(first, input_ids.shape[1])
        if not any(position in self.rows for position in positions):
            return ids
        rows = [self.rows.get(position, self._text) for position in positions]
        is_slot, said = (torch.stack([getattr(row, name) for row in rows], dim=1) for name in ("is_slot", "said"))
        return torch.where(is_slot, said, ids)

    def is_forced(self, input_ids: torch.LongTensor) -> bool:
        """Whether the next id of a single row is not free: inside a span, a forced start, a pending answer id."""
        first = input_ids.shape[1] == self.prompt_length
        if not self.strategy.opens_span:
            return False
        opened = bool((input_ids[:, -1] == self.start_id).any())
        if self.row_options is None:
            return opened or (first and self.options.values.force_span)
        last = self.rows.get(input_ids.shape[1] - 1, self._text)
        return opened or bool(last.is_slot.any()) or (last.pending is not None and bool((last.pending > 0).any()))

    def free_prefix(self, ids: torch.LongTensor) -> int:
        """Number of leading candidate ids that may be proposed: up to a start marker, and none from a latent id or an
        image placeholder on (a draft copied from the prompt may hold one, and it would be read as an image).
        """
        placeholders = [getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        for index, token in enumerate(ids.tolist()):
            if token in (self.slot_id, self.patch_id, *placeholders):
                return index
            if token == self.start_id:
                return index + 1 if self.strategy.opens_span else index
        return len(ids)

    # --- feeding ---

    def next_inputs(self, input_ids: torch.LongTensor, new: int, first: bool) -> dict[str, torch.Tensor]:
        """`latent_embeds` and `latent_mask` for the `new` positions fed now; the same form at every decode step.

        Args:
            input_ids: ids so far, or the chunk when the prompt is fed in chunks.
            new: number of positions fed.
            first: whether this feeds the prompt.
        """
        start = self.fed if (self.chunked and first) else input_ids.shape[1] - new
        self.fed = self.length = start + new
        if first and self.prompt_latents is None:
            return {}
        if new == 1 and not first and self.use_cache:
            vector = self.vectors.get(start)
            if vector is None:
                return {"latent_embeds": self._no_latent, "latent_mask": self._no_slot}
            # One set of strides at every step, or a compiled forward is compiled again.
            fed = vector.to(self.dtype).unsqueeze(1).clone(memory_format=torch.contiguous_format)
            return {"latent_embeds": fed, "latent_mask": self.is_slot(start).unsqueeze(1)}
        if not self.strategy.opens_span and self.prompt_latents is None:
            return {}
        rows, device = input_ids.shape[0], input_ids.device
        embeds = torch.zeros(rows, new, self.hidden_size, dtype=self.dtype, device=device)
        mask = torch.zeros(rows, new, dtype=torch.bool, device=device)
        if self.prompt_latents is not None:
            self._put_prompt_latents(input_ids, embeds, mask, start)
        for position, vector in self.vectors.items():
            if start <= position < start + new:
                embeds[:, position - start] = vector.to(self.dtype)
                mask[:, position - start] = self.is_slot(position)
        return {"latent_embeds": embeds, "latent_mask": mask}

    def _put_prompt_latents(
        self, input_ids: torch.LongTensor, embeds: torch.Tensor, mask: torch.BoolTensor, start: int
    ) -> None:
        given = self.prompt_latents[0]
        repeat = embeds.shape[0] // given.shape[0]
        stop = min(start + embeds.shape[1], given.shape[1])
        if start >= stop:
            return
        embeds[:, : stop - start] = given[:, start:stop].repeat_interleave(repeat, dim=0).to(embeds)
        if self.prompt_latents[1] is not None:
            mask[:, : stop - start] = self.prompt_latents[1][:, start:stop].repeat_interleave(repeat, dim=0).to(mask)
        else:
            ids = input_ids[:, -embeds.shape[1] :][:, : stop - start]
            mask[:, : stop - start] = latent_positions(ids, (self.slot_id, self.patch_id))

    def observe(self, outputs: Any) -> None:
        """Keep what a forward returned; record outputs at slots for the trace."""
        self._states, self._hidden, self._logits = outputs.latent_states, outputs.last_hidden_state, outputs.logits
        if self.length == self.prompt_length and not self.prompt_record and self.kept_of_prompt:
            self._record_prompt()
        if self.strategy.reads_before:  # copies: a compiled forward may write the next states into the same memory
            self._earlier_states, self._last_states = self._last_states, (self.length, self._states.clone())
        if self.keep_trace and self.records:
            kept = self._hidden.shape[1]
            for position in range(max(self.length - kept, self.prompt_length), self.length):
                if position in self.records:
                    self.outputs[position] = self._hidden[:, position - self.length]

    def _record_prompt(self) -> None:
        """What the learned tokens of the prompts returned and would have said (-1: unknown), where the prefill kept
        it: assisted decoding and a chunked prefill may keep less."""
        mask, kept, topk = self.prompt_latents[1], self._hidden.shape[1], self.options.values.latent_topk
        rows, first = slice(None, None, self._hidden.shape[0] // len(mask)), mask.shape[1] - kept
        hidden, logits = self._hidden[rows], self._logits[rows].float()
        outputs = torch.zeros(*mask.shape, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        outputs[:, first:] = hidden
        known = torch.arange(mask.shape[1], device=hidden.device) >= first
        said = torch.full_like(mask, -1, dtype=torch.long)
        said[:, first + 1 :] = logits[:, :-1].argmax(-1)
        ids, probs = said.new_full((*mask.shape, topk), -1), logits.new_zeros(*mask.shape, topk)
        if topk:
            best = logits[:, :-1].softmax(-1).topk(min(topk, logits.shape[-1]), dim=-1)
            ids[:, first + 1 :], probs[:, first + 1 :] = best.indices, best.values
        self.prompt_record = {
            "outputs": outputs,
            "known": known.expand_as(mask),
            "said": said,
            "ids": ids,
            "probs": probs,
        }

    def advance(self, input_ids: torch.LongTensor, stopped: torch.BoolTensor) -> None:
        """After a step: rows `(R,)` that a stopping rule ended open no span any more; which rows go on inside one?

        Called where the stock loop reads from the device whether all rows ended: the one place to read a value.
        """
        self.finished = stopped if self.finished is None else self.finished | stopped
        is_open = self._open_rows(input_ids)
        self._advanced = input_ids.shape[1], is_open, bool(is_open.any())

    def _open_rows(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """`(R,)` rows that are inside a span at the next position."""
        last, is_open = self.rows.get(input_ids.shape[1] - 1), input_ids[:, -1] == self.start_id
        if last is not None:
            is_open = is_open | last.is_slot
        return is_open if self.finished is None else is_open > self.finished  # open and not finished

    def reorder(self, beam_idx: torch.LongTensor) -> None:
        """Gather rows after a beam step; records stay as they were and are gathered with the final beam indices.

        Only the last two positions are looked at again.
        """
        for position in sorted(self.rows)[-2:]:
            self.rows[position] = self.rows[position].gather(beam_idx)
        self.vectors = {position: vector.index_select(0, beam_idx) for position, vector in self.vectors.items()}
        if self._last_states is not None:
            self._last_states = self._last_states[0], self._last_states[1].index_select(0, beam_idx)

    def forget(self, length: int) -> None:
        """Drop what was decided from position `length` on: drafts of assisted decoding that were rejected."""
        for name in ("rows", "vectors", "records", "outputs"):
            kept = {position: value for position, value in getattr(self, name).items() if position < length}
            setattr(self, name, kept)

    # --- the decision of one step ---

    def decide(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of position `T`: a forced row holds one id with score 0, a text row loses the latent ids."""
        if self.row_options is None:
            self._start(input_ids)
        position, advanced = input_ids.shape[1], self._advanced
        if not self.strategy.opens_span:
            return scores
        any_open = None  # not known with beams and behind drafts
        if advanced is not None and advanced[0] == position:
            is_open, any_open = advanced[1:]
        else:
            is_open = self._open_rows(input_ids)
            if position == self.prompt_length:
                any_open = self.options.values.force_span or bool(is_open.any())
        for kept in (self.rows, self.records, self.vectors):
            kept.pop(position, None)
        fed = self.vectors.get(position - 1)
        if self.use_cache:
            self.vectors.clear()
        if any_open is False and self.row_options.latent_answer_ids is None:
            return scores
        last = self._last_rows(position)
        step, forced = self._begin(input_ids, scores, is_open, last, fed)
        fired = [STOP_RULES[name](step) for name in self.strategy.stops]
        closing = is_open & functools.reduce(torch.bitwise_or, fired) if fired else torch.zeros_like(is_open)
        step.is_slot = is_open ^ closing  # only open rows close
        self._write(step, position, last, closing, fired)
        if self.keep_trace and (any_open or bool(is_open.any())):
            self._record(step, position, closing, fired)
        return self._force(scores, step, closing, forced)

    def _last_rows(self, position: int) -> _Rows:
        """What the rows are at the position before. Text steps leave no entry: an older one has the span."""
        rows = self.rows.get(position - 1)
        if rows is None and self.rows:
            older = max((known for known in self.rows if known < position), default=None)
            return self._text if older is None else replace(self._text, span=self.rows[older].span)
        return rows or self._text

    def _begin(
        self,
        input_ids: torch.LongTensor,
        scores: torch.Tensor,
        is_open: torch.BoolTensor,
        last: _Rows,
        fed: torch.Tensor | None,
    ) -> tuple[LatentStep, torch.LongTensor | None]:
        """The step as the rules see it, and the ids forced on text rows (-1: free; `None`: none is)."""
        values, position = self.row_options, input_ids.shape[1]
        said = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.sample else scores.argmax(-1)
        forced = None
        if position == self.prompt_length and values.force_span:
            forced = torch.full_like(said, self.start_id)
        elif values.latent_answer_ids is not None:
            forced = torch.tensor([-1, *values.latent_answer_ids], device=said.device)[last.pending]
        if forced is not None:
            said = torch.where(forced >= 0, forced, said)
        step = _Step(
            input_ids=input_ids,
            prompt_length=self.prompt_length,
            is_open=is_open,
            count=last.count,
            span=last.span,
            said=said,
            recent=functools.partial(self._recent, input_ids),
            scores=scores,
            latent=self._states[:, position - self.length - 1].to(scores.device),
            options=values,
            config=self.config,
            before=functools.partial(self._vector_before, position, last.is_slot, fed),
        )
        return step, forced

    def _vector_before(
        self, position: int, is_slot: torch.BoolTensor, fed: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`(R, H)` what was fed at the position before where it is a slot, else the state that chose it."""
        if position <= self.prompt_length:
            return None
        chosen = None
        for length, states in filter(None, (self._last_states, self._earlier_states)):
            if chosen is None and 0 < length + 2 - position <= states.shape[1]:
                chosen = states[:, position - 2 - length]
        if chosen is None or fed is None:
            return chosen
        return torch.where(is_slot.unsqueeze(-1), fed.to(chosen), chosen)

    def _recent(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        length = input_ids.shape[1]
        if length < 2:
            return torch.nn.functional.pad(self._readable_from(input_ids, 0), (2 - length, 0), value=-1)
        return self._readable_from(input_ids, length - 2)

    def _write(
        self, step: LatentStep, position: int, last: _Rows, closing: torch.BoolTensor, fired: list[torch.BoolTensor]
    ) -> None:
        pending, answers = None, self.row_options.latent_answer_ids
        if answers is not None:
            pending = torch.where((last.pending > 0) & (last.pending < len(answers)), last.pending + 1, 0)
            forced = self.strategy.forced if not self.options.values.force_end else self.strategy.stops
            codes = [index + 1 for index, name in enumerate(self.strategy.stops) if name in forced]
            if codes:
                reason = _close_reason(closing, fired)
                pending = torch.where(torch.isin(reason, torch.tensor(codes, device=reason.device)), 1, pending)
        self.rows[position] = _Rows(
            is_slot=step.is_slot,
            count=(last.count + 1) * step.is_slot,
            span=last.span + (step.is_slot > last.is_slot),  # the first slot of a span
            said=step.said,
            pending=pending,
        )
        vector = self._slot_vector(step)
        self.vectors[position] = step.latent = vector.clone() if self.strategy.reads_before else vector

    def _slot_vector(self, step: LatentStep) -> torch.Tensor:
        """Noise, then trace hook, then the vector `(R, H)` to feed; read only where a row becomes a slot."""
        vector, values = step.latent, self.options.values
        if values.latent_noise > 0:
            eligible = step.is_slot if values.latent_noise_first else step.is_open & (step.count > 0)
            vector = self.with_noise(vector, eligible)
        if values.latent_hook is not None and bool(step.is_slot.any()):
            step.latent = vector
            vector = self.with_hook(step, vector)
        return vector

    def with_noise(self, vector: torch.Tensor, rows: torch.BoolTensor) -> torch.Tensor:
        """`(R, H)` vectors with the noise of the call on some rows."""
        ratio = self.options.values.latent_noise
        if ratio == 0 or not bool(rows.any()):
            return vector
        noise = torch.randn_like(vector)
        scale = ratio * vector.norm(dim=-1, keepdim=True) / (noise.norm(dim=-1, keepdim=True) + 1e-8)
        return torch.where(rows.unsqueeze(-1), vector + scale * noise, vector)

    def with_hook(self, step: LatentStep, vector: torch.Tensor) -> torch.Tensor:
        """`(R, H)` what the trace hook makes of the vectors of the rows that write a slot.

        Raises:
            ValueError: the hook returned another shape.
        """
        edited = self.options.values.latent_hook(step)
        if edited is None:
            return vector
        if edited.shape != vector.shape:
            raise ValueError(f"latent_hook must return {tuple(vector.shape)} or None, got {tuple(edited.shape)}")
        return torch.where(step.is_slot.unsqueeze(-1), edited.to(vector), vector)

    def _record(
        self, step: LatentStep, position: int, closing: torch.BoolTensor, fired: list[torch.BoolTensor]
    ) -> None:
        topk = self.options.values.latent_topk
        ids = probs = None
        if topk > 0:
            raw = self._logits[:, position - self.length - 1].float()
            probs, ids = raw.softmax(-1).topk(min(topk, raw.shape[-1]), dim=-1)
        self.records[position] = _Record(step.is_slot, closing, fired, step.said, step.latent, ids, probs)

    def suppress(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        """No row writes or says an id that would be read as a latent; with `off` no span opens either, and no learned
        token is written."""
        if self.readable_ids:
            return scores
        if self._banned is None:
            banned = [self.slot_id, self.patch_id, None if self.strategy.opens_span else self.start_id]
            if self.strategy.tokens != "learned":
                banned += self.config.latent_learned_token_ids or []
            self._banned = torch.tensor(
                [token for token in banned if token not in (None, _NO_TOKEN)], dtype=torch.long, device=scores.device
            )
        return scores.index_fill(1, self._banned, -float("inf"))

    def _force(
        self, scores: torch.Tensor, step: LatentStep, closing: torch.BoolTensor, forced: torch.LongTensor | None
    ) -> torch.FloatTensor:
        """One id with score 0 on the rows of a span, and on the text rows with an id in `forced`."""
        if forced is None and not self.readable_ids and (self.writes_end or not self.sample):
            scores = torch.where(step.is_slot.unsqueeze(1), self._only(self.slot_id, scores), scores)
            if self.writes_end:
                scores = torch.where(closing.unsqueeze(1), self._only(self.end_id, scores), scores)
            return scores
        is_forced, target = step.is_slot, step.said if self.readable_ids else torch.full_like(step.said, self.slot_id)
        if self.writes_end:
            is_forced, target = step.is_open, torch.where(closing, self.end_id, target)
        elif self.sample:  # one draw decides both: whether the span closes and what is written then
            is_forced, target = step.is_open, torch.where(closing, step.said, target)
        if forced is not None:
            target = torch.where(is_forced, target, forced.clamp(min=0))
            is_forced = is_forced | (forced >= 0)
        is_forced, target = is_forced.unsqueeze(1), target.unsqueeze(1)
        value = scores.gather(1, target).masked_fill(is_forced, 0.0)  # a free row keeps its score
        return scores.masked_fill(is_forced, -float("inf")).scatter_(1, target, value)

    def _only(self, token: int, scores: torch.Tensor) -> torch.Tensor:
        """`(V,)` scores that leave one id."""
        if token not in self._single:
            self._single[token] = torch.full_like(scores[0], -float("inf"))
            self._single[token][token] = 0
        return self._single[token]

    # --- the trace ---

    def build_trace(self, output: Any) -> LatentTrace:
        """Trace of the returned sequences; under beam search steps are gathered with `output.beam_indices`."""
        sequences = output.sequences
        rows, length = sequences.shape
        device = sequences.device
        parents = self._parents(output, rows, length)
        packed: dict[str, list] = {
            name: [] for name in ("index", "inputs", "outputs", "known", "said", "ids", "probs")
        }
        reasons: dict[tuple[int, int], str] = {}
        if self.prompt_latents is not None:
            self._pack_prompt(packed, sequences)
            if self.prompt_record or self.strategy.tokens == "learned":
                for row, position in packed["index"][0].tolist():
                    reasons[(row, position + 1)] = "num_latent_steps"
        for position in sorted(self.records):
            if position >= length:
                continue
            record, parent = self.records[position], parents[:, position - self.prompt_length]
            alive = parent >= 0
            parent = parent.clamp(min=0)
            closed = _close_reason(record.closing, record.fired)[parent] * alive
            for row, reason in enumerate(closed.tolist()):
                if reason:
                    reasons[(row, position)] = self.strategy.stops[reason - 1]
            slots = (alive & record.is_slot[parent]).nonzero()[:, 0]
            if len(slots):
                self._pack(packed, record, position, slots, parent, parents)
        trace = self._assemble(packed, sequences, device)
        trace.spans = find_spans(
            sequences,
            trace.latent_mask,
            self.prompt_length,
            self.start_id,
            self.end_id,
            reasons,
        )
        return trace

    def _pack_prompt(self, packed: dict, sequences: torch.LongTensor) -> None:
        """Slots that stand in the prompt: their vectors are known; what they would have said and returned only where a
        plan has worked them out."""
        index = self._prompt_mask(sequences[:, : self.prompt_length]).nonzero()
        given, topk = self.prompt_latents[0], self.options.values.latent_topk
        source = index[:, 0] // (sequences.shape[0] // given.shape[0]), index[:, 1]
        vectors, record = given[source], self.prompt_record
        packed["index"].append(index)
        packed["inputs"].append(vectors)
        packed["outputs"].append(record["outputs"][source] if record else torch.zeros_like(vectors))
        known = record["known"][source] if "known" in record else torch.full_like(index[:, 0], bool(record)).bool()
        said = sequences[index[:, 0], index[:, 1]]
        if record:
            said = torch.where(record["said"][source] < 0, said, record["said"][source])
        packed["known"].append(known)
        packed["said"].append(said)
        packed["ids"].append(record["ids"][source] if record else sequences.new_full((len(index), topk), -1))
        packed["probs"].append(
            record["probs"][source] if record else torch.zeros(len(index), topk, device=sequences.device)
        )
        if "patch_column" in record:
            packed["patch_column"] = [record["patch_column"][source]]

    def _parents(self, output: Any, rows: int, length: int) -> torch.LongTensor:
        """`(rows, generated)` row of the running batch that wrote each id; -1 after the end of a beam."""
        beams = output.get("beam_indices")
        new = length - self.prompt_length
        if beams is not None:
            return torch.nn.functional.pad(beams.long(), (0, max(0, new - beams.shape[1])), value=-1)
        return torch.arange(rows, device=output.sequences.device).unsqueeze(1).expand(rows, new)

    def _pack(self, packed: dict, record: _Record, position: int, slots: Any, parent: Any, parents: Any) -> None:
        source = parent[slots]
        packed["index"].append(torch.stack([slots, torch.full_like(slots, position)], dim=1))
        packed["inputs"].append(record.vector[source])
        packed["said"].append(record.said[source])
        if record.topk_ids is not None:
            packed["ids"].append(record.topk_ids[source])
            packed["probs"].append(record.topk_probs[source])
        column = position - self.prompt_length + 1
        following = parents[slots, column] if column < parents.shape[1] else torch.full_like(slots, -1)
        known = following >= 0 if position in self.outputs else torch.zeros_like(slots, dtype=torch.bool)
        output = record.vector.new_zeros(len(slots), self.hidden_size)
        if bool(known.any()):
            output[known] = self.outputs[position][following[known]]
        packed["outputs"].append(output)
        packed["known"].append(known)

    def _assemble(self, packed: dict, sequences: torch.LongTensor, device: torch.device) -> LatentTrace:
        def join(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.cat(packed[name]) if packed[name] else torch.zeros(0, *shape, dtype=dtype, device=device)

        index = join("index", 2, dtype=torch.long)
        order = (index[:, 0] * sequences.shape[1] + index[:, 1]).argsort()
        topk = self.options.values.latent_topk
        prompts = torch.arange(len(sequences), device=device) // (len(sequences) // self.num_prompts)
        positions = self.position_ids if self.prompt_length > 0 else None
        if positions is not None:  # under beam search the running rows are not the returned ones; a prompt's are equal
            rows = prompts * (positions.shape[-2] // self.num_prompts)
            positions = positions[..., rows.to(positions.device), : sequences.shape[1]]
        values = {name: value for name, value in vars(self.options.values).items() if LATENT_OPTIONS[name].saved}
        token_ids = {
            f"latent_{role}token_id": getattr(self.config, f"latent_{role}token_id")
            for role in ("", "start_", "end_", "patch_")
        }
        mask = self.attention_mask
        if mask is not None:
            mask = mask[prompts * (mask.shape[0] // self.num_prompts)]
        return LatentTrace(
            sequences=sequences,
            prompt_length=self.prompt_length,
            slot_index=index[order],
            slot_inputs=join("inputs", self.hidden_size)[order],
            slot_outputs=join("outputs", self.hidden_size)[order],
            has_output=join("known", dtype=torch.bool)[order],
            readable_ids=join("said", dtype=torch.long)[order],
            topk_ids=join("ids", topk, dtype=torch.long)[order] if topk else index.new_zeros(len(index), 0),
            topk_probs=join("probs", topk)[order] if topk else torch.zeros(len(index), 0, device=device),
            position_ids=positions,
            attention_mask=mask,
            extras={name: packed[name][0][order] for name in ("patch_column",) if name in packed},
            info={"strategy": self.strategy.name, "options": values, **token_ids},
        )
