"""The published schedule of DMLR, written naively: what the search over latents is tested and measured against.

"Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space" (arXiv 2512.12623). Each step runs the
*whole* prompt twice, without a cache and with eager attention: once with its image, which the vision tower encodes
anew, with the attention maps of all layers and an autograd graph that nobody uses, to pick image tokens; and once with
placeholder rows for the image, to score all logits of a softmax over every position. The prompt of the answer is run
once more. Nothing of the search of this library is used: what is measured and tested against these runs must not run
in them.

Words: a *thought token* is a row of the prompt that the search moves, a *copy* a row that is interleaved with them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

FLOOR = 1e-10


@dataclass
class NaiveStep:
    """One step.

    Attributes:
        reward: of its candidate.
        is_new_best: whether it is the best so far.
        selection: of each thought token that gets copies, the columns that are copied; empty without injection.
        budget: copies of a thought token from here on, `None` for all image tokens.
        fed: rows that the reward read from the first thought token on: `-1 - t` thought token t, `p >= 0` a copy of
            column p; what stands behind the thought tokens is not listed.
        before, after: `(T, H)` thought tokens.
    """

    reward: float
    is_new_best: bool
    selection: dict[int, list[int]]
    budget: int | None
    fed: list[int]
    before: torch.Tensor
    after: torch.Tensor


@dataclass
class NaiveSearch:
    """What was found.

    Attributes:
        thoughts: `(T, H)` thought tokens after the best step, which the answer is decoded from.
        best_reward, best_step: 0.0 and 0 without a step.
        steps: all of them.
        forwards: tokens of every forward.
        vision_passes: how often the vision tower ran.
    """

    thoughts: torch.Tensor
    best_reward: float = 0.0
    best_step: int = 0
    steps: list[NaiveStep] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    vision_passes: int = 0


class NaivePrompt:
    """A prompt of one row in a stock model of the Qwen-VL families, eager attention.

    Args:
        model: head class, loaded with `attn_implementation="eager"`.
        inputs: `input_ids` `(1, L)`, with an image `pixel_values` and `image_grid_thw`.
        span: first thought token, and the column behind the last one.

    Raises:
        ValueError: another attention implementation, which returns no weights; more than one row.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], span: tuple[int, int]) -> None:
        if model.config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={model.config._attn_implementation!r} returns no attention weights; load the "
                "model with attn_implementation='eager'"
            )
        if len(inputs["input_ids"]) != 1:
            raise ValueError(f"{len(inputs['input_ids'])} rows; the published schedule takes one")
        self.model, self.span = model, span
        self.ids = inputs["input_ids"]
        self.images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        self.rows = model.get_input_embeddings()(self.ids)[0].detach()

    def image_columns(self) -> list[int]:
        """Columns of the first image."""
        found = (self.ids[0] == self.model.config.image_token_id).nonzero()[:, 0].tolist()
        gap = next((i for i in range(1, len(found)) if found[i] != found[i - 1] + 1), len(found))
        return found[:gap]

    def with_thoughts(self, thoughts: torch.Tensor) -> torch.Tensor:
        """`(L, H)` rows of the prompt."""
        start, stop = self.span
        return torch.cat([self.rows[:start], thoughts.to(self.rows), self.rows[stop:]])

    def interleaved(
        self, thoughts: torch.Tensor, selection: dict[int, list[int]], copies: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """Rows that the reward reads, and what stands from the first thought token on.

        Args:
            thoughts: `(T, H)`.
            selection: columns that are copied behind each thought token.
            copies: `(L, H)` the row that stands for each column.
        """
        start, stop = self.span
        codes = [code for offset in range(len(thoughts)) for code in (-1 - offset, *selection.get(offset, ()))]
        block = [thoughts[-1 - code] if code < 0 else copies[code].to(thoughts) for code in codes]
        rows = torch.cat([self.rows[:start], torch.stack(block).to(self.rows), self.rows[stop:]])
        # As published: the thought tokens are written over the rows of the prompt's span, although the sequence grew.
        rows[start:stop] = thoughts.to(rows)
        return rows, [-1 - offset for offset in range(len(thoughts))] + codes[len(thoughts) :]

    def forward(self, rows: torch.Tensor, images: dict[str, torch.Tensor], **options: Any) -> Any:
        """The whole model on rows `(L, H)`; positions are plain numbers on all axes."""
        positions = torch.arange(len(rows), device=rows.device).expand(3, 1, -1)
        mask = torch.ones(1, len(rows), device=rows.device)
        return self.model(
            inputs_embeds=rows[None], attention_mask=mask, position_ids=positions, use_cache=False, **images, **options
        )


def naive_search(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    span: tuple[int, int],
    *,
    max_num_steps: int,
    lr: float,
    sigma: float,
    generator: torch.Generator,
    sigma_decay: float = 0.95,
    reward_threshold: float = -1.0,
    reward_top_k: int = 10,
    num_selected_patches: int | None = None,
    initial_patch_count: int | None = None,
    patch_increment: int = 0,
    visual_insert_stride: int = 1,
    visual_injection_start_step: int = 0,
    visual_injection_interval: int = 1,
    visual_only: bool = False,
    use_auto_grad: bool = False,
) -> NaiveSearch:
    """The whole search; gradients should be on, as published.

    Args:
        model, inputs, span: see [`NaivePrompt`].
        generator: of the noise, on the CPU.
        visual_only: copies are final states of the image columns; else every copy is the placeholder's embedding.
        use_auto_grad: the published gradient mode, in which nothing moves.
        max_num_steps, lr, sigma, sigma_decay, reward_threshold, reward_top_k, num_selected_patches,
            initial_patch_count, patch_increment, visual_insert_stride, visual_injection_start_step,
            visual_injection_interval: published options.
    """
    prompt = NaivePrompt(model, inputs, span)
    thoughts = prompt.rows[slice(*span)].clone().float()
    run = NaiveSearch(thoughts)
    columns, cap = prompt.image_columns(), num_selected_patches or None
    budget = cap if not initial_patch_count else max(1, min(initial_patch_count, cap or initial_patch_count))
    locked: dict[int, list[int]] = {}
    for step in range(max_num_steps):
        noise = torch.randn(thoughts.shape, generator=generator).to(thoughts.device) * sigma
        candidate = thoughts + noise
        seen = prompt.forward(
            prompt.with_thoughts(candidate), prompt.images, output_attentions=True, output_hidden_states=True
        )
        run.forwards.append(len(prompt.rows))
        run.vision_passes += bool(prompt.images)
        selection, since = {}, step - visual_injection_start_step
        if since >= 0 and (visual_injection_interval <= 1 or since % visual_injection_interval == 0):
            attention = torch.stack(seen.attentions).mean((0, 2))[0]
            for offset in range(0, len(thoughts), visual_insert_stride):
                weights = attention[span[0] + offset, columns].tolist()
                selection[offset] = _select(weights, columns, locked.get(offset, []), budget)
        copies = seen.hidden_states[-1][0] if visual_only else prompt.rows
        rows, fed = prompt.interleaved(candidate, selection, copies.detach())
        with torch.set_grad_enabled(use_auto_grad):
            logits = prompt.forward(rows, {}).logits[0]
            reward = naive_confidence(logits, span, reward_top_k)
        run.forwards.append(len(rows))
        before, value = thoughts, reward.item()
        thoughts = thoughts if use_auto_grad else thoughts + lr * value * noise / sigma**2
        sigma, is_best = sigma * sigma_decay, value > run.best_reward
        if is_best:
            run.best_reward, run.best_step, run.thoughts, locked = value, step, thoughts, selection
            if patch_increment > 0 and cap and budget is not None:
                budget = min(cap, max(1, budget) + patch_increment)
        run.steps.append(NaiveStep(value, is_best, selection, budget, fed, before, thoughts))
        if 0 < reward_threshold <= value:
            break
    return run


def naive_confidence(logits: torch.Tensor, span: tuple[int, int], top_k: int) -> torch.Tensor:
    """Mean of `-ln(p + 1e-10)` over the likeliest tokens, at the thought tokens and the position behind them.

    Args:
        logits: `(L, V)`.
        span, top_k: see [`naive_search`].
    """
    probabilities = logits.float().softmax(-1)
    terms = [-(probabilities[place].topk(top_k).values + FLOOR).log().mean() for place in range(span[0], span[1] + 1)]
    return torch.stack(terms).mean()


@torch.no_grad()
def naive_search_answer(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    span: tuple[int, int],
    thoughts: torch.Tensor,
    **options: Any,
) -> list[int]:
    """Ids of the answer, greedy: the prompt with the thought tokens found, once more and whole; no copies.

    Args:
        thoughts: `(T, H)`.
        model, inputs, span: see [`NaivePrompt`].
        options: of `generate`.
    """
    prompt = NaivePrompt(model, inputs, span)
    rows = prompt.with_thoughts(thoughts)[None]
    mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
    return model.generate(
        inputs_embeds=rows, attention_mask=mask, do_sample=False, num_beams=1, **prompt.images, **options
    )[0].tolist()


def _select(weights: list[float], columns: list[int], locked: list[int], budget: int | None) -> list[int]:
    """Columns that a thought token is followed by: the locked ones, then by falling attention."""
    limit = min(budget or len(columns), len(columns))
    chosen = [column for column in dict.fromkeys(locked) if column in columns][:limit]
    for place in sorted(range(len(columns)), key=lambda place: -weights[place]):
        if len(chosen) < limit and columns[place] not in chosen:
            chosen.append(columns[place])
    return chosen


__all__ = [
    "NaivePrompt",
    "NaiveSearch",
    "NaiveStep",
    "naive_confidence",
    "naive_search",
    "naive_search_answer",
]
