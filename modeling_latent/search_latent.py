"""Strategy `search`: thought tokens in the prompt whose embeddings are moved at test time, for one question, so that
the model becomes surer of what it says; no weight is trained (DMLR, arXiv 2512.12623).

    output = model.generate(**inputs, latent_strategy="search", num_thought_tokens=4, return_dict_in_generate=True)
    output = generate_with_search(stock_model, **inputs, num_thought_tokens=4)          # any stock checkpoint
    output = stock_model.generate(**inputs, custom_generate=search_decoding)

A step adds noise to the thought tokens, picks the image tokens that they attend to, scores the noisy tokens, and moves
the tokens by the score-function estimate of the gradient. `mode="paper"` (default): the reward sees the image, copies
of the picked image embeddings stand between the thought tokens at positions of their own, and stay in the prompt of
the answer. `mode="reference"` does what the published code does: the reward sees no image, the copies are rows of the
image placeholder, and they are gone in the answer.

What stands before the thought tokens is constant: it is run once, with its image, and all steps and noise samples of a
batch of questions run on its cache (the published schedule runs `2 S` whole prompts and the vision tower `S + 1`
times). Nothing of a step depends on other rows of the batch.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .latent_attention import capture_attention_rows
from .latent_inputs import mask_of_prompts
from .search_options import search_settings
from .search_patches import RowPatches, Selection, interleaved, published_block

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "mm_encoder_outputs", "image_sizes", "pixel_attention_mask")


@dataclass(frozen=True)
class SearchStep:
    """One step of one row.

    Args:
        step: from 0.
        reward: of the step, the mean over its noise samples.
        sigma: noise level after the step.
        is_new_best: whether the step was the best so far.
        patch_count: image tokens that stood between the thought tokens.
        patch_budget: image tokens of a thought token from here on, -1 without limit.
    """

    step: int
    reward: float
    sigma: float
    is_new_best: bool
    patch_count: int
    patch_budget: int


@dataclass
class SearchResult:
    """What a search found, one entry for each prompt.

    Args:
        best_reward: in reference mode 0.0 where there was no step, in paper mode `-inf`.
        best_step: from 0.
        stopped: `"reward_threshold"` or `"max_num_steps"`.
        steps: the steps of each prompt.
        thoughts: `(B, T, H)` what the answer was decoded from: in paper mode the noisy tokens that earned the best
            reward, in reference mode the tokens after the update of that step.
        patches: the image tokens of the best step, by thought token, as positions in the prompt (padding included).
        initial: `(B, T, H)` where the search began.
    """

    best_reward: list[float]
    best_step: list[int]
    stopped: list[str]
    steps: list[list[SearchStep]]
    thoughts: torch.Tensor
    patches: list[Selection]
    initial: torch.Tensor


@dataclass
class SearchTrace:
    """What happened at every step, for tests and figures; filled when one is passed.

    Args:
        noise, before, candidate, after: a tensor `(B, K, T, H)` a step, `before` and `after` `(B, T, H)`.
        attention: `(B, K, T, N)` on the image tokens, `None` at steps without image tokens.
        rewards: `(B, K)`.
        row_rewards: `(B, K, rows, V)` logits that the reward read.
        selections: of each prompt and sample.
        blocks: what was fed, of each prompt and sample, see [`interleaved`].
    """

    noise: list[torch.Tensor] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    candidate: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor | None] = field(default_factory=list)
    rewards: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    selections: list[list[list[Selection]]] = field(default_factory=list)
    blocks: list[list[list[list[int]]]] = field(default_factory=list)


@dataclass
class _Prefix:
    """What stands before the thought tokens, run once."""

    cache: DynamicCache
    embeds: torch.Tensor  # (B, P, H) as the first layer reads them, image embeddings included
    hidden: torch.Tensor  # (B, P, H) after the final norm
    positions: torch.Tensor  # (B, P) or (3, B, P)

    @property
    def next_position(self) -> torch.Tensor:
        """`(B, 1)` position of what follows."""
        positions = self.positions if self.positions.dim() == 2 else self.positions.amax(dim=0)
        return positions.amax(dim=1, keepdim=True) + 1


class LatentSearch:
    """The search on one batch of prompts; [`run`] gives the prompt of the answer.

    Args:
        model: stock or latent model of ours, in evaluation mode.
        inputs: of the forward: `input_ids` and `attention_mask` `(B, L)`, images.
        thought_mask: `(B, L)` bool, where the thought tokens stand: the same number in every row, side by side.
        settings: see [`search_settings`].

    Raises:
        ValueError: thought tokens that are missing, scattered or of unequal number, images behind them, or a cache
            that cannot be cut; names row and remedy.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], thought_mask: torch.Tensor, settings: SimpleNamespace
    ) -> None:
        self.model, self.settings = model, settings
        self.reference = settings.mode == "reference"
        ids = inputs["input_ids"]
        mask = mask_of_prompts(model, ids, inputs.get("attention_mask"))
        self.device, self.batch = ids.device, len(ids)
        self.image_id = getattr(model.config, "image_token_id", None)
        self.images = {name: inputs[name] for name in IMAGE_INPUTS if inputs.get(name) is not None}
        spans = [_span(row, thought_mask[row]) for row in range(self.batch)]
        self.num_thoughts = spans[0][1] - spans[0][0]
        unequal = next((row for row, (a, b) in enumerate(spans) if b - a != self.num_thoughts), None)
        if unequal is not None:
            raise ValueError(
                f"row {unequal} has {spans[unequal][1] - spans[unequal][0]} thought tokens, row 0 has "
                f"{self.num_thoughts}; a batch has one number of them"
            )
        self.ids = [row.tolist() for row in ids]
        self.suffixes = [
            [token for token, keep in zip(row[stop:], kept[stop:], strict=True) if keep]
            for row, kept, (_, stop) in zip(self.ids, mask.tolist(), spans, strict=True)
        ]
        self._check(mask, spans)
        self.first = [start for start, _ in spans]
        # Prefixes end side by side; self.shift is what a position of the prompt moves by.
        width = max(self.first)
        self.shift = [width - start for start in self.first]
        columns = torch.arange(width, device=self.device) - torch.tensor(self.shift, device=self.device).unsqueeze(1)
        inside = columns >= 0
        columns = columns.clamp(min=0)
        self.prefix_mask = (mask.gather(1, columns) * inside).long()
        self.prefix_ids = ids.gather(1, columns)
        types = inputs.get("mm_token_type_ids")
        self.types = None if types is None else types.gather(1, columns) * self.prefix_mask
        self.slots = torch.tensor([self.ids[row][a:b] for row, (a, b) in enumerate(spans)], device=self.device)
        self.with_image = self._run_prefix(image=True)
        self._plain: _Prefix | None = None

    # --- the prompt ---

    def _check(self, mask: torch.Tensor, spans: list[tuple[int, int]]) -> None:
        for row, (start, stop) in enumerate(spans):
            if start == 0 or not bool(mask[row, start - 1]):
                raise ValueError(f"row {row} begins with its thought tokens; put the question before them")
            if self.image_id is not None and self.image_id in self.ids[row][stop:]:
                raise ValueError(f"row {row} has an image behind its thought tokens; put images before them")
            if not self.suffixes[row] and self.settings.reward_rows != "thoughts":
                raise ValueError(
                    f"row {row} ends with its thought tokens, and reward_rows={self.settings.reward_rows!r} reads "
                    "what stands behind them; take a reward of the thought tokens (reward_rows='thoughts')"
                )

    @property
    def plain(self) -> _Prefix:
        """The prefix in which image positions hold the embedding of their placeholder (reference mode)."""
        if not self.images:
            return self.with_image
        if self._plain is None:
            self._plain = self._run_prefix(image=False)
        return self._plain

    def _flat(self, mask: torch.Tensor) -> torch.Tensor:
        """Positions that count tokens, as the published code's."""
        flat = (mask.cumsum(-1) - 1).clamp(min=0)
        channels = getattr(getattr(self.model, "model", self.model), "get_rope_index", None) is not None
        return flat.expand(3, -1, -1) if channels else flat

    def _run_prefix(self, image: bool) -> _Prefix:
        cache, seen = DynamicCache(), {}
        decoder = self.model.get_decoder()

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.update(embeds=kwargs["inputs_embeds"], positions=kwargs.get("position_ids"))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            seen["hidden"] = output[0]

        inputs: dict[str, Any] = {"attention_mask": self.prefix_mask, "past_key_values": cache, "use_cache": True}
        if image and self.images:
            inputs |= {"input_ids": self.prefix_ids, **self.images}
            if self.types is not None:
                inputs["mm_token_type_ids"] = self.types
        else:
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(self.prefix_ids)
        if self.reference or not (image and self.images):
            inputs["position_ids"] = self._flat(self.prefix_mask)
        handles = [
            decoder.register_forward_pre_hook(before, with_kwargs=True),
            decoder.register_forward_hook(after),
        ]
        try:
            self.model(**inputs, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        positions = seen["positions"]
        positions = self._flat(self.prefix_mask) if positions is None else positions
        if positions.dim() == 3:
            positions = positions[-3:]
        return _Prefix(cache, seen["embeds"], seen["hidden"], positions)

    def image_positions(self, row: int) -> list[int]:
        """Columns of the prefix that hold image tokens; in reference mode those of the first image."""
        if self.image_id is None or not self.images:
            return []
        columns = ((self.prefix_ids[row] == self.image_id) & self.prefix_mask[row].bool()).nonzero()[:, 0].tolist()
        if self.reference:
            gap = next((i for i in range(1, len(columns)) if columns[i] != columns[i - 1] + 1), len(columns))
            columns = columns[:gap]
        return columns

    # --- forwards on the cache of the prefix ---

    @contextmanager
    def expanded(self, prefix: _Prefix, samples: int) -> Iterator[DynamicCache]:
        """The cache of a prefix, repeated for noise samples."""
        if samples == 1:
            yield prefix.cache
            return
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(samples)
        yield cache

    def _forward(
        self, prefix: _Prefix, cache: DynamicCache, rows: torch.Tensor, valid: torch.Tensor, keep: Any
    ) -> torch.Tensor:
        """Logits `(N, kept, V)` of rows `(N, n, H)` behind the prefix; the cache is as before."""
        repeat = rows.shape[0] // self.batch
        mask = torch.cat([self.prefix_mask.repeat_interleave(repeat, dim=0), valid.long()], dim=1)
        positions = prefix.next_position.repeat_interleave(repeat, dim=0) + (valid.long().cumsum(1) - 1).clamp(min=0)
        if prefix.positions.dim() == 3:
            positions = positions.expand(3, -1, -1)
        try:
            return self.model(
                inputs_embeds=rows,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        finally:
            surplus = cache.get_seq_length() - self.prefix_mask.shape[1]
            if surplus > 0:
                cache.crop(-surplus)
            if torch.is_grad_enabled():  # what is left of the cache was there before
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def attention_to_image(self, cache: DynamicCache, candidates: torch.Tensor) -> torch.Tensor:
        """`(N, T, P)` attention of thought tokens `(N, T, H)` on the prefix, mean over layers and heads."""
        number, thoughts = candidates.shape[:2]
        rows = torch.arange(thoughts, device=self.device).expand(number, -1)
        valid = torch.ones(number, thoughts, dtype=torch.long, device=self.device)
        with capture_attention_rows(self.model, rows, gradients=False) as captured:
            self._forward(self.with_image, cache, candidates, valid, keep=1)
        return captured.mean()[..., : self.prefix_mask.shape[1]]

    def patch_row(self, row: int, position: int) -> torch.Tensor:
        """The vector that stands for an image token between the thought tokens."""
        if not self.reference:
            return self.with_image.embeds[row, position]
        if self.settings.visual_only:
            return self.with_image.hidden[row, position]
        return self.model.get_input_embeddings().weight[self.image_id]

    def block_rows(self, row: int, block: list[int], thoughts: torch.Tensor) -> torch.Tensor:
        """`(n, H)` vectors of a block, see [`interleaved`]."""
        vectors = [thoughts[-1 - code] if code < 0 else self.patch_row(row, code).to(thoughts) for code in block]
        return torch.stack(vectors)

    def reward_logits(
        self, prefix: _Prefix, cache: DynamicCache, blocks: list[list[int]], candidates: torch.Tensor, rows: str
    ) -> torch.Tensor:
        """`(N, rows, V)` logits that a reward reads.

        Args:
            blocks: of each of the N candidates.
            candidates: `(N, T, H)`.
            rows: see [`SearchReward`].
        """
        embed, repeat, fed, wanted = self.model.get_input_embeddings(), len(blocks) // self.batch, [], []
        for number, block in enumerate(blocks):
            row = number // repeat
            suffix = self.suffixes[row]
            places = [index for index, code in enumerate(block) if code < 0]
            vectors = self.block_rows(row, block, candidates[number])
            tail: list[int] = []
            if rows == "thoughts_and_end":
                if self.reference:  # the published code scores the unshifted span and the row behind it
                    places = list(range(self.num_thoughts + 1))
                    vectors = vectors[: self.num_thoughts + 1]
                tail = suffix[:1] if len(vectors) < self.num_thoughts + 1 or not self.reference else []
                places = places if self.reference else [*places, len(block)]
            elif rows == "answer":
                tail, places = suffix, [len(block) + len(suffix) - 1]
            if tail:
                vectors = torch.cat([vectors, embed(torch.tensor(tail, device=self.device)).to(vectors)])
            fed.append(vectors)
            wanted.append(places)
        length = max(map(len, fed))
        padded = torch.stack([nn.functional.pad(each, (0, 0, 0, length - len(each))) for each in fed])
        valid = torch.tensor([[1] * len(each) + [0] * (length - len(each)) for each in fed], device=self.device)
        keep = sorted({place for places in wanted for place in places})
        index = torch.tensor([[keep.index(place) for place in places] for places in wanted], device=self.device)
        logits = self._forward(prefix, cache, padded, valid, torch.tensor(keep, device=self.device))
        return logits.gather(1, index.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    # --- the loop ---

    def initial_thoughts(self) -> torch.Tensor:
        """`(B, T, H)` embeddings of the ids in the slots; with `visual_only` the mean of the image embeddings, in
        paper mode (the published code asks Qwen for an attribute that it has not)."""
        thoughts = self.model.get_input_embeddings()(self.slots).detach().float()
        if self.settings.visual_only and not self.reference:
            for row in range(self.batch):
                columns = self.image_positions(row)
                if not columns:
                    raise ValueError(f"visual_only=True: row {row} has no image; leave visual_only out, or add one")
                thoughts[row] = self.with_image.embeds[row, columns].float().mean(0)
        return thoughts

    def run(self, trace: SearchTrace | None = None) -> SearchResult:
        """Search.

        Args:
            trace: filled if given.

        Raises:
            ValueError: a step that interleaves image tokens in a row without an image, or a reward that returns
                something else than one number for each candidate.
        """
        options, reward, schedule = self.settings, self.settings.reward, self.settings.schedule
        samples, thoughts = options.num_noise_samples, self.initial_thoughts()
        initial, state = thoughts, _LoopState(self, thoughts)
        steps = options.max_num_steps
        injects = [schedule.injects(step) for step in range(steps)]
        if any(injects):
            missing = next((row for row in range(self.batch) if not state.rows[row].positions), None)
            if missing is not None and self.reference:
                raise ValueError(
                    f"row {missing} has no image, and step {injects.index(True)} interleaves image tokens; set "
                    f"visual_injection_start_step to {steps} or more, or add the image"
                )
        prefix = self.plain if self.reference else self.with_image
        optimizer = state.optimizer(options)
        with self.expanded(self.with_image, samples) as seen, self.expanded(prefix, samples) as scored:
            scored = seen if prefix is self.with_image else scored
            for step in range(steps):
                if all(state.done):
                    break
                sigma = state.sigma(step)
                noise = state.draw(sigma)
                before = state.thoughts
                differentiates = options.use_auto_grad and not self.reference
                center = before.clone().requires_grad_(differentiates)
                with torch.set_grad_enabled(differentiates):
                    candidates = (center.unsqueeze(1) + noise).flatten(0, 1)
                    fed = candidates.to(self.model.dtype)
                    attention, selections, blocks = self._interleave(state, seen, fed, injects[step])
                    logits = self.reward_logits(prefix, scored, blocks, fed, options.reward_rows)
                    rewards = reward.function(logits, options.reward_top_k)
                    if rewards.shape != (len(candidates),):
                        raise ValueError(
                            f"the reward returned {tuple(rewards.shape)} for {len(candidates)} candidates; return "
                            "one number each, (N,)"
                        )
                    rewards = rewards.float().view(self.batch, samples)
                    gradient = torch.autograd.grad(rewards.mean(1).sum(), center)[0] if differentiates else None
                rewards = rewards.detach()
                state.update(step, sigma, noise, rewards, candidates.detach(), selections, gradient, optimizer)
                if trace is not None:
                    shape = (self.batch, samples)
                    trace.noise.append(noise)
                    trace.before.append(before)
                    trace.candidate.append(candidates.detach().unflatten(0, shape))
                    trace.after.append(state.thoughts)
                    trace.attention.append(None if attention is None else attention.unflatten(0, shape))
                    trace.rewards.append(rewards)
                    trace.logits.append(logits.detach().unflatten(0, shape))
                    trace.selections.append(_by_row(selections, samples))
                    trace.blocks.append(_by_row(blocks, samples))
        return state.result(initial)

    def _interleave(
        self, state: "_LoopState", cache: DynamicCache, candidates: torch.Tensor, injects: bool
    ) -> tuple[torch.Tensor | None, list[Selection], list[list[int]]]:
        """Attention on the image, image tokens and block of each candidate."""
        number, per_row = len(candidates), len(candidates) // self.batch
        attention, selections = None, [{} for _ in range(number)]
        if injects and any(row.positions for row in state.rows):
            with torch.no_grad():
                attention = self.attention_to_image(cache, candidates.detach())
            for index in range(number):
                row = state.rows[index // per_row]
                if row.positions:
                    selections[index] = row.select(attention[index][:, row.positions].cpu())
        build = published_block if self.reference else interleaved
        return attention, selections, [build(self.num_thoughts, selection) for selection in selections]

    # --- the prompt of the answer ---

    def answer_inputs(self, result: SearchResult) -> dict[str, Any]:
        """Inputs of `generate` for the answer: ids, mask, positions, the vectors of the thought tokens, and the cache
        of all but the last position. Rows are padded on the left.

        Returns:
            `input_ids`, `attention_mask`, `latent_mask` `(B, L')`, `latent_embeds` `(B, L', H)`, `position_ids`
            `(B, L')` or `(4, B, L')`, `past_key_values`. A thought token and a copy of an image token carry the id of
            the slot.
        """
        embed, tails, tail_ids, latent = self.model.get_input_embeddings(), [], [], []
        for row in range(self.batch):
            selection = result.patches[row] if self.settings.inject_in_decode else {}
            shifted = {offset: [place + self.shift[row] for place in each] for offset, each in selection.items()}
            block = interleaved(self.num_thoughts, shifted)
            vectors = self.block_rows(row, block, result.thoughts[row].to(self.model.dtype))
            suffix = torch.tensor(self.suffixes[row], dtype=torch.long, device=self.device)
            tails.append(torch.cat([vectors, embed(suffix).to(vectors)]))
            tail_ids.append([int(self.slots[row, 0])] * len(block) + self.suffixes[row])
            latent.append(len(block))
        width, prefix = max(map(len, tails)), self.with_image
        valid = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in tails], device=self.device)
        padded = torch.stack([nn.functional.pad(each, (0, 0, 0, width - len(each))) for each in tails])
        cache = copy.deepcopy(prefix.cache)
        mask = torch.cat([self.prefix_mask, valid], dim=1)
        positions = prefix.next_position + (valid.cumsum(1) - 1).clamp(min=0)
        if prefix.positions.dim() == 3:
            positions = positions.expand(3, -1, -1)
        self.model(
            inputs_embeds=padded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return self._left_padded(
            cache, mask, torch.cat([prefix.positions, positions], dim=-1), padded, tail_ids, latent
        )

    def _left_padded(
        self,
        cache: DynamicCache,
        mask: torch.Tensor,
        positions: torch.Tensor,
        tails: torch.Tensor,
        tail_ids: list[list[int]],
        latent: list[int],
    ) -> dict[str, Any]:
        """Everything with its padding moved to the left, and the cache without the last position."""
        order = mask.argsort(dim=1, stable=True)  # zeros first, ones in their order
        order = order[:, int((mask == 0).sum(dim=1).min()) :]
        for layer in cache.layers:
            index = order[:, :-1].view(self.batch, 1, -1, 1)
            for name in ("keys", "values"):
                value = getattr(layer, name)
                setattr(layer, name, value.gather(2, index.expand(-1, value.shape[1], -1, value.shape[-1])))
        width = tails.shape[1]
        ids = torch.cat([self.prefix_ids, self.prefix_ids.new_zeros(self.batch, width)], dim=1)
        is_latent = torch.zeros_like(ids, dtype=torch.bool)
        start = self.prefix_ids.shape[1]
        for row, (tokens, count) in enumerate(zip(tail_ids, latent, strict=True)):
            ids[row, start : start + len(tokens)] = torch.tensor(tokens, device=self.device)
            is_latent[row, start : start + count] = True
        embeds = torch.cat([tails.new_zeros(self.batch, start, tails.shape[-1]), tails], dim=1)
        pad = self.model.generation_config.pad_token_id
        new_mask = mask.gather(1, order)
        new_ids = ids.gather(1, order)
        new_ids = new_ids.masked_fill(new_mask == 0, 0 if pad is None else pad)
        index = order.expand(*positions.shape[:-1], -1) if positions.dim() == 3 else order
        new_positions = positions.gather(-1, index).masked_fill(new_mask == 0, 0)
        if positions.dim() == 3:  # the stock loop of Qwen has a channel that counts tokens, before the others
            new_positions = torch.cat([(new_mask.cumsum(1) - 1).clamp(min=0).unsqueeze(0), new_positions])
        new_latent = is_latent.gather(1, order)
        new_embeds = embeds.gather(1, order.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        return {
            "input_ids": new_ids,
            "attention_mask": new_mask,
            "position_ids": new_positions,
            "latent_embeds": new_embeds * new_latent.unsqueeze(-1),
            "latent_mask": new_latent,
            "past_key_values": cache,
        }


def _by_row(values: list, samples: int) -> list[list]:
    return [values[start : start + samples] for start in range(0, len(values), samples)]


def _span(row: int, mask: torch.Tensor) -> tuple[int, int]:
    """Begin and end of the thought tokens of a row."""
    places = mask.nonzero()[:, 0].tolist()
    if not places:
        raise ValueError(f"thought_mask has no thought token in row {row}; mark where they stand, at least one")
    if places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"the thought tokens of row {row} are not side by side; mark one run of them")
    return places[0], places[-1] + 1


class _LoopState:
    """Thought tokens, best step, image tokens and noise of every row."""

    def __init__(self, search: LatentSearch, thoughts: torch.Tensor) -> None:
        options = search.settings
        self.search, self.options, self.thoughts = search, options, thoughts
        batch = search.batch
        self.rows = [RowPatches(search.image_positions(row), options.schedule) for row in range(batch)]
        self.best = torch.full((batch,), 0.0 if search.reference else -torch.inf)
        self.best_step, self.best_thoughts = [0] * batch, thoughts.clone()
        self.best_patches: list[Selection] = [{} for _ in range(batch)]
        self.steps: list[list[SearchStep]] = [[] for _ in range(batch)]
        self.done, self.stopped = [False] * batch, ["max_num_steps"] * batch
        self.generators = options.generators(batch)
        self.scale = torch.ones(batch, device=thoughts.device)
        if options.relative_sigma:
            self.scale = thoughts.pow(2).mean((1, 2)).sqrt()

    def sigma(self, step: int) -> float:
        """Noise level of a step, before it is scaled."""
        return self.options.sigma * self.options.sigma_decay**step

    def draw(self, sigma: float) -> torch.Tensor:
        """`(B, K, T, H)` noise: one draw on the CPU for each sample of each row, so that a row does not depend on the
        others; with antithetic pairs the second half of the samples has the opposite sign."""
        shape, samples = self.thoughts.shape[1:], self.options.num_noise_samples
        drawn = samples // 2 if self.options.baseline == "antithetic" else samples
        noise = torch.stack(
            [
                torch.stack([torch.randn(shape, generator=each) * sigma for _ in range(drawn)])
                for each in self.generators
            ]
        )
        if self.options.baseline == "antithetic":
            noise = torch.cat([noise, -noise], dim=1)
        return noise.to(self.thoughts.device) * self.scale.view(-1, 1, 1, 1)

    def optimizer(self, options: SimpleNamespace) -> torch.optim.Optimizer | None:
        """Adam that ascends, for the gradient mode."""
        if not options.use_auto_grad or self.search.reference:
            return None
        self.parameter = nn.Parameter(self.thoughts.clone())
        return torch.optim.Adam([self.parameter], lr=options.lr, maximize=True)

    def update(
        self,
        step: int,
        sigma: float,
        noise: torch.Tensor,
        rewards: torch.Tensor,
        candidates: torch.Tensor,
        selections: list[Selection],
        gradient: torch.Tensor | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Move the thought tokens, and keep the best step; rows that stopped stay as they are."""
        options, reference, samples = self.options, self.search.reference, rewards.shape[1]
        active = torch.tensor([not done for done in self.done], device=rewards.device)
        if optimizer is not None:
            self.parameter.grad = gradient * active.view(-1, 1, 1)
            optimizer.step()
            moved = self.parameter.detach().clone()
        elif options.use_auto_grad:  # the published gradient mode builds its candidate from a copy: nothing moves
            moved = self.thoughts
        else:
            centered = rewards
            if options.baseline == "mean":
                centered = (rewards - rewards.mean(1, keepdim=True)) * samples / (samples - 1)
            level = (sigma * self.scale).view(-1, 1, 1)
            weights = centered.view(*rewards.shape, 1, 1)
            moved = self.thoughts + options.lr * (weights * noise).mean(1) / level**2
        self.thoughts = torch.where(active.view(-1, 1, 1), moved, self.thoughts)
        if optimizer is not None:
            self.parameter.data.copy_(self.thoughts)
        after, chosen = sigma * options.sigma_decay, rewards.argmax(1).tolist()
        for row, done in enumerate(self.done):
            if done:
                continue
            # The published loop draws one sample; of several the best one is what a step is judged by.
            value = rewards[row, chosen[row]].item()
            index = row * samples + chosen[row]
            is_best = value > self.best[row].item()
            if is_best:
                self.best[row], self.best_step[row] = value, step
                self.best_thoughts[row] = self.thoughts[row] if reference else candidates[index]
                self.best_patches[row] = selections[index]
                self.rows[row].improve(selections[index])
            budget = self.rows[row].budget
            self.steps[row].append(
                SearchStep(
                    step=step,
                    reward=value,
                    sigma=after,
                    is_new_best=is_best,
                    patch_count=sum(map(len, selections[index].values())),
                    patch_budget=-1 if budget is None else budget,
                )
            )
            if options.reward_threshold > 0 and value >= options.reward_threshold:
                self.done[row], self.stopped[row] = True, "reward_threshold"

    def result(self, initial: torch.Tensor) -> SearchResult:
        """What was found; positions of image tokens as in the prompt that was given."""
        shift = self.search.shift
        return SearchResult(
            best_reward=self.best.tolist(),
            best_step=self.best_step,
            stopped=self.stopped,
            steps=self.steps,
            thoughts=self.best_thoughts,
            patches=[
                {offset: [place - shift[row] for place in each] for offset, each in chosen.items()}
                for row, chosen in enumerate(self.best_patches)
            ],
            initial=initial,
        )


__all__ = ["LatentSearch", "SearchResult", "SearchStep", "SearchTrace", "search_settings"]
