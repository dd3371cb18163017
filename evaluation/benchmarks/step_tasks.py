"""Questions with stepwise rationales: how each set is read, asked and scored.

M3CoT and ScienceQA as in "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603
(IVT-LR), the text sets as in "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769
(Coconut).
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainers.data.answers_staged import REFERENCE, score_coconut, score_m3cot, score_scienceqa
from trainers.data.boxes import checked_option
from trainers.data.graphs import graph_dataset
from trainers.data.records import Record, RecordReport, record_from_row
from trainers.data.staged_formats import StagedFormat
from trainers.data.step_readers import read_steps

GRAPHS = "graphs"  # generated, the others are read
NUM_GRAPHS = 200


@dataclass(frozen=True)
class Reply:
    """What is scored.

    Args:
        text: the new text.
        whole: prompt and new text without special tokens, as the published scorers read it.
        question: what the user says.
        fmt: how the question was written.
    """

    text: str
    whole: str
    question: str
    fmt: StagedFormat


@dataclass(frozen=True)
class StepsTask:
    """A data set.

    Args:
        score: from record, reply and mode (`"strict"` or `"reference"`) to whether it is right.
        method: that a stock model is made for.
        fmt: how a question is written by default.
        max_new_tokens: published budget of a reply.
        group: the entry of `meta` by which accuracies are split; by default the number of steps.
        chameleon: the default format of Chameleon, where it has one of its own.
    """

    score: Callable[[Record, Reply, str], bool]
    method: str = "coconut"
    fmt: str = "coconut"
    max_new_tokens: int = 128
    group: str | None = None
    chameleon: str | None = None


def _score_m3cot(record: Record, reply: Reply, mode: str) -> bool:
    text = reply.whole if mode == REFERENCE else reply.text
    return score_m3cot(text, record["answer"], mode, record["choices"])


def _score_scienceqa(record: Record, reply: Reply, mode: str) -> bool:
    return score_scienceqa(reply.text, int(record["answer"]), mode, record["choices"])


def _score_coconut(record: Record, reply: Reply, mode: str) -> bool:
    text = reply.whole if mode == REFERENCE else reply.text
    return score_coconut(text, record["answer"], mode, reply.fmt.answer_prefix.strip())


_choices = partial(StepsTask, method="ivtlr", fmt="ivtlr-qwen", chameleon="ivtlr-chameleon", max_new_tokens=512)
TASKS: dict[str, StepsTask] = {
    "m3cot": _choices(_score_m3cot, group="domain"),
    "scienceqa": _choices(_score_scienceqa, group="subject"),
    "prosqa": StepsTask(_score_coconut),
    "prontoqa": StepsTask(_score_coconut),
    "gsm8k": StepsTask(_score_coconut, max_new_tokens=64),
    GRAPHS: StepsTask(_score_coconut),
}


def steps_task(name: str) -> StepsTask:
    """A task by name.

    Raises:
        ValueError: for an unknown one.
    """
    return TASKS[checked_option("task", name, tuple(TASKS))]


def read_task(
    task: str,
    data_path: str | os.PathLike | None = None,
    split: str | None = None,
    *,
    num: int | None = None,
    seed: int = 0,
    image_folder: str | os.PathLike | None = None,
    report: RecordReport | None = None,
    **graph_options: Any,
) -> list[Record]:
    """The records of a task.

    Args:
        task: name in `TASKS`.
        data_path: file, folder or Hub id; none for `"graphs"`, which are generated.
        split: part of a folder or Hub id; of the generated graphs, default `"test"`.
        num: so many of them, drawn with `seed`, in their order; default all, or `NUM_GRAPHS` graphs.
        seed: of that draw, or of the graphs.
        image_folder: where image paths begin; default: the folder of the file.
        report: collects good, bad and skipped rows; without one, reading ends with an error above 1 % bad rows.
        graph_options: see `GraphGenerator`, e.g. `**SMALL_GRAPHS`.

    Raises:
        ValueError: an unknown task, an option that it does not have, no `data_path`, more records than there are.
        RecordError, RecordShareError: see the reader.
    """
    steps_task(task)
    if num is not None and num < 1:
        raise ValueError(f"num={num!r} must be at least 1; leave it out for all records")
    if task == GRAPHS:
        for name, value in (("data_path", data_path), ("image_folder", image_folder)):
            if value is not None:
                raise ValueError(f"{name}={os.fspath(value)!r}: graphs are generated; for a file take task 'prosqa'")
        table = graph_dataset(NUM_GRAPHS if num is None else num, seed, split or "test", **graph_options)
        return [record_from_row(row) for row in table]
    if data_path is None:
        raise ValueError(f"task {task!r} needs data_path: its file, or a Hub id with a split")
    if graph_options:
        raise ValueError(f"{sorted(graph_options)}: sizes of generated graphs, and {task} is read; leave them out")
    records = list(read_steps(task, data_path, split, image_folder=image_folder, report=report))
    if not records:
        rows = "" if report is None else f"\n{report.summary()}"
        raise ValueError(f"{data_path} has no record for {task}; check file and split{rows}")
    if num is None:
        return records
    if num > len(records):
        raise ValueError(f"num={num} of {len(records)} records of {data_path}; ask for fewer")
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), num))]


__all__ = ["GRAPHS", "NUM_GRAPHS", "TASKS", "Reply", "StepsTask", "read_task", "steps_task"]
