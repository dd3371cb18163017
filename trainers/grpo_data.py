"""From records to what GRPO takes: a prompt, the images, and the solution as the column `assistant`.

Paper: "Latent Visual Reasoning" (LVR), arXiv 2509.24251, stage 2 (method card, section 2.7).
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import prepare_multimodal_messages

from .data.lvr_text import grpo_example
from .data.records import open_image
from .rewards import system_prompt

_NEEDED = ("question", "answer")


def prompt_dataset(name: str, dataset: Any, prompt: str | None = None) -> Any:
    """A data set with the column `prompt`, in TRL's format.

    Records (`trainers/data/records.py`; readers, mazes) get `prompt`, the system turn and the question, and
    `assistant`, the turn with the solution; their images stay in the column `images`, from where they are put before
    the question. All columns but `messages` reach the reward functions. A data set that has a `prompt` is returned as
    it is.

    Args:
        name: `"train_dataset"` or `"eval_dataset"`, for messages.
        dataset: `Dataset`, `IterableDataset`, a dictionary of them, or `None`.
        prompt: system prompt of records, by name or written out; `None` is `"default"`.

    Raises:
        ValueError: missing columns, an empty data set, or a system prompt for prompts that have their own.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {key: prompt_dataset(f"{name}[{key!r}]", part, prompt) for key, part in dataset.items()}
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}; give a datasets.Dataset of records (read_lvr_grpo, maze_dataset, "
            "records_to_dataset) or of prompts"
        )
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset), {}))
    if (isinstance(dataset, Dataset) and not len(dataset)) or not columns:
        raise ValueError(f"{name} is empty; look at what its reader reported")
    if "prompt" in columns:
        if prompt is not None:
            raise ValueError(f"system_prompt={prompt!r}: the prompts of {name} are written already; leave it out")
        return dataset
    missing = [column for column in _NEEDED if column not in columns]
    if missing:
        raise ValueError(
            f"{name} has the columns {sorted(columns)}: neither prompts (column 'prompt') nor records (missing "
            f"{missing}); make it with a reader of trainers.data, or add the column"
        )
    write = partial(_with_prompt, message=system_prompt("default" if prompt is None else prompt))
    # TRL tells prompts from conversations by any one of its own column names, and `messages` is one of them.
    options = {"remove_columns": ["messages"]} if "messages" in columns else {}
    if isinstance(dataset, IterableDataset):
        return dataset.map(write, **options)
    written = dataset.map(write, desc=f"Prompts of {name}", **options)
    if "images" in columns:  # a table that does not decode images has their paths or bytes
        written.set_transform(_with_open_images)
    return written


def _with_open_images(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The rows with their images opened: here, where an error can name file and row."""
    opened = []
    for number, images in enumerate(rows["images"]):
        origin = row_origin({name: rows[name][number] for name in ("id", "meta") if name in rows})
        opened.append([open_image(image, origin) for image in images or []])
    return {**rows, "images": opened}


def opens_images(dataset: Dataset) -> bool:
    """Whether what is made of a row when it is read is only that its images are opened."""
    return dataset.format["format_kwargs"].get("transform") is _with_open_images


def with_parts(row: dict[str, Any]) -> dict[str, Any]:
    """The row with turns that are lists of parts, as TRL makes them beside images: one form for rewards and logs."""
    if isinstance(row["prompt"], str) or row.get("images") or row.get("image"):
        return row
    return {**row, "prompt": prepare_multimodal_messages(row["prompt"])}


def row_origin(row: Mapping[str, Any]) -> dict[str, Any]:
    """What messages about a row of a table read (`record_origin`): its id, and its `meta` as a dictionary."""
    return {"id": row.get("id", ""), "meta": json.loads(row.get("meta") or "{}")}


def _with_prompt(row: Mapping[str, Any], message: str | None) -> dict[str, Any]:
    turns = row.get("messages") if "messages" in row else None
    record = {"images": [], "question": row["question"], "answer": row["answer"], "messages": turns}
    example = grpo_example(record, message)
    *system, user = example["prompt"]
    prompt = [*system, {"role": "user", "content": user["content"][0]["text"]}]
    return {"prompt": prompt, "assistant": example["assistant"]}


__all__ = ["opens_images", "prompt_dataset", "row_origin", "with_parts"]
