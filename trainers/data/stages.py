"""Stages of a curriculum: which tokens a record has when its first explicit steps are replaced by latents.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603 (IVT-LR; card
2.4), and "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769 (Coconut; card
11.2).

For a record of `m` steps at stage `s`, with `M` the greatest stage and `c` latents a step:

| case | latents | explicit steps kept |
|---|---|---|
| `s <= M` | `c * s`, also where `m < s` | those from the `s`-th on, maybe none |
| `s > M`, padded to the maximum | `c * M` | none |
| `s > M`, not padded | `c * min(m, M)` | none |

A latent is a slot; in IVT-LR it is a block: copies of `K` image embeddings before the slot, fewer or none in the last
blocks when a record runs out of image tokens. The loss is on the steps that are kept and on the answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .dynamic_batching import is_count
from .llava_text import IGNORE_INDEX
from .staged_text import StagedExample


@dataclass(frozen=True)
class StageTokens:
    """Ids of the tokens that a stage writes.

    Args:
        slot: of a latent.
        patch: of an inserted image embedding, for `num_patches` above 0.
        start, end: around the latents, for `markers`.
    """

    slot: int
    patch: int | None = None
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class StageLayout:
    """How a stage is laid out.

    Args:
        max_latent_stage: the greatest stage whose latents are counted; above it no explicit step is left.
        pad_latent_to_max: above it every record has as many latents as that stage, else at most as many as steps.
        latents_per_step: `c_thought` of Coconut; 0 leaves steps out and puts nothing in their place.
        num_patches: image embeddings that a block copies (`K`), fewer when there are no more.
        vision_first: they stand before the slot (published), else behind it (paper).
        markers: write the start and the end token around the latents, also around none (Coconut).
        no_cot: neither steps nor latents at any stage: direct answers.
        max_latent_steps: of a record.

    Raises:
        ValueError: an option out of its range, or more latents than `max_latent_steps`; names both options.
    """

    max_latent_stage: int = 5
    pad_latent_to_max: bool = True
    latents_per_step: int = 1
    num_patches: int = 0
    vision_first: bool = True
    markers: bool = False
    no_cot: bool = False
    max_latent_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_latent_stage", "latents_per_step", "num_patches"):
            value = getattr(self, name)
            if value != 0 and not is_count(value):
                raise ValueError(f"{name}={value!r} must be an integer, 0 or more")
        most = self.max_latent_stage * self.latents_per_step
        if self.max_latent_steps is not None and most > self.max_latent_steps:
            raise ValueError(
                f"max_latent_stage={self.max_latent_stage} with latents_per_step={self.latents_per_step}: {most} "
                f"latents, above max_latent_steps={self.max_latent_steps}; lower one of the two, or raise the limit"
            )

    def count(self, num_steps: int, stage: int) -> tuple[int, int]:
        """Steps that are left out, and latents, of a record of `num_steps` steps at a stage."""
        if self.no_cot:
            return num_steps, 0
        if stage <= self.max_latent_stage:
            return min(stage, num_steps), stage * self.latents_per_step
        most = self.max_latent_stage if self.pad_latent_to_max else min(num_steps, self.max_latent_stage)
        return num_steps, most * self.latents_per_step


def expand_stage(
    example: StagedExample, stage: int, layout: StageLayout, tokens: StageTokens, num_image_tokens: int = 0
) -> dict[str, list[int]]:
    """Ids and labels of a record at a stage.

    Args:
        example: the record in pieces.
        stage: 0 writes all explicit steps.
        layout: options.
        tokens: ids; see [`StageTokens`] for which of them are needed.
        num_image_tokens: that the blocks of the record may copy, each at most once.

    Returns:
        `input_ids`: question, latents, the steps that are left, answer; `labels`: the same with -100 up to the last
        latent or marker.

    Raises:
        ValueError: a stage below 0, or a token that is needed and not given.
    """
    if stage != 0 and not is_count(stage):
        raise ValueError(f"stage={stage!r} must be an integer, 0 or more")
    skipped, latents = layout.count(len(example.steps), stage)
    prompt = example.question + _latents(latents, layout, tokens, num_image_tokens)
    rest = [token for step in example.steps[skipped:] for token in step] + example.answer
    return {"input_ids": prompt + rest, "labels": [IGNORE_INDEX] * len(prompt) + rest}


def stage_prompt(
    example: StagedExample, stage: int, layout: StageLayout, tokens: StageTokens, num_image_tokens: int = 0
) -> list[int]:
    """Ids of the prompt that a model of a stage is evaluated with: question, latents, and what a published prompt has
    behind them. As published by Coconut, without `pad_latent_to_max` a record has no more latents than steps here.

    Args:
        example, stage, layout, tokens, num_image_tokens: as in [`expand_stage`].
    """
    most = layout.max_latent_stage
    most = most if layout.pad_latent_to_max else min(most, len(example.steps))
    latents = min(stage, most) * layout.latents_per_step
    return example.question + _latents(latents, layout, tokens, num_image_tokens) + example.after_latents


def _latents(number: int, layout: StageLayout, tokens: StageTokens, num_image_tokens: int) -> list[int]:
    from modeling_latent.latent_blocks import lay_out_blocks  # loads torch

    needed = {"patch": number and layout.num_patches, "start": layout.markers, "end": layout.markers}
    missing = [name for name, is_needed in needed.items() if is_needed and getattr(tokens, name) is None]
    if missing:
        raise ValueError(
            f"the tokens lack {missing}, which num_patches={layout.num_patches} and markers={layout.markers} need; "
            "take a processor of a method that has them, or other options"
        )
    blocks = lay_out_blocks(
        number, layout.num_patches, num_image_tokens, tokens.slot, tokens.patch, vision_first=layout.vision_first
    )
    return [tokens.start, *blocks, tokens.end] if layout.markers else blocks


def lacks_patches(layout: StageLayout, num_latents: int, num_image_tokens: int) -> bool:
    """Whether the blocks of a record copy fewer image embeddings than `num_patches` each."""
    return num_latents * layout.num_patches > num_image_tokens


# Other stages mixed in


def mixed_stage(stage: int, num_steps: int, probability: float, key: Sequence[Any]) -> int:
    """The stage, or with some probability a uniform draw from 0 to the number of steps (Coconut's `uniform_prob`).

    The draw follows from `key` alone, so that it is the same in every process, worker and resumed run.

    Args:
        stage: scheduled.
        num_steps: of the record.
        probability: of another stage.
        key: what the draw follows from, e.g. seed, epoch and name of the record.

    Example:
        >>> [mixed_stage(1, 3, 1.0, (0, epoch, "a")) for epoch in range(6)]
        [3, 2, 1, 3, 1, 2]
    """
    if not probability:
        return stage
    draw = random.Random("\x1f".join(map(str, key)))
    return draw.randint(0, num_steps) if draw.random() < probability else stage


# The published padding


def pad_to_first_latent(
    examples: Sequence[dict[str, list[int]]], slot_id: int, pad_id: int
) -> dict[str, list[list[int]]]:
    """Rows padded as published: on the left until the first latents stand in one column, then on the right.

    Rows without a latent get no padding on the left. The library pads on the right alone; a plan of segments moves the
    rows itself.

    Args:
        examples: `input_ids` and `labels` of each row.
        slot_id, pad_id: of the tokens.

    Returns:
        `input_ids` (padding `pad_id`), `labels` (-100), `attention_mask` (0) and `position_ids` (0).
    """
    first = [ids.index(slot_id) if slot_id in ids else -1 for ids in (row["input_ids"] for row in examples)]
    shifts = [max(first) - place if place >= 0 else 0 for place in first]
    width = max(shift + len(row["input_ids"]) for shift, row in zip(shifts, examples, strict=True))
    batch: dict[str, list[list[int]]] = {
        name: [] for name in ("input_ids", "labels", "attention_mask", "position_ids")
    }
    for shift, row in zip(shifts, examples, strict=True):
        length = len(row["input_ids"])
        behind = width - shift - length
        whole = {**row, "attention_mask": [1] * length, "position_ids": list(range(length))}
        for name, rows in batch.items():
            padding = {"input_ids": pad_id, "labels": IGNORE_INDEX}.get(name, 0)
            rows.append([padding] * shift + whole[name] + [padding] * behind)
    return batch


__all__ = [
    "StageLayout",
    "StageTokens",
    "expand_stage",
    "lacks_patches",
    "mixed_stage",
    "pad_to_first_latent",
    "stage_prompt",
]
