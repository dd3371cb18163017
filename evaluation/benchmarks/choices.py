"""Multiple-choice questions as the published LaViT evaluation asks them, scored strictly and by its letter rules.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 7). The published
rules find a letter in many words ("left" is e, "I see a cat" is a; `trainers/data/answers_lavit.py`); for the maze
questions of VSP, whose ground truth is a map, they say nothing. The data sets are in `choice_tasks.py`.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from trainers.data.answers_lavit import extract_letter_lavit, score_lavit
from trainers.data.answers_staged import REFERENCE
from trainers.data.predictions import whole_file
from trainers.data.records import Record

from ..conditions import accuracy_text
from ..runner import Prediction, predict
from .choice_tasks import choice_task

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512  # published
LINE_FIELDS = ("id", "prompt", "ground_truth", "model_output", "lvr_count", "meta")


@dataclass(frozen=True)
class ChoiceReport:
    """Result on a data set.

    Args:
        name: of the condition.
        correct: per record, scored strictly.
        reference: per record, by the published rules.
        answers: what each reply names strictly: a letter, of VSP a plan; empty for nothing.
        letters: the letter that the published rules find, `None` for none.
        groups: name of the group of each record.
        predictions: what was written.
    """

    name: str
    correct: list[bool]
    reference: list[bool]
    answers: list[str]
    letters: list[str | None]
    groups: list[str]
    predictions: list[Prediction]

    @property
    def accuracy(self) -> float:
        """Share of right answers, strictly; a reply without answer is wrong."""
        return sum(self.correct) / len(self.correct)

    @property
    def reference_accuracy(self) -> float:
        """Share of right answers by the published rules; a reply without letter is wrong."""
        return sum(self.reference) / len(self.reference)

    @property
    def num_unanswered(self) -> int:
        """Replies in which no answer was found, strictly."""
        return self.answers.count("")

    @property
    def reference_num_unanswered(self) -> int:
        """Replies in which the published rules find no letter."""
        return self.letters.count(None)

    @property
    def latent_usage(self) -> float:
        """Share of replies with a latent step: a slot, or a learned token."""
        return sum(prediction.num_latent_steps > 0 for prediction in self.predictions) / len(self.predictions)

    @property
    def latent_steps(self) -> float:
        """Mean number of latent steps."""
        return sum(prediction.num_latent_steps for prediction in self.predictions) / len(self.predictions)

    @property
    def ar_steps(self) -> float:
        """Mean number of autoregressive steps."""
        return sum(prediction.num_steps for prediction in self.predictions) / len(self.predictions)

    def by_group(self) -> dict[str, float]:
        """Strict accuracy of each group."""
        pairs = list(zip(self.groups, self.correct, strict=True))
        return {
            name: sum(right for group, right in pairs if group == name) / self.groups.count(name)
            for name in sorted(set(self.groups))
        }

    def line(self) -> str:
        """One line: both accuracies with 95 % Wilson intervals and the replies without answer, the strict accuracy by
        group, the use of latents, AR steps."""
        groups = "".join(f"  {name} {100 * share:5.1f}" for name, share in self.by_group().items())
        return (
            f"{self.name:<34} strict {accuracy_text(self.correct)}, no answer {self.num_unanswered}"
            f"  published rule {accuracy_text(self.reference)}, no answer {self.reference_num_unanswered}"
            f"  n={len(self.correct)}{groups}  latent steps {self.latent_steps:.1f}"
            f" in {100 * self.latent_usage:.1f} % of replies  AR steps {self.ar_steps:.1f}"
        )

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        names = ("accuracy", "reference_accuracy", "num_unanswered", "reference_num_unanswered")
        rows = zip(self.predictions, self.correct, self.reference, self.answers, self.letters, strict=True)
        return {
            **{name: getattr(self, name) for name in (*names, "latent_usage", "latent_steps", "ar_steps")},
            "by_group": self.by_group(),
            "predictions": [
                vars(prediction) | {"correct": strict, "reference": ref, "answer": answer, "letter": letter}
                for prediction, strict, ref, answer, letter in rows
            ],
        }


def evaluate_choices(
    name: str,
    dataset: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options: Any,
) -> ChoiceReport:
    """Generate answers and score them. When none of them can be read, a warning shows the first three.

    Args:
        name: of the condition, for the report.
        dataset: name in `choice_tasks.TASKS`.
        model, processor: a latent model.
        records: of [`read_choices`].
        batch_size: prompts per call of `generate`.
        max_new_tokens: budget of a reply.
        options: for [`predict`], e.g. `latent_strategy="learned"`.

    Raises:
        ValueError: no records, an unknown data set; see also [`predict`].
        RecordError: see [`predict`].
    """
    choice_task(dataset)
    if not records:
        raise ValueError(f"no records of {dataset}; give at least one")
    predictions = predict(model, processor, records, batch_size, max_new_tokens, **options)
    report = score_choices(name, dataset, records, predictions)
    if report.num_unanswered == len(records):
        shown = [prediction.raw[:200] for prediction in predictions[:3]]
        logger.warning("%s: no reply names an answer of %s; the first are %r", name, dataset, shown)
    return report


def score_choices(
    name: str, dataset: str, records: Sequence[Record], predictions: Sequence[Prediction]
) -> ChoiceReport:
    """The report of predictions that are there already.

    Args:
        name: of the condition.
        dataset: name in `choice_tasks.TASKS`.
        records: of [`read_choices`].
        predictions: one a record. Strictly their text is scored, by the published rules the text with its special
            tokens, whose length decides on one of the rules.

    Raises:
        ValueError: an unknown data set, another number of predictions than records.
    """
    if len(records) != len(predictions):
        raise ValueError(f"{len(records)} records but {len(predictions)} predictions; give one a record")
    task, pairs = choice_task(dataset), list(zip(records, predictions, strict=True))
    return ChoiceReport(
        name=name,
        correct=[task.score(record, prediction.text) for record, prediction in pairs],
        reference=[score_lavit(prediction.raw, record["answer"], REFERENCE) for record, prediction in pairs],
        answers=[task.read(record, prediction.text) for record, prediction in pairs],
        letters=[extract_letter_lavit(prediction.raw) for prediction in predictions],
        groups=[_group(record, task.group, dataset) for record in records],
        predictions=list(predictions),
    )


def _group(record: Record, name: str | None, dataset: str) -> str:
    return dataset if name is None else str(record["meta"]["item"].get(name) or "none")


def write_choices(path: str | os.PathLike, records: Sequence[Record], report: ChoiceReport) -> int:
    """Write the prediction file of the published evaluation: JSON lines of `LINE_FIELDS`.

    Args:
        path: the file; it appears when all of it is written.
        records: that the report is of.
        report: of [`evaluate_choices`].

    Returns:
        The number of lines.

    Raises:
        ValueError: the report is of other records.
    """
    if [record["id"] for record in records] != [prediction.id for prediction in report.predictions]:
        raise ValueError(f"the report {report.name!r} is of other records than these {len(records)}; give its own")
    with whole_file(path) as file:
        for record, prediction in zip(records, report.predictions, strict=True):
            file.write(json.dumps(choice_line(record, prediction), ensure_ascii=False) + "\n")
    return len(records)


def choice_line(record: Record, prediction: Prediction) -> dict[str, Any]:
    """One line of that file. `model_output` is the new text with its special tokens; learned tokens that were laid out
    behind the prompt are counted in `lvr_count` and are no part of it."""
    meta = record["meta"]
    values = (meta["prompt"], record["answer"], prediction.raw, prediction.num_latent_steps, meta["item"])
    return dict(zip(LINE_FIELDS, (record["id"], *values), strict=True))


__all__ = ["ChoiceReport", "choice_line", "evaluate_choices", "score_choices", "write_choices"]
