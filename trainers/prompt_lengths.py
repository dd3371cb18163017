"""Prompts of GRPO that are longer than `max_prompt_length`: refused by name, since none is trimmed.

An option of the published LVR scripts (arXiv 2509.24251). Rows of a table are counted when the trainer is built, from
the text and the headers of the images; those of a stream, or of a table with a transform, when they are met.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from .collators import LatentSFTCollator
from .fault_tolerance import record_label
from .grpo_data import opens_images, row_origin
from .sample_lengths import SampleLengths, stored_rows

_LISTED = 10


def check_prompt_lengths(trainer: GRPOTrainer) -> None:
    """Refuse data sets with prompts of more than `args.max_prompt_length` tokens, those of the images included.

    Raises:
        ValueError: names the rows, their lengths, the option and the remedy.
        RecordError: an image that cannot be read.
    """
    if trainer.args.max_prompt_length is None:
        return
    evaluated = trainer.eval_dataset
    evaluated = evaluated if isinstance(evaluated, Mapping) else {"": evaluated}
    datasets = {f"eval_dataset{f'[{key!r}]' if key else ''}": part for key, part in evaluated.items()}
    for name, dataset in {"train_dataset": trainer.train_dataset, **datasets}.items():
        if isinstance(dataset, Dataset) and (dataset.format["type"] != "custom" or opens_images(dataset)):
            refuse_long(name, prompt_lengths(dataset, trainer), trainer.args.max_prompt_length)


def refuse_long(name: str, lengths: Iterator[tuple[Any, int]], limit: int | None) -> None:
    """Refuse rows, given with their lengths in tokens, that are above the limit.

    Raises:
        ValueError: names the rows, their lengths, the option and the remedy.
    """
    if limit is None:
        return
    long = list(dict.fromkeys(f"{record_label(row)}: {length} tokens" for row, length in lengths if length > limit))
    if long:
        more = f"; and {len(long) - _LISTED} more" if len(long) > _LISTED else ""
        raise ValueError(
            f"max_prompt_length={limit}: {name} has longer prompts ({'; '.join(long[:_LISTED])}{more}), and none is "
            "trimmed, since it would lose image tokens; leave these records out, lower max_pixels of the processor, "
            "or raise max_prompt_length"
        )


def prompt_lengths(dataset: Dataset, trainer: GRPOTrainer) -> Iterator[tuple[Any, int]]:
    """Rows as they are stored, each with the tokens of its prompt; of an image only the header is read."""
    processor = trainer.processing_class
    sizes, merged = SampleLengths(LatentSFTCollator(processor)), processor.image_processor.merge_size**2
    options = {"chat_template": trainer.chat_template, "tokenize": False, "add_generation_prompt": True}
    for row in stored_rows(dataset, range(len(dataset))):
        text, images = row["prompt"], row.get("images") or []
        if not isinstance(text, str):
            messages = prepare_multimodal_messages(text, images=images)
            text = processor.apply_chat_template(messages, **options, **trainer.chat_template_kwargs)
        length = len(processor.tokenizer(text)["input_ids"])
        for image in images:
            length += math.prod(sizes.grid_thw(image, row_origin(row))) // merged - 1  # the text has one token for it
        yield row, length


__all__ = ["check_prompt_lengths", "prompt_lengths", "refuse_long"]
