"""The first batch of a run as text: what is fed, what is trained, and how large the images are."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from .collators import image_token_count
from .data.records import RECORD_FIELDS, open_image, record_from_row
from .grpo_trainer import LatentGRPOTrainer
from .sft_trainer import LatentSFTTrainer

_KINDS = {"-": "not trained", "c": "cross entropy", "l": "latent loss"}


@dataclass
class FirstBatch:
    """The first training batch and the rows that it was made of."""

    rows: list[Any]
    tensors: dict[str, torch.Tensor]


def first_batch(trainer: LatentSFTTrainer) -> FirstBatch:
    """The batch that training would begin with, from the trainer's own loader, read in this process."""
    kept: list[FirstBatch] = []
    args, collator = trainer.args, trainer.data_collator

    def collate(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = list(rows)
        kept.append(FirstBatch(rows, collator(rows)))
        return dict(kept[-1].tensors)

    workers, keep_alive, prefetch = (
        args.dataloader_num_workers,
        args.dataloader_persistent_workers,
        args.dataloader_prefetch_factor,
    )
    trainer.data_collator = collate
    args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_prefetch_factor = 0, False, None
    try:
        next(iter(trainer.get_train_dataloader()))
    finally:
        trainer.data_collator = collator
        args.dataloader_num_workers, args.dataloader_persistent_workers = workers, keep_alive
        args.dataloader_prefetch_factor = prefetch
    return kept[0]


def batch_lines(trainer: LatentSFTTrainer, batch: FirstBatch) -> list[str]:
    """Text, images and labels of each sample, as the model will see them."""
    tensors, processor = batch.tensors, trainer.processing_class
    ids, mask, labels = tensors["input_ids"], tensors["attention_mask"].bool(), tensors["labels"]
    entropy = trainer.objective.ce_labels(ids, labels) != -100
    entropy[:, 0] = False  # nothing predicts the first position
    latent = (labels != -100) & ~entropy
    latent[:, 0] = False
    fed = trainer.objective.fed_positions(ids) & mask
    at_stage = "" if trainer.curriculum is None else f" (stage {trainer.data_collator.stage})"
    lines = [
        f"first batch {len(ids)} samples of {ids.shape[1]} positions, {int((~mask).sum())} of them padding{at_stage}; "
        f"{int(entropy.sum())} labels in the cross entropy, {int(latent.sum())} rows in the latent loss"
    ]
    grids = iter(tensors["image_grid_thw"].tolist() if "image_grid_thw" in tensors else [])
    for index, row in enumerate(batch.rows):
        number = int(mask[index].sum())
        ce, rows = int(entropy[index].sum()), int(latent[index].sum())
        lines += [
            "",
            f"sample {index}    {_name(row)}: {number} tokens: {ce} cross entropy, {rows} latent loss, "
            f"{number - ce - rows} without a label; {int(fed[index].sum())} positions that are latents at inference",
            *_image_lines(row, grids, processor),
        ]
        both = entropy[index].tolist(), latent[index].tolist()
        kinds = ["c" if c else "l" if x else "-" for c, x in zip(*both, strict=True)]
        lines += _text_lines(ids[index].tolist(), kinds, mask[index].tolist(), processor)
    return lines


def stage_preview(trainer: LatentSFTTrainer, batch: FirstBatch, stages: Sequence[int]) -> list[str]:
    """The first sample of a batch at other stages of a curriculum."""
    if not stages:
        return []
    collator, lines = trainer.data_collator, []
    now = collator.stage
    for stage in stages:
        collator.stage = stage
        made = collator(batch.rows[:1])
        labels = trainer.objective.ce_labels(made["input_ids"], made["labels"])[0].tolist()
        kinds = ["-" if label == -100 else "c" for label in labels]
        ids, mask = made["input_ids"][0].tolist(), made["attention_mask"][0].tolist()
        lines += ["", f"sample 0 at stage {stage}", *_text_lines(ids, kinds, mask, trainer.processing_class)]
    collator.stage = now
    return lines


def prompt_lines(trainer: LatentGRPOTrainer) -> list[str]:
    """The first prompt of the second stage as the model will see it, its images and its solution."""
    row, processor = trainer.train_dataset[0], trainer.processing_class
    record = _record(row)
    images = [open_image(image, record) for image in record["images"] or []]
    *system, user = row["prompt"]
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": user["content"]}]
    text = processor.apply_chat_template(
        [*system, {"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    batch = processor(text=[text], images=images or None, return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    grids = iter(batch["image_grid_thw"].tolist() if images else [])
    shown = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    solution = row.get("assistant")
    return [
        f"first prompt {_name(row)}: {len(ids)} tokens",
        *_image_lines(row, grids, processor),
        f"  prompt        | {_folded(shown, processor)}",
        *([f"  solution      | {_folded(solution['content'], processor)}"] if solution else []),
    ]


def _name(row: Any) -> str:
    return f"id {row['id']!r}" if row.get("id") else "a record without id"


def _record(row: Any) -> Any:
    known = {name: value for name, value in row.items() if name in RECORD_FIELDS}
    return record_from_row({**dict.fromkeys(RECORD_FIELDS), "id": "", "question": "", "answer": "", **known})


def _image_lines(row: Any, grids: Iterator[list[int]], processor: Any) -> list[str]:
    """Size of each image, before and after the image processor, and its tokens."""
    record, lines = _record(row), []
    for number, image in enumerate(record["images"] or []):
        width, height = open_image(image, record).size
        grid = next(grids, None)
        if grid is None:  # every image is cut to one size
            size, tokens = processor.image_processor.crop_size, processor.image_seq_length
            columns, rows = size["width"], size["height"]
        else:
            side, tokens = processor.image_processor.patch_size, image_token_count(processor, grid)
            columns, rows = grid[2] * side, grid[1] * side
        lines.append(f"  image {number}       {width} x {height} pixels -> {columns} x {rows}, {tokens} tokens")
    return lines


def _text_lines(ids: list[int], kinds: list[str], mask: list[bool], processor: Any) -> list[str]:
    """One line for each run of tokens of one kind: which loss it is in, and what it says."""
    lines, kept = [], [(token, kind) for token, kind, real in zip(ids, kinds, mask, strict=True) if real]
    for kind, run in groupby(kept, key=lambda pair: pair[1]):
        text = processor.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        lines.append(f"  {_KINDS[kind]:<14}| {_folded(text, processor)}")
    return lines


def _folded(text: str, processor: Any) -> str:
    """Newlines written out; a run of image, slot or inserted tokens as one token and its number."""
    latent = (processor.latent_tokens.get(role) for role in ("slot", "patch"))
    for token in filter(None, (getattr(processor, "image_token", None), *latent)):
        text = re.sub(
            f"(?:{re.escape(token)}){{2,}}", lambda run, token=token: f"{token}x{len(run[0]) // len(token)}", text
        )
    return text.replace("\n", "\\n")


__all__ = ["FirstBatch", "batch_lines", "first_batch", "prompt_lines", "stage_preview"]
