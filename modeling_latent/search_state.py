"""The state of a search over latents (thought tokens, noise, best step, image tokens of every row), and its records.

Source: DMLR, arXiv 2512.12623 and its published loop, of which this is the update.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from .search_patches import RowPatches, Selection


@dataclass(frozen=True)
class SearchStep:
    """One step of one row.

    Args:
        step: from 0.
        reward: of the step: of its best noise sample.
        sigma: noise level after the step, in units of `relative_sigma` where that is on.
        is_new_best: whether the step was the best so far.
        patch_count: image tokens that stood between the thought tokens of that sample.
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
        best_reward: where there was no step, in reference mode 0.0, in paper mode `-inf`.
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
    """What happened at every step, one entry a step, for tests and figures; filled when one is passed.

    Args:
        noise, candidate: `(B, K, T, H)` of `K` noise samples.
        before, after: `(B, T, H)` thought tokens.
        attention: `(B, K, T, P)` of the thought tokens on what stands before them, `None` at steps without image
            tokens.
        rewards: `(B, K)`.
        logits: `(B, K, rows, V)` what the reward read.
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

    def add(
        self,
        noise: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        candidates: torch.Tensor,
        attention: torch.Tensor | None,
        rewards: torch.Tensor,
        logits: torch.Tensor,
        selections: list[Selection],
        blocks: list[list[int]],
    ) -> None:
        """Add a step; values of candidates have one row a candidate, the samples of a prompt side by side."""
        shape, samples = noise.shape[:2], noise.shape[1]
        starts = range(0, len(selections), samples)
        self.noise.append(noise)
        self.before.append(before)
        self.after.append(after)
        self.candidate.append(candidates.detach().unflatten(0, shape))
        self.attention.append(None if attention is None else attention.unflatten(0, shape))
        self.rewards.append(rewards)
        self.logits.append(logits.detach().unflatten(0, shape))
        self.selections.append([selections[start : start + samples] for start in starts])
        self.blocks.append([blocks[start : start + samples] for start in starts])


class SearchState:
    """Thought tokens, best step, image tokens and noise of every row.

    Args:
        options: see [`search_settings`].
        thoughts: `(B, T, H)` float32, where the search begins.
        image_positions: of each row, the positions of its image tokens in the prefix.

    Raises:
        ValueError: `relative_sigma` with first thought tokens of zeros, which give no unit.
    """

    def __init__(self, options: SimpleNamespace, thoughts: torch.Tensor, image_positions: list[list[int]]) -> None:
        self.options, self.initial, self.thoughts = options, thoughts, thoughts
        self.reference = options.mode == "reference"
        self.differentiates = options.use_auto_grad and not self.reference
        batch = len(thoughts)
        self.rows = [RowPatches(positions, options.schedule) for positions in image_positions]
        self.best = [0.0 if self.reference else -float("inf")] * batch
        self.best_step, self.best_thoughts = [0] * batch, thoughts.clone()
        self.best_patches: list[Selection] = [{} for _ in range(batch)]
        self.steps: list[list[SearchStep]] = [[] for _ in range(batch)]
        self.done, self.stopped = [False] * batch, ["max_num_steps"] * batch
        self.generators = options.generators(batch)
        self.scale = torch.ones(batch, 1, 1, device=thoughts.device)
        if options.relative_sigma:
            self.scale = thoughts.pow(2).mean((1, 2), keepdim=True).sqrt()
            zero = (self.scale.flatten() == 0).nonzero()[:, 0].tolist()
            if zero:
                raise ValueError(
                    f"relative_sigma=True: the thought tokens of rows {zero} begin at zero, which gives no unit; "
                    "leave relative_sigma out, or take another thought_token_id"
                )
        if self.differentiates:
            self.parameter = nn.Parameter(thoughts.clone())
            self.optimizer = torch.optim.Adam([self.parameter], lr=options.lr, maximize=True)

    def sigma(self, step: int) -> float:
        """Noise level of a step, before it is scaled."""
        return self.options.sigma * self.options.sigma_decay**step

    def draw(self, step: int) -> torch.Tensor:
        """`(B, K, T, H)` noise of a step: one draw on the CPU for each sample of each row, so that a row does not
        depend on the others; with antithetic pairs the second half of the samples has the opposite sign."""
        shape, samples, sigma = self.thoughts.shape[1:], self.options.num_noise_samples, self.sigma(step)
        drawn = samples // 2 if self.options.baseline == "antithetic" else samples
        rows = [
            torch.stack([torch.randn(shape, generator=generator) * sigma for _ in range(drawn)])
            for generator in self.generators
        ]
        noise = torch.stack(rows)
        if self.options.baseline == "antithetic":
            noise = torch.cat([noise, -noise], dim=1)
        return noise.to(self.thoughts.device) * self.scale.unsqueeze(1)

    def update(
        self,
        step: int,
        noise: torch.Tensor,
        rewards: torch.Tensor,
        candidates: torch.Tensor,
        selections: list[Selection],
        gradient: torch.Tensor | None = None,
    ) -> None:
        """Move the thought tokens, and keep the best step; rows that stopped stay as they are.

        Args:
            noise: `(B, K, T, H)` of [`draw`].
            rewards: `(B, K)`.
            candidates: `(B * K, T, H)` thought tokens with noise.
            selections: image tokens of each candidate.
            gradient: `(B, T, H)` of the mean reward by the thought tokens, with `use_auto_grad` in paper mode.

        Raises:
            ValueError: a reward that is not finite.
        """
        values = rewards.tolist()
        for row, done in enumerate(self.done):
            if not done and not all(map(math.isfinite, values[row])):
                raise ValueError(
                    f"step {step}, row {row}: the reward is {values[row]}, and no step can follow; take a smaller "
                    "sigma or lr, another reward, or a model in float32"
                )
        active = torch.tensor([not done for done in self.done], device=rewards.device).view(-1, 1, 1)
        moved = self._moved(step, noise, rewards, None if gradient is None else gradient * active)
        self.thoughts = torch.where(active, moved, self.thoughts)
        if self.differentiates:
            self.parameter.data.copy_(self.thoughts)
        for row, done in enumerate(self.done):
            if not done:
                # The published loop draws one sample; of several the best one is what a step is judged by.
                sample = max(range(len(values[row])), key=values[row].__getitem__)
                index = row * len(values[row]) + sample
                self._judge(row, step, values[row][sample], candidates[index], selections[index])

    def _moved(
        self, step: int, noise: torch.Tensor, rewards: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        """`(B, T, H)` the thought tokens after a step."""
        options, samples = self.options, rewards.shape[1]
        if self.differentiates:
            self.parameter.grad = gradient
            self.optimizer.step()
            return self.parameter.detach().clone()
        if options.use_auto_grad:  # the published gradient mode builds its candidate from a copy: nothing moves
            return self.thoughts
        if options.baseline == "mean":
            rewards = (rewards - rewards.mean(1, keepdim=True)) * samples / (samples - 1)
        weights = rewards.view(*rewards.shape, 1, 1)
        return self.thoughts + options.lr * (weights * noise).mean(1) / (self.sigma(step) * self.scale) ** 2

    def _judge(self, row: int, step: int, reward: float, candidate: torch.Tensor, selection: Selection) -> None:
        """Keep a step if it is the best, note it, and stop the row if it is good enough."""
        patches, is_best = self.rows[row], reward > self.best[row]
        if is_best:
            self.best[row], self.best_step[row] = reward, step
            self.best_thoughts[row] = self.thoughts[row] if self.reference else candidate
            self.best_patches[row] = selection
            patches.improve(selection)
        self.steps[row].append(
            SearchStep(
                step=step,
                reward=reward,
                sigma=self.sigma(step) * self.options.sigma_decay,
                is_new_best=is_best,
                patch_count=sum(map(len, selection.values())),
                patch_budget=-1 if patches.budget is None else patches.budget,
            )
        )
        if self.options.reward_threshold > 0 and reward >= self.options.reward_threshold:
            self.done[row], self.stopped[row] = True, "reward_threshold"

    def result(self, shift: list[int]) -> SearchResult:
        """What was found.

        Args:
            shift: of each row, what a position in the prefix is larger than in the prompt.
        """
        return SearchResult(
            best_reward=self.best,
            best_step=self.best_step,
            stopped=self.stopped,
            steps=self.steps,
            thoughts=self.best_thoughts,
            patches=[
                {offset: [place - by for place in places] for offset, places in chosen.items()}
                for chosen, by in zip(self.best_patches, shift, strict=True)
            ],
            initial=self.initial,
        )


__all__ = ["SearchResult", "SearchState", "SearchStep", "SearchTrace"]
