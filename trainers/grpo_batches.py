"""What one scoring forward of GRPO takes: some rows of a rollout, their images, and their recorded latents.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from .distributed import with_blank_image
from .grpo_replay import Replay

ROW_INPUTS = ("input_ids", "attention_mask", "labels")


def scored_batches(
    trainer: GRPOTrainer, inputs: dict[str, Any], replay: Replay, size: int | None
) -> Iterator[tuple[dict[str, torch.Tensor], Replay, int]]:
    """The rows in parts of `size` (`None`: all at once), each with its recorded latents and its number of rows.

    With several processes a part without images gets one more row, last, with a blank image: where parameters are
    gathered when a module runs, all processes must run the vision tower.

    Args:
        trainer: whose `accelerator`, `processing_class` and model are read.
        inputs: `input_ids`, `attention_mask` and `labels` `(B, L)`, and images as for [`image_rows`].
        replay: recorded latents, with positions for `L` ids.
    """
    total = len(inputs["input_ids"])
    size = size or total
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        given = {name: inputs[name][rows] for name in ROW_INPUTS} | image_rows(inputs, rows)
        part, count = replay.rows(rows), rows.stop - rows.start
        if trainer.accelerator.num_processes > 1 and "pixel_values" not in given:
            given.setdefault("mm_token_type_ids", torch.zeros_like(given["input_ids"]))
            given = with_blank_image(given, trainer.processing_class, trainer.model.config)
            part = part.with_empty_row() if len(given["input_ids"]) > count else part
        yield given, part, count


def image_rows(inputs: dict[str, Any], rows: slice) -> dict[str, torch.Tensor]:
    """The images of some rows, and their `mm_token_type_ids`.

    Args:
        inputs: `pixel_values` `(patches, D)`, `image_grid_thw` `(images, 3)`, `num_images` (one count a row) and
            `mm_token_type_ids` `(B, L)`, each possibly `None` or absent.
        rows: which ones.
    """
    kept = {}
    if inputs.get("mm_token_type_ids") is not None:
        kept["mm_token_type_ids"] = inputs["mm_token_type_ids"][rows]
    grids, counts = inputs.get("image_grid_thw"), inputs.get("num_images")
    if inputs.get("pixel_values") is None or grids is None or not sum(counts[rows]):
        return kept
    first, count = sum(counts[: rows.start]), sum(counts[rows])
    patches = [math.prod(grid) for grid in grids.tolist()]
    start = sum(patches[:first])
    kept["image_grid_thw"] = grids[first : first + count]
    kept["pixel_values"] = inputs["pixel_values"][start : start + sum(patches[first : first + count])]
    return kept


def check_images_of_all(trainer: GRPOTrainer, images: list | None) -> None:
    """Refuse rollouts that would wait for ever: under ZeRO-3 `generate` gathers parameters module by module with
    `ds3_gather_for_generation=False`, and a process without images does not run the vision tower.

    Raises:
        ValueError: on all processes; names the option and the remedy.
    """
    if not is_deepspeed_zero3_enabled() or trainer.args.ds3_gather_for_generation:
        return
    device = trainer.accelerator.device
    share = trainer.accelerator.gather(torch.tensor([float(images is not None)], device=device)).mean()
    if 0 < share < 1:
        raise ValueError(
            "ds3_gather_for_generation=False: one process has prompts with images and another has none, and would "
            "leave it waiting in the vision tower; leave the option out, or train on prompts with images only"
        )


__all__ = ["check_images_of_all", "image_rows", "scored_batches"]
