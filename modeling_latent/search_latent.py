"""The search over latents: thought tokens in the prompt whose embeddings are moved at test time, for one question, so
that the model becomes surer of what it says; no weight is trained (DMLR, arXiv 2512.12623).

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

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .latent_attention import capture_attention_rows
from .latent_inputs import mask_of_prompts
from .search_options import search_settings
from .search_patches import Selection, interleaved, published_block
from .search_prefix import VISION_INPUTS, Prefix, flat_positions, run_prefix
from .search_state import SearchResult, SearchState, SearchStep, SearchTrace


class LatentSearch:
    """The search on one batch of prompts: [`run`] gives what was found, `search_answer.py` the prompt of the answer.

    Args:
        model: stock or latent model of ours, in evaluation mode.
        inputs: of the forward: `input_ids` and `attention_mask` `(B, L)`, images, and `position_ids` where they are
            not those that follow from these.
        thought_mask: `(B, L)` bool, where the thought tokens stand: the same number in every row, side by side.
        settings: see [`search_settings`].

    Raises:
        ValueError: a model without a cache that can be cut; thought tokens that are missing, scattered, padding, of
            unequal number, or with nothing before them; images behind them; names row and remedy.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], thought_mask: torch.Tensor, settings: SimpleNamespace
    ) -> None:
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            raise ValueError(
                f"{type(model).__name__} has no cache of keys and values that a step could be cut off again; search "
                "with a decoder whose layers are attention"
            )
        self.model, self.settings = model, settings
        self.reference = settings.mode == "reference"
        ids = inputs["input_ids"]
        mask = mask_of_prompts(model, ids, inputs.get("attention_mask"))
        self.device, self.batch = ids.device, len(ids)
        self.image_id = getattr(model.config, "image_token_id", None)
        self.vision = {name: inputs[name] for name in VISION_INPUTS if inputs.get(name) is not None}
        spans = [_span(row, thought_mask[row]) for row in range(self.batch)]
        self.num_thoughts = spans[0][1] - spans[0][0]
        unequal = next((row for row, (a, b) in enumerate(spans) if b - a != self.num_thoughts), None)
        if unequal is not None:
            raise ValueError(
                f"row {unequal} has {spans[unequal][1] - spans[unequal][0]} thought tokens, row 0 has "
                f"{self.num_thoughts}; a batch has one number of them"
            )
        listed = ids.tolist()
        self.suffixes = [
            [token for token, keep in zip(row[stop:], kept[stop:], strict=True) if keep]
            for row, kept, (_, stop) in zip(listed, mask.tolist(), spans, strict=True)
        ]
        self._check(listed, mask, spans)
        # Prefixes end side by side; self.shift is what a position of the prompt moves by.
        width = max(start for start, _ in spans)
        self.shift = [width - start for start, _ in spans]
        columns = torch.arange(width, device=self.device) - torch.tensor(self.shift, device=self.device).unsqueeze(1)
        inside, columns = columns >= 0, columns.clamp(min=0)
        self.prefix_mask = (mask.gather(1, columns) * inside).long()
        self.prefix_ids = ids.gather(1, columns)
        if self.vision and inputs.get("mm_token_type_ids") is not None:
            self.vision["mm_token_type_ids"] = inputs["mm_token_type_ids"].gather(1, columns) * self.prefix_mask
        self.positions = inputs.get("position_ids")
        if self.positions is not None:
            self.positions = self.positions.gather(-1, columns.expand(*self.positions.shape[:-1], -1))
        self.slots = torch.tensor([row[a:b] for row, (a, b) in zip(listed, spans, strict=True)], device=self.device)
        flat = flat_positions(model, self.prefix_mask) if self.reference else self.positions
        self.with_image = run_prefix(model, self.prefix_ids, self.prefix_mask, self.vision, flat)
        self._plain: Prefix | None = None

    # --- the prompt ---

    def _check(self, ids: list[list[int]], mask: torch.Tensor, spans: list[tuple[int, int]]) -> None:
        media = {getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video")} - {None}
        for row, (start, stop) in enumerate(spans):
            if not bool(mask[row, start:stop].all()):
                raise ValueError(f"row {row} has thought tokens where attention_mask is 0; let the mask cover them")
            if start == 0 or not bool(mask[row, start - 1]):
                raise ValueError(f"row {row} begins with its thought tokens; put the question before them")
            if media & set(ids[row][stop:]):
                raise ValueError(f"row {row} has an image behind its thought tokens; put images before them")
            if not self.suffixes[row] and self.settings.reward_rows != "thoughts":
                raise ValueError(
                    f"row {row} ends with its thought tokens, and reward_rows={self.settings.reward_rows!r} reads "
                    "what stands behind them; take a reward of the thought tokens (reward_rows='thoughts')"
                )

    @property
    def plain(self) -> Prefix:
        """The prefix in which image positions hold the embedding of their placeholder (reference mode)."""
        if not self.vision:
            return self.with_image
        if self._plain is None:
            self._plain = run_prefix(self.model, self.prefix_ids, self.prefix_mask, {})
        return self._plain

    def image_positions(self, row: int) -> list[int]:
        """Columns of the prefix that hold image tokens; in reference mode those of the first image."""
        if self.image_id is None or not self.vision:
            return []
        columns = ((self.prefix_ids[row] == self.image_id) & self.prefix_mask[row].bool()).nonzero()[:, 0].tolist()
        if self.reference:
            gap = next((i for i in range(1, len(columns)) if columns[i] != columns[i - 1] + 1), len(columns))
            columns = columns[:gap]
        return columns

    # --- forwards on the cache of the prefix ---

    def _forward(
        self, prefix: Prefix, cache: DynamicCache, rows: torch.Tensor, valid: torch.Tensor, keep: Any
    ) -> torch.Tensor:
        """Logits `(N, kept, V)` of rows `(N, n, H)` behind the prefix; the cache is as before."""
        try:
            return prefix.forward(cache, rows, valid, keep)
        finally:
            prefix.cut(cache)

    def attention_to_image(self, cache: DynamicCache, candidates: torch.Tensor) -> torch.Tensor:
        """`(N, T, P)` attention of thought tokens `(N, T, H)` on the prefix, mean over layers and heads."""
        number, thoughts = candidates.shape[:2]
        rows = torch.arange(thoughts, device=self.device).expand(number, -1)
        with capture_attention_rows(self.model, rows, gradients=False) as captured:
            self._forward(self.with_image, cache, candidates, torch.ones_like(rows), keep=1)
        return captured.mean()[..., : self.prefix_mask.shape[1]]

    def vectors(
        self, blocks: list[list[int]], tails: list[list[int]], thoughts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """What is fed for blocks with text behind them.

        Args:
            blocks: of each of N candidates, see [`interleaved`]; the candidates of a row stand side by side.
            tails: ids behind each block.
            thoughts: `(N, T, H)`.

        Returns:
            `(N, n, H)` vectors, padded on the right, and their mask `(N, n)`, 0 at padding.
        """
        length = max(len(block) + len(tail) for block, tail in zip(blocks, tails, strict=True))
        codes, ids, valid = [], [], []
        for block, tail in zip(blocks, tails, strict=True):
            rest = length - len(block) - len(tail)
            codes.append([*block, *[0] * (length - len(block))])
            ids.append([*[0] * len(block), *tail, *[0] * rest])
            valid.append([*[1] * (length - rest), *[0] * rest])
        codes, ids, valid = (torch.tensor(each, device=self.device) for each in (codes, ids, valid))
        lengths = torch.tensor([[len(block)] for block in blocks], device=self.device)
        text = self.model.get_input_embeddings()(ids)
        index = (-1 - codes).clamp(min=0).unsqueeze(-1).expand(-1, -1, thoughts.shape[-1])
        fed = thoughts.gather(1, index)
        if any(code >= 0 for block in blocks for code in block):
            fed = torch.where((codes < 0).unsqueeze(-1), fed, self._patches(codes.clamp(min=0)).to(fed))
        is_block = torch.arange(length, device=self.device) < lengths
        return torch.where(is_block.unsqueeze(-1), fed, text.to(fed)), valid

    def _patches(self, positions: torch.LongTensor) -> torch.Tensor:
        """`(N, n, H)` the vectors that stand for image tokens `(N, n)` between the thought tokens."""
        if self.reference and not self.settings.visual_only:
            return self.model.get_input_embeddings()(torch.full_like(positions, self.image_id))
        source = self.with_image.hidden if self.reference else self.with_image.embeds
        rows = torch.arange(self.batch, device=self.device).repeat_interleave(len(positions) // self.batch)
        return source[rows.unsqueeze(1), positions]

    def reward_logits(
        self, prefix: Prefix, cache: DynamicCache, blocks: list[list[int]], candidates: torch.Tensor, rows: str
    ) -> torch.Tensor:
        """`(N, rows, V)` logits that a reward reads.

        Args:
            blocks: of each of the N candidates.
            candidates: `(N, T, H)`.
            rows: see [`SearchReward`].
        """
        repeat = len(blocks) // self.batch
        read = [self._read(block, self.suffixes[number // repeat], rows) for number, block in enumerate(blocks)]
        heads, tails, places = (list(each) for each in zip(*read, strict=True))
        fed, valid = self.vectors(heads, tails, candidates)
        keep = sorted({place for row in places for place in row})
        index = torch.tensor([[keep.index(place) for place in row] for row in places], device=self.device)
        logits = self._forward(prefix, cache, fed, valid, torch.tensor(keep, device=self.device))
        return logits.gather(1, index.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    def _read(self, block: list[int], suffix: list[int], rows: str) -> tuple[list[int], list[int], list[int]]:
        """How much of a block and of what stands behind it a reward needs, and the places that it reads."""
        if rows == "answer":
            return block, suffix, [len(block) + len(suffix) - 1]
        # Where thought tokens occur twice (see `published_block`) it is the first that are read.
        places = [place for place, code in enumerate(block) if code < 0][: self.num_thoughts]
        if rows == "thoughts":
            return block[: places[-1] + 1], [], places
        end = self.num_thoughts if self.reference else len(block)  # the published code does not count image tokens
        return block[: end + 1], suffix[: max(0, end + 1 - len(block))], [*places, end]

    # --- the loop ---

    def initial_thoughts(self) -> torch.Tensor:
        """`(B, T, H)` embeddings of the ids in the slots; with `visual_only` the mean of the image embeddings, in
        paper mode (the published code asks Qwen for an attribute that it has not).

        Raises:
            ValueError: `visual_only` in paper mode, and a row without an image.
        """
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
            ValueError: in reference mode a step that interleaves image tokens in a row without an image; a reward
                that returns something else than one finite number for each candidate, or, with `use_auto_grad`, that
                has no gradient.
        """
        options, samples = self.settings, self.settings.num_noise_samples
        images = [self.image_positions(row) for row in range(self.batch)]
        state = SearchState(options, self.initial_thoughts(), images)
        self._check_images(images)
        prefix = self.plain if self.reference else self.with_image
        with self.with_image.expanded(samples) as seen, prefix.expanded(samples) as scored:
            scored = seen if prefix is self.with_image else scored
            for step in range(options.max_num_steps):
                if all(state.done):
                    break
                noise, before = state.draw(step), state.thoughts
                center = before.clone().requires_grad_(state.differentiates)
                with torch.set_grad_enabled(state.differentiates):
                    candidates = (center.unsqueeze(1) + noise).flatten(0, 1)
                    fed = candidates.to(self.model.dtype)
                    attention, selections, blocks = self._interleave(state, seen, fed, options.schedule.injects(step))
                    logits = self.reward_logits(prefix, scored, blocks, fed, options.reward_rows)
                    rewards = self._rewards(logits)
                    gradient = self._gradient(rewards, center) if state.differentiates else None
                rewards = rewards.detach().view(self.batch, samples)
                state.update(step, noise, rewards, candidates.detach(), selections, gradient)
                if trace is not None:
                    trace.add(
                        noise, before, state.thoughts, candidates, attention, rewards, logits, selections, blocks
                    )
        return state.result(self.shift)

    def _check_images(self, images: list[list[int]]) -> None:
        steps, schedule = self.settings.max_num_steps, self.settings.schedule
        step = next((step for step in range(steps) if schedule.injects(step)), None)
        row = next((row for row, positions in enumerate(images) if not positions), None)
        if self.reference and step is not None and row is not None:
            raise ValueError(
                f"row {row} has no image, and step {step} interleaves image tokens; set "
                f"visual_injection_start_step to {steps} or more, or add the image"
            )

    def _interleave(
        self, state: SearchState, cache: DynamicCache, candidates: torch.Tensor, injects: bool
    ) -> tuple[torch.Tensor | None, list[Selection], list[list[int]]]:
        """Attention on the image, image tokens and block of each candidate."""
        number, per_row = len(candidates), len(candidates) // self.batch
        attention, selections = None, [{} for _ in range(number)]
        if injects and any(row.positions for row in state.rows):
            with torch.no_grad():
                attention = self.attention_to_image(cache, candidates.detach())
            weights = attention.cpu()
            for index in range(number):
                row = state.rows[index // per_row]
                if row.positions:
                    selections[index] = row.select(weights[index][:, row.positions])
        build = published_block if self.reference else interleaved
        return attention, selections, [build(self.num_thoughts, selection) for selection in selections]

    def _rewards(self, logits: torch.Tensor) -> torch.Tensor:
        """`(N,)` float32."""
        rewards = self.settings.reward.function(logits, self.settings.reward_top_k)
        if not torch.is_tensor(rewards) or rewards.shape != logits.shape[:1]:
            found = tuple(rewards.shape) if torch.is_tensor(rewards) else type(rewards).__name__
            raise ValueError(f"the reward returned {found} for {len(logits)} candidates; return one number each, (N,)")
        return rewards.float()

    def _gradient(self, rewards: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """`(B, T, H)` of the mean reward of each row's samples."""
        if not rewards.requires_grad:
            raise ValueError(
                "use_auto_grad=True: the reward has no gradient; return a function of the logits that has one, leave "
                "torch.inference_mode, or leave use_auto_grad out"
            )
        return torch.autograd.grad(rewards.view(self.batch, -1).mean(1).sum(), center)[0]


def _span(row: int, mask: torch.Tensor) -> tuple[int, int]:
    """Begin and end of the thought tokens of a row."""
    places = mask.nonzero()[:, 0].tolist()
    if not places:
        raise ValueError(f"thought_mask has no thought token in row {row}; mark where they stand, at least one")
    if places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"the thought tokens of row {row} are not side by side; mark one run of them")
    return places[0], places[-1] + 1


__all__ = ["LatentSearch", "SearchResult", "SearchStep", "SearchTrace", "search_settings"]
