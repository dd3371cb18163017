"""State of one `generate` call: which rows are inside a span, what was written, and the vectors to feed.

Rows are independent. Everything is a tensor with one entry per row and position, so that a rejected candidate is
simply
overwritten (assisted decoding) and rows can be gathered (beam search). Steps are recorded un-gathered for the trace.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .latent_inputs import latent_positions
from .latent_strategies import LATENT_OPTIONS, STOP_RULES, LatentOptions, LatentStep
from .latent_trace import LatentTrace, find_spans

_GROW = 128


@dataclass
class _Record:
    """What one step decided, in the row order of that step."""

    is_slot: torch.BoolTensor
    reason: torch.LongTensor
    said: torch.LongTensor
    vector: torch.Tensor | None
    topk_ids: torch.LongTensor | None
    topk_probs: torch.Tensor | None


class LatentState:
    """Per-call state of latent decoding. `R` rows (prompts times beams or return sequences), `H` hidden size.

    Args:
        options: resolved options of the call.
        config: model configuration (latent token ids).
        num_prompts: rows before the expansion by beams.
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
        use_cache: bool = True,
        chunked: bool = False,
        sample: bool = False,
        keep_trace: bool = False,
        prompt_latents: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        attention_mask: torch.LongTensor | None = None,
    ) -> None:
        self.options, self.config, self.num_prompts = options, config, num_prompts
        self.use_cache, self.chunked, self.sample, self.keep_trace = use_cache, chunked, sample, keep_trace
        self.prompt_latents, self.attention_mask = prompt_latents, attention_mask
        self.strategy, self.readable_ids = options.strategy, options.values.latent_ids == "readable"
        self.prompt_length = 0
        self.length = 0  # positions whose outputs are known
        self.fed = 0  # prompt positions fed so far, for chunked prefill
        self.row_options = None
        self.position_ids: torch.LongTensor | None = None
        self.vectors: dict[int, torch.Tensor] = {}
        self.records: dict[int, _Record] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.finished: torch.BoolTensor | None = None  # rows that a stopping rule ended
        self._states = self._hidden = self._logits = self._zeros = None

    # --- views by position ---

    def _start(self, input_ids: torch.LongTensor) -> None:
        rows, length = input_ids.shape
        shape = (rows, length + _GROW)
        self.count = torch.zeros(shape, dtype=torch.long, device=input_ids.device)
        self.said, self.pending = torch.zeros_like(self.count), torch.zeros_like(self.count)
        self.span = torch.full_like(self.count, -1)
        self.row_options = self.options.tensors(self.num_prompts, rows, input_ids.device)
        if self.prompt_latents is not None:
            mask = self._prompt_mask(input_ids)
            steps = torch.arange(length, device=input_ids.device)
            last_text = torch.where(mask, -1, steps).cummax(dim=1).values
            self.count[:, :length] = torch.where(mask, steps - last_text, 0)
            self.said[:, :length] = input_ids

    def _prompt_mask(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        mask = self.prompt_latents[1]
        if mask is not None:
            return mask.to(input_ids.device).repeat_interleave(input_ids.shape[0] // mask.shape[0], dim=0)
        return latent_positions(input_ids, (self.config.latent_token_id, self.config.latent_patch_token_id))

    def _ensure(self, length: int) -> None:
        missing = length - self.count.shape[1]
        if missing > 0:
            for name in ("count", "said", "pending", "span"):
                tensor = getattr(self, name)
                setattr(self, name, torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing + _GROW)], dim=1))

    def is_slot(self, position: int) -> torch.BoolTensor:
        """`(R,)` rows whose id at `position` is a slot."""
        return self.count[:, position] > 0

    def readable(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Ids with every slot replaced by what it would have said."""
        if self.row_options is None:
            return input_ids
        length = input_ids.shape[1]
        return torch.where(self.count[:, :length] > 0, self.said[:, :length], input_ids)

    def is_forced(self, input_ids: torch.LongTensor) -> bool:
        """Whether the next id of a single row is not free: inside a span, a forced start, a pending answer id."""
        first = input_ids.shape[1] == self.prompt_length
        if not self.strategy.opens_span:
            return False
        opened = bool((input_ids[:, -1] == self.config.latent_start_token_id).any())
        if self.row_options is None:
            return opened or (first and self.options.values.force_span)
        last = input_ids.shape[1] - 1
        return opened or bool((self.is_slot(last) | (self.pending[:, last] > 0)).any())

    def free_prefix(self, ids: torch.LongTensor) -> int:
        """Number of leading candidate ids that may be proposed: up to a start marker, none from a latent id on."""
        for index, token in enumerate(ids.tolist()):
            if token in (self.config.latent_token_id, self.config.latent_patch_token_id):
                return index
            if token == self.config.latent_start_token_id:
                return index + 1 if self.strategy.opens_span else index
        return len(ids)

    # --- feeding ---

    def next_inputs(
        self, input_ids: torch.LongTensor, new: int, hidden: int, dtype: torch.dtype, first: bool
    ) -> dict[str, torch.Tensor]:
        """`latent_embeds` and `latent_mask` for the `new` positions fed now; the same form at every decode step.

        Args:
            input_ids: ids so far, or the chunk when the prompt is fed in chunks.
            new: number of positions fed.
            hidden: hidden size.
            dtype: of the model.
            first: whether this feeds the prompt.
        """
        start = self.fed if (self.chunked and first) else input_ids.shape[1] - new
        self.fed = self.length = start + new
        if first and self.prompt_latents is None:
            return {}
        if not self.strategy.opens_span and self.prompt_latents is None:
            return {}
        rows, device = input_ids.shape[0], input_ids.device
        if new == 1 and not first and self.use_cache:
            vector = self.vectors.get(start)
            if vector is None:
                if self._zeros is None or self._zeros.shape != (rows, 1, hidden):
                    self._zeros = torch.zeros(rows, 1, hidden, dtype=dtype, device=device)
                fed = self._zeros
            else:  # one set of strides at every step, or a compiled forward is compiled again
                fed = vector.to(dtype).unsqueeze(1).clone(memory_format=torch.contiguous_format)
            return {"latent_embeds": fed, "latent_mask": self.count[:, start : start + 1] > 0}
        embeds = torch.zeros(rows, new, hidden, dtype=dtype, device=device)
        mask = torch.zeros(rows, new, dtype=torch.bool, device=device)
        if self.prompt_latents is not None:
            self._put_prompt_latents(input_ids, embeds, mask, start)
        for position, vector in self.vectors.items():
            if start <= position < start + new:
                embeds[:, position - start] = vector.to(dtype)
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
            token_ids = (self.config.latent_token_id, self.config.latent_patch_token_id)
            mask[:, : stop - start] = latent_positions(ids, token_ids)

    def observe(self, outputs: Any) -> None:
        """Keep what a forward returned; record outputs at slots for the trace."""
        self._states, self._hidden, self._logits = outputs.latent_states, outputs.last_hidden_state, outputs.logits
        if self.keep_trace and self.records:
            kept = self._hidden.shape[1]
            for position in range(max(self.length - kept, self.prompt_length), self.length):
                if position in self.records:
                    self.outputs[position] = self._hidden[:, position - self.length]

    def finish(self, stopped: torch.BoolTensor) -> None:
        """Rows `(R,)` that a stopping rule ended now; they open no span any more."""
        self.finished = stopped if self.finished is None else self.finished | stopped

    def reorder(self, beam_idx: torch.LongTensor) -> None:
        """Gather rows after a beam step; records stay as they were and are gathered with the final beam indices."""
        for name in ("count", "said", "pending", "span"):
            setattr(self, name, getattr(self, name).index_select(0, beam_idx))
        self.vectors = {position: vector.index_select(0, beam_idx) for position, vector in self.vectors.items()}

    def forget(self, length: int) -> None:
        """Drop what was decided from position `length` on: drafts of assisted decoding that were rejected."""
        for name in ("vectors", "records", "outputs"):
            kept = {position: value for position, value in getattr(self, name).items() if position < length}
            setattr(self, name, kept)

    # --- the decision of one step ---

    def decide(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of position `T`: a forced row holds one id with score 0, a text row loses the latent ids."""
        if self.row_options is None:
            self._start(input_ids)
        position = input_ids.shape[1]
        self._ensure(position + 1)
        if not self.strategy.opens_span:
            return scores
        step, pending, forced = self._begin(input_ids, scores, position)
        reason = self._close_reason(step)
        closing = reason > 0
        step.is_slot = step.is_open & ~closing
        self._write(step, position, reason, pending)
        forced = torch.where(step.is_slot, step.said if self.readable_ids else self.config.latent_token_id, forced)
        if self.strategy.writes_end or self.options.values.force_end:
            forced = torch.where(closing, self.config.latent_end_token_id, forced)
        elif self.sample:  # one draw decides both: whether the span closes and what is written then
            forced = torch.where(closing, step.said, forced)
        return self._force(scores, forced)

    def _begin(self, input_ids: torch.LongTensor, scores: torch.Tensor, position: int) -> tuple:
        """The step as the rules see it, the answer ids pending per row, the ids forced on text rows (-1: free)."""
        values, last = self.row_options, position - 1
        said = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.sample else scores.argmax(-1)
        starts = (input_ids[:, -1] == self.config.latent_start_token_id) & (self.count[:, last] == 0)
        is_open = starts | (self.count[:, last] > 0)
        if self.finished is not None:
            is_open = is_open & ~self.finished
        pending = self.pending[:, last]
        forced = torch.full_like(said, -1)
        if position == self.prompt_length and values.force_span:
            forced[:] = self.config.latent_start_token_id
        elif values.latent_answer_ids is not None:
            answers = torch.tensor([-1, *values.latent_answer_ids], device=said.device)
            forced = answers[pending]
        said = torch.where(forced >= 0, forced, said)
        step = LatentStep(
            input_ids=input_ids,
            prompt_length=self.prompt_length,
            is_open=is_open,
            count=self.count[:, last],
            span=self.span[:, last],
            said=said,
            recent=self._recent(input_ids),
            scores=scores,
            latent=self._states[:, position - self.length - 1].to(scores.device),
            options=values,
            config=self.config,
        )
        return step, pending, forced

    def _recent(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        length = input_ids.shape[1]
        if length < 2:
            return torch.nn.functional.pad(self.readable(input_ids), (2 - length, 0), value=-1)
        window = slice(length - 2, length)
        return torch.where(self.count[:, window] > 0, self.said[:, window], input_ids[:, window])

    def _close_reason(self, step: LatentStep) -> torch.LongTensor:
        """`(R,)` 0 while the row goes on, else 1 + index of the stop rule that fired."""
        reason = torch.zeros_like(step.said)
        for index, name in enumerate(self.strategy.stops):
            fires = STOP_RULES[name](step) & step.is_open & (reason == 0)
            reason = torch.where(fires, index + 1, reason)
        return reason

    def _write(self, step: LatentStep, position: int, reason: torch.LongTensor, pending: torch.LongTensor) -> None:
        self.count[:, position] = torch.where(step.is_slot, step.count + 1, 0)
        self.span[:, position] = step.span + (step.is_slot & (step.count == 0))
        self.said[:, position] = step.said
        answers = self.row_options.latent_answer_ids
        if answers is not None:
            after = torch.where((pending > 0) & (pending < len(answers)), pending + 1, 0)
            forced = self.strategy.forced if not self.options.values.force_end else self.strategy.stops
            codes = [index + 1 for index, name in enumerate(self.strategy.stops) if name in forced]
            by_force = torch.isin(reason, torch.tensor(codes, device=reason.device)) if codes else reason < 0
            self.pending[:, position] = torch.where(by_force, 1, after)
        if not self.use_cache:
            self.vectors.pop(position, None)
        else:
            self.vectors = {}
        vector = self._slot_vector(step)
        if vector is not None:
            self.vectors[position] = vector
        self._record(step, position, reason, vector)

    def _slot_vector(self, step: LatentStep) -> torch.Tensor | None:
        """Noise, then trace hook, then the vector `(R, H)` to feed; `None` when no row becomes a slot."""
        vector, values = step.latent, self.options.values
        if values.latent_noise > 0:
            eligible = step.is_slot if values.latent_noise_first else step.is_open & (step.count > 0)
            if bool(eligible.any()):
                noise = torch.randn_like(vector)
                scale = (
                    values.latent_noise * vector.norm(dim=-1, keepdim=True) / (noise.norm(dim=-1, keepdim=True) + 1e-8)
                )
                vector = torch.where(eligible.unsqueeze(-1), vector + scale * noise, vector)
        if not bool(step.is_slot.any()):
            return None
        if values.latent_hook is not None:
            step.latent = vector
            edited = values.latent_hook(step)
            if edited is not None:
                if edited.shape != vector.shape:
                    raise ValueError(
                        f"latent_hook must return {tuple(vector.shape)} or None, got {tuple(edited.shape)}"
                    )
                vector = torch.where(step.is_slot.unsqueeze(-1), edited.to(vector), vector)
        return vector

    def _record(self, step: LatentStep, position: int, reason: torch.LongTensor, vector: torch.Tensor | None) -> None:
        self.records.pop(position, None)
        if not self.keep_trace or (vector is None and not bool((reason > 0).any())):
            return
        topk = self.options.values.latent_topk
        ids = probs = None
        if vector is not None and topk > 0:
            raw = self._logits[:, position - self.length - 1].float()
            probs, ids = raw.softmax(-1).topk(min(topk, raw.shape[-1]), dim=-1)
        self.records[position] = _Record(step.is_slot, reason, step.said, vector, ids, probs)

    def suppress(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        """No row writes or says an id that would be read as a latent; with `off` no span opens either."""
        if self.readable_ids:
            return scores
        banned = [self.config.latent_token_id, self.config.latent_patch_token_id]
        if not self.strategy.opens_span:
            banned.append(self.config.latent_start_token_id)
        scores = scores.clone()
        scores[:, [token for token in banned if token is not None]] = -float("inf")
        return scores

    @staticmethod
    def _force(scores: torch.FloatTensor, forced: torch.LongTensor) -> torch.FloatTensor:
        is_forced = (forced >= 0).unsqueeze(1)
        target = forced.clamp(min=0).unsqueeze(1)
        value = torch.where(is_forced, 0.0, scores.gather(1, target))
        return scores.masked_fill(is_forced, -float("inf")).scatter(1, target, value)

    # --- the trace ---

    def build_trace(self, output: Any, config: Any) -> LatentTrace:
        """Trace of the returned sequences; under beam search steps are gathered with `output.beam_indices`."""
        sequences = output.sequences
        rows, length = sequences.shape
        device = sequences.device
        parents = self._parents(output, rows, length)
        hidden = config.get_text_config().hidden_size
        packed: dict[str, list] = {
            name: [] for name in ("index", "inputs", "outputs", "known", "said", "ids", "probs")
        }
        reasons: dict[tuple[int, int], str] = {}
        if self.prompt_latents is not None:
            self._pack_prompt(packed, sequences)
        for position in sorted(self.records):
            if position >= length:
                continue
            record, parent = self.records[position], parents[:, position - self.prompt_length]
            alive = parent >= 0
            parent = parent.clamp(min=0)
            for row in (alive & (record.reason[parent] > 0)).nonzero()[:, 0].tolist():
                reasons[(row, position)] = self.strategy.stops[int(record.reason[parent[row]]) - 1]
            slots = (alive & record.is_slot[parent]).nonzero()[:, 0]
            if len(slots):
                self._pack(packed, record, position, slots, parent, parents, hidden)
        trace = self._assemble(packed, sequences, hidden, device)
        trace.spans = find_spans(
            sequences,
            trace.latent_mask,
            self.prompt_length,
            config.latent_start_token_id,
            config.latent_end_token_id,
            reasons,
        )
        return trace

    def _pack_prompt(self, packed: dict, sequences: torch.LongTensor) -> None:
        """Slots that stand in the prompt: their vectors are known, what they would have said and returned is not."""
        index = self._prompt_mask(sequences[:, : self.prompt_length]).nonzero()
        given, topk = self.prompt_latents[0], self.options.values.latent_topk
        vectors = given[index[:, 0] // (sequences.shape[0] // given.shape[0]), index[:, 1]]
        packed["index"].append(index)
        packed["inputs"].append(vectors)
        packed["outputs"].append(torch.zeros_like(vectors))
        packed["known"].append(index.new_zeros(len(index), dtype=torch.bool))
        packed["said"].append(sequences[index[:, 0], index[:, 1]])
        packed["ids"].append(sequences.new_full((len(index), topk), -1))
        packed["probs"].append(torch.zeros(len(index), topk, device=sequences.device))

    def _parents(self, output: Any, rows: int, length: int) -> torch.LongTensor:
        """`(rows, generated)` row of the running batch that wrote each id; -1 after the end of a beam."""
        beams = output.get("beam_indices")
        new = length - self.prompt_length
        if beams is not None:
            return torch.nn.functional.pad(beams.long(), (0, max(0, new - beams.shape[1])), value=-1)
        return torch.arange(rows, device=output.sequences.device).unsqueeze(1).expand(rows, new)

    def _pack(
        self, packed: dict, record: _Record, position: int, slots: Any, parent: Any, parents: Any, hidden: int
    ) -> None:
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
        output = record.vector.new_zeros(len(slots), hidden)
        if bool(known.any()):
            output[known] = self.outputs[position][following[known]]
        packed["outputs"].append(output)
        packed["known"].append(known)

    def _assemble(self, packed: dict, sequences: torch.LongTensor, hidden: int, device: torch.device) -> LatentTrace:
        def join(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.cat(packed[name]) if packed[name] else torch.zeros(0, *shape, dtype=dtype, device=device)

        index = join("index", 2, dtype=torch.long)
        order = (index[:, 0] * sequences.shape[1] + index[:, 1]).argsort()
        topk = self.options.values.latent_topk
        prompts = torch.arange(len(sequences), device=device) // (len(sequences) // self.num_prompts)
        positions = self.position_ids if self.prompt_length > 0 else None
        if positions is not None:  # under beam search the running rows are not the returned ones; a prompt's are equal
            rows = prompts * (positions.shape[1] // self.num_prompts)
            positions = positions[:, rows.to(positions.device), : sequences.shape[1]]
        values = {name: value for name, value in vars(self.options.values).items() if LATENT_OPTIONS[name].saved}
        token_ids = {
            f"latent_{role}token_id": getattr(self.config, f"latent_{role}token_id") for role in ("", "start_", "end_")
        }
        mask = self.attention_mask
        if mask is not None:
            mask = mask[prompts * (mask.shape[0] // self.num_prompts)]
        return LatentTrace(
            sequences=sequences,
            prompt_length=self.prompt_length,
            slot_index=index[order],
            slot_inputs=join("inputs", hidden)[order],
            slot_outputs=join("outputs", hidden)[order],
            has_output=join("known", dtype=torch.bool)[order],
            readable_ids=join("said", dtype=torch.long)[order],
            topk_ids=join("ids", topk, dtype=torch.long)[order] if topk else index.new_zeros(len(index), 0),
            topk_probs=join("probs", topk)[order] if topk else torch.zeros(len(index), 0, device=device),
            position_ids=positions,
            attention_mask=mask,
            info={"strategy": self.strategy.name, "options": values, **token_ids},
        )
