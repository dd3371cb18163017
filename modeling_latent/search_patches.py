"""Which image tokens the search over latents interleaves with its thought tokens, and in which order.

Source: DMLR, arXiv 2512.12623 and its published loop. A row has a budget of image tokens for each thought token: those
of the best step so far come first, then those that the thought attends to most. An improvement raises the budget.
"""

from dataclasses import dataclass, field

import torch

Selection = dict[int, list[int]]  # offset of a thought token -> positions of image tokens in the prompt, in order


@dataclass(frozen=True)
class PatchSchedule:
    """When and how many image tokens are interleaved.

    Args:
        cap: most image tokens of a thought token; `None` for no cap.
        initial: image tokens at the beginning; `None`: the cap, without a cap all.
        increment: how many more after an improvement; without a cap it has no effect, as published.
        stride: only every so many-th thought token gets some.
        start: first step that interleaves.
        interval: every so many-th step from there on.
    """

    cap: int | None = None
    initial: int | None = None
    increment: int = 0
    stride: int = 1
    start: int = 0
    interval: int = 1

    def injects(self, step: int) -> bool:
        """Whether a step, counted from 0, interleaves."""
        return step >= self.start and (self.interval <= 1 or (step - self.start) % self.interval == 0)

    def first_budget(self) -> int | None:
        """Image tokens of a thought token at the beginning; `None` for all."""
        if self.initial is None or self.initial <= 0:
            return self.cap
        return self.initial if self.cap is None else max(1, min(self.initial, self.cap))

    def raised(self, budget: int | None) -> int | None:
        """The budget after an improvement."""
        if self.increment <= 0 or self.cap is None or budget is None:
            return budget
        return min(self.cap, max(1, budget) + self.increment)

    def offsets(self, num_thoughts: int) -> range:
        """The thought tokens that get image tokens."""
        return range(0, num_thoughts, self.stride)


@dataclass
class RowPatches:
    """The image tokens of one row (one question) during a search.

    Args:
        positions: of its image tokens in the prompt, in order.
        schedule: see [`PatchSchedule`].
    """

    positions: list[int]
    schedule: PatchSchedule
    locked: Selection = field(default_factory=dict)
    budget: int | None = None

    def __post_init__(self) -> None:
        self.budget = self.schedule.first_budget()

    def select(self, attention: torch.Tensor) -> Selection:
        """Image tokens for each thought token, now.

        Args:
            attention: `(T, N)` of the thought tokens on the image tokens.

        Returns:
            Offset to positions in the prompt: the locked ones first, then by falling attention, up to the budget.
        """
        number = len(self.positions)
        limit = min(self.budget or number, number)
        chosen: Selection = {}
        for offset in self.schedule.offsets(attention.shape[0]):
            kept = [place for place in dict.fromkeys(self.locked.get(offset, [])) if place in set(self.positions)]
            kept = kept[:limit]
            order = attention[offset].argsort(descending=True, stable=True).tolist() if len(kept) < limit else []
            for index in order:
                if len(kept) == limit:
                    break
                if self.positions[index] not in kept:
                    kept.append(self.positions[index])
            chosen[offset] = kept
        return chosen

    def improve(self, selection: Selection) -> None:
        """A step was the best so far: keep its image tokens and raise the budget."""
        self.locked = selection
        self.budget = self.schedule.raised(self.budget)


def interleaved(num_thoughts: int, selection: Selection) -> list[int]:
    """A block of thought tokens, each before its image tokens: `-1 - t` is thought token `t`, any other number the
    position of an image token in the prompt."""
    block = []
    for offset in range(num_thoughts):
        block += [-1 - offset, *selection.get(offset, [])]
    return block


def published_block(num_thoughts: int, selection: Selection) -> list[int]:
    """What the published code feeds: it writes the thought tokens over the first rows of the interleaved block, so
    that the image tokens among them are lost and later thought tokens occur twice."""
    return [-1 - offset for offset in range(num_thoughts)] + interleaved(num_thoughts, selection)[num_thoughts:]


__all__ = ["PatchSchedule", "RowPatches", "Selection", "interleaved", "published_block"]
