"""From a record with regions to the text of its turns, and to the prompts of the second stage, in the layout of LVR.

Paper: "Latent Visual Reasoning", arXiv 2509.24251 (card sections 2.3, 2.4 and 2.7).

A region of n image tokens becomes `<|lvr_start|>`, n slots, `<|lvr_latent_end|>`, `<|lvr_end|>`. How many tokens a
region has depends on the size to which its image was scaled, so the text is made once the image grids are known.

Deviations from the reference, on purpose, each with a flag of `RegionLayout` for the published behaviour: text before
the first region is kept; the regions of a conversation count through its turns; a region too many or too few is an
error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .boxes import join_regions as joined_region
from .boxes import region_tokens
from .llava_text import (
    DEFAULT_SYSTEM_MESSAGE,
    IMAGE_PLACEHOLDER,
    expand_image_placeholders,
    expand_slot_placeholders,
    record_messages,
)
from .records import Record, RecordError, record_origin

# Role to token, in the order in which the tokens are added.
LVR_TOKENS: dict[str, str] = {
    "start": "<|lvr_start|>",
    "slot": "<|lvr|>",
    "latent_end": "<|lvr_latent_end|>",
    "end": "<|lvr_end|>",
}
REGION_PLACEHOLDER = "<lvr>"


@dataclass(frozen=True)
class RegionLayout:
    """How regions are written.

    Args:
        latent_end_in_text: write `<|lvr_latent_end|>` behind the slots, as in the data of every published checkpoint;
            False is the layout of the paper, which the mode-switch loss needs.
        keep_text_before: keep what a turn says before its first region.
        restart_regions: begin again with the first region in every turn.
        drop_surplus: leave out placeholders beyond the number of regions, each with the text behind it.
    """

    latent_end_in_text: bool = True
    keep_text_before: bool = True
    restart_regions: bool = False
    drop_surplus: bool = False


REFERENCE_LAYOUT = RegionLayout(keep_text_before=False, restart_regions=True, drop_surplus=True)


def region_messages(record: Record, join_regions: bool = False) -> list[dict[str, str]]:
    """The record's turns; for one that was not published as a conversation, one pair as in the LVR data.

    Args:
        record: with `messages`, or with `question`, `answer` and `boxes`.
        join_regions: whether all boxes together are one region.
    """
    if record["messages"] is not None:
        return record["messages"]
    prompt, _ = record_messages({**record, "chain": None})
    num_boxes = len(record["boxes"] or [])
    regions = REGION_PLACEHOLDER * (min(num_boxes, 1) if join_regions else num_boxes)
    reply = f"{regions}\n" if regions else ""
    return [prompt, {"role": "assistant", "content": f"{reply}<answer>{record['answer']}</answer>"}]


def render_region_turns(
    messages: Sequence[Mapping[str, str]],
    counts: Sequence[int | None],
    layout: RegionLayout = RegionLayout(),
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
) -> list[tuple[str, str]]:
    """The fully expanded text of every turn, as `(role, text)`.

    Args:
        messages: turns with `<image>` and `<lvr>`.
        counts: slots of each region, in order; 0 writes an empty region, None leaves the region out.
        layout: see `RegionLayout`.
        latent_tokens: role to token.

    Raises:
        ValueError: when placeholders and counts differ in number, unless regions restart or a surplus is dropped.
    """
    found = sum(turn["content"].count(REGION_PLACEHOLDER) for turn in messages)
    if found != len(counts) and not (layout.restart_regions or layout.drop_surplus):
        raise ValueError(mismatch_reason(found, len(counts)))
    tokens = dict(latent_tokens)
    if not layout.latent_end_in_text:
        tokens.pop("latent_end", None)
    options = {"keep_text_before": layout.keep_text_before, "drop_surplus": layout.drop_surplus}
    turns, used = [], 0
    for turn in messages:
        text = expand_image_placeholders(turn["content"])
        rest = counts if layout.restart_regions else counts[used:]
        used += text.count(REGION_PLACEHOLDER)
        turns.append((turn["role"], expand_slot_placeholders(text, rest, tokens, REGION_PLACEHOLDER, **options)))
    return turns


def mismatch_reason(num_placeholders: int, num_regions: int) -> str:
    """What to say when placeholders and regions differ in number."""
    return (
        f"{num_placeholders} {REGION_PLACEHOLDER} placeholders but {num_regions} regions ('bboxes'); write one "
        "placeholder for each box"
    )


def render_regions(
    record: Record,
    grids_thw: Sequence[Iterable[int]],
    merge_size: int = 2,
    layout: RegionLayout = RegionLayout(),
    latent_tokens: Mapping[str, str] = LVR_TOKENS,
    empty_region: str = "one_token",
    join_regions: bool = False,
) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """Text and targets of a record, once its image grids are known: what a collator needs.

    Args:
        record: with `boxes`.
        grids_thw: grid of each image in patches, `(1, rows, columns)`, in order.
        merge_size: patches a side of a token.
        layout, latent_tokens: see `render_region_turns`.
        empty_region: see `boxes.box_tokens`; `"drop"` leaves the region out of text and targets.
        join_regions: all boxes together are one region, its tokens in the order of the boxes, each once. For paths:
            one span of as many slots as the path has cells.

    Returns:
        Turns as `(role, text)`, to be encoded by `encode_conversation`; and for each span in the text the indices
        `[num_slots]` of its image tokens, counted over all images of the record: the i-th slot stands for the i-th.

    Raises:
        RecordError: names file and row; a box that cannot be used, or regions and placeholders that differ.
    """
    origin = record_origin(record)
    regions = region_tokens(record["boxes"], grids_thw, merge_size, empty_region, origin)
    if join_regions and regions:
        regions = [joined_region(regions)]
    counts = [len(region) or None for region in regions]
    try:
        turns = render_region_turns(region_messages(record, join_regions), counts, layout, latent_tokens)
    except ValueError as error:
        raise RecordError(*origin, str(error)) from error
    return turns, [region for region in regions if len(region)]


# Second stage (card 2.7)


def grpo_example(
    record: Record,
    system_message: str | None = DEFAULT_SYSTEM_MESSAGE,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> dict[str, Any]:
    """A record as prompt and ground truth of reinforcement learning.

    Args:
        record: the images stand before the text, wherever `<image>` stood, or if it stood nowhere.
        system_message: text of the system turn; None leaves it out.
        min_pixels, max_pixels: bounds of an image's size, written beside it when given.

    Returns:
        `prompt`: chat messages, the user's as a list of parts; `assistant`: the turn that reward functions get, its
        content being the published reply, else `<answer>{answer}</answer>`.
    """
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    bounds = {name: size for name, size in bounds.items() if size is not None}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image, **bounds} for image in record["images"]]
    parts.append({"type": "text", "text": record["question"]})
    prompt: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if system_message is not None:
        prompt.insert(0, {"role": "system", "content": system_message})
    solution = f"<answer>{record['answer']}</answer>"
    if record["messages"] is not None:
        solution = next(turn["content"] for turn in record["messages"] if turn["role"] == "assistant")
    return {"prompt": prompt, "assistant": {"role": "assistant", "content": solution}}


def grpo_messages(question: str, solution: str, num_images: int) -> list[dict[str, str]]:
    """The turns of such a record, the images before the question."""
    images = IMAGE_PLACEHOLDER * num_images
    return [
        {"role": "user", "content": f"{images}\n{question}" if images else question},
        {"role": "assistant", "content": solution},
    ]
