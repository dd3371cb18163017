"""Questions with stepwise rationales: M3CoT and ScienceQA (IVT-LR), and the text sets of Coconut.

Papers: "Reasoning in the Dark: Interleaved Vision-Text Reasoning in Latent Space", arXiv 2510.12603, and "Training
Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769. Every reply is scored twice: by the
published rule, for comparison with published numbers, and strictly (`trainers/data/answers_staged.py` says how they
differ). "AR steps" are the slots and the generated tokens, the end of the turn counted and markers around slots not.
The tasks are in `step_tasks.py`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from modeling_latent import LatentChameleonProcessor
from trainers.data.answers_staged import REFERENCE, STRICT
from trainers.data.records import Record, open_square_image
from trainers.data.staged_formats import StagedFormat, image_token_of, question_text, staged_format, user_text

from ..conditions import accuracy_text
from ..runner import Prediction, predict
from .step_tasks import Reply, StepsTask, steps_task


@dataclass(frozen=True)
class StepsReport:
    """Result on a task.

    Args:
        name: of the condition.
        correct: per record, scored strictly.
        reference: per record, by the published rule.
        groups: name of the group of each record.
        replies: what was scored.
        predictions: what was written.
    """

    name: str
    correct: list[bool]
    reference: list[bool]
    groups: list[str]
    replies: list[Reply]
    predictions: list[Prediction]

    @property
    def accuracy(self) -> float:
        """Share of right answers, strictly."""
        return sum(self.correct) / len(self.correct)

    @property
    def reference_accuracy(self) -> float:
        """Share of right answers by the published rule."""
        return sum(self.reference) / len(self.reference)

    @property
    def ar_steps(self) -> float:
        """Mean number of autoregressive steps."""
        return sum(prediction.num_steps for prediction in self.predictions) / len(self.predictions)

    def by_group(self) -> dict[str, float]:
        """Strict accuracy of each group."""
        pairs = list(zip(self.groups, self.correct, strict=True))
        return {
            name: sum(right for group, right in pairs if group == name) / self.groups.count(name)
            for name in sorted(set(self.groups), key=lambda name: (len(name), name))
        }

    def line(self) -> str:
        """One line: both accuracies with 95 % Wilson intervals, the strict one by group, latent and AR steps."""
        groups = "  ".join(f"{name} {100 * share:5.1f}" for name, share in self.by_group().items())
        latents = sum(prediction.num_latent_steps for prediction in self.predictions) / len(self.predictions)
        return (
            f"{self.name:<34} strict {accuracy_text(self.correct)}  published rule {accuracy_text(self.reference)}"
            f"  n={len(self.correct)}  {groups}  latent steps {latents:.1f}  AR steps {self.ar_steps:.1f}"
        )

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        rows = zip(self.predictions, self.correct, self.reference, strict=True)
        return {
            "accuracy": self.accuracy,
            "reference_accuracy": self.reference_accuracy,
            "ar_steps": self.ar_steps,
            "by_group": self.by_group(),
            "predictions": [vars(p) | {"correct": strict, "reference": ref} for p, strict, ref in rows],
        }


def task_format(task: str, processor: ProcessorMixin, fmt: str | StagedFormat | None = None) -> StagedFormat:
    """The format of a task for a model, or the one that is asked for.

    Raises:
        ValueError: an unknown task or format, or a format with the image token of another family.
    """
    entry = steps_task(task)
    if fmt is None:
        is_chameleon = isinstance(processor, LatentChameleonProcessor)
        fmt = entry.chameleon if is_chameleon and entry.chameleon else entry.fmt
    fmt = staged_format(fmt)
    own = getattr(processor, "image_token", None)
    if fmt.image_token not in (None, own):
        raise ValueError(
            f"the format {fmt.name!r} writes an image as {fmt.image_token!r}, {type(processor).__name__} as {own!r}; "
            "take a format of its family"
        )
    return fmt


def evaluate_steps(
    name: str,
    task: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    fmt: str | StagedFormat | None = None,
    prompt: str = "training",
    image_size: int | None = None,
    batch_size: int = 32,
    **options: Any,
) -> StepsReport:
    """Generate answers and score them.

    Args:
        name: of the condition, for the report.
        task: name in `TASKS`.
        model, processor: a latent model.
        records: of [`read_task`].
        fmt: how a question is written, see `staged_formats.py`; default: that of the task, for Chameleon its own.
        prompt: `"training"`, or `"published_inference"` for the prompt of the published evaluation scripts. What that
            has behind its latents stands behind those of the strategy `staged`, else at the end of the prompt.
        image_size: side of the square that every image is resized to, on white (published for Qwen2-VL: 280).
        batch_size: prompts per call of `generate`.
        options: for [`predict`], e.g. `latent_strategy="off"`.

    Raises:
        ValueError: no records, an unknown task, format or prompt, a format of another family; see also [`predict`].
        RecordError: see [`predict`].
    """
    if not records:
        raise ValueError(f"no records of {task}; give at least one")
    entry, fmt = steps_task(task), task_format(task, processor, fmt)
    if image_size is not None:
        records = [_resized(record, image_size) for record in records]
    write, options = _prompt_writer(model, processor, fmt, prompt, options)
    # The formats write the markers of Chameleon's images and the tokenizer's own tokens themselves, or leave them out.
    spelled_out: dict[str, Any] = {"add_special_tokens": fmt.special_tokens}
    if isinstance(processor, LatentChameleonProcessor):
        spelled_out["image_markers"] = False
    predictions = predict(
        model, processor, records, batch_size, prompt=write, processor_options=spelled_out, **options
    )
    replies = [
        Reply(
            text=prediction.text,
            whole=_decoded(processor, write(record)) + prediction.text,
            question=user_text(record, fmt, prompt=prompt, image_token=image_token_of(processor, fmt)),
            fmt=fmt,
        )
        for record, prediction in zip(records, predictions, strict=True)
    ]
    pairs = list(zip(records, replies, strict=True))
    strict, reference = ([entry.score(*pair, mode) for pair in pairs] for mode in (STRICT, REFERENCE))
    return StepsReport(name, strict, reference, [_group(record, entry) for record in records], replies, predictions)


def _prompt_writer(
    model: PreTrainedModel, processor: ProcessorMixin, fmt: StagedFormat, prompt: str, options: dict[str, Any]
) -> tuple[Callable[[Record], str], dict[str, Any]]:
    """From a record to its prompt, and the options of `generate` with what stands behind the latents."""
    behind = fmt.style(prompt).after_latents
    if behind and _lays_out(model, options.get("latent_strategy")):
        ids = processor.tokenizer.encode(behind, add_special_tokens=False)
        behind, options = "", {"latent_suffix_ids": ids, **options}
    return lambda record: question_text(record, processor, fmt, prompt=prompt) + behind, options


def _lays_out(model: PreTrainedModel, strategy: str | None) -> bool:
    """Whether `generate` lays slots out behind the prompt: by this strategy, or by the model's own."""
    method = getattr(model.config, "latent_generation", None) or {}
    saved = getattr(model.generation_config, "latent_strategy", None)
    return (strategy or saved or method.get("latent_strategy")) == "staged"


def _decoded(processor: ProcessorMixin, text: str) -> str:
    """A text without its special tokens."""
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def _resized(record: Record, side: int) -> Record:
    return {**record, "images": [open_square_image(image, record, side) for image in record["images"]]}


def _group(record: Record, task: StepsTask) -> str:
    if task.group is not None:
        return str(record["meta"].get(task.group, "none"))
    return f"{len(record['steps'] or [])} steps"


def write_predictions(path: str | os.PathLike, task: str, records: Sequence[Record], report: StepsReport) -> int:
    """Write the prediction file that the published scripts of a task write.

    Args:
        path: the file.
        task: `"m3cot"` or `"scienceqa"`.
        records: that the report is of.
        report: of [`evaluate_steps`].

    Returns:
        The number of predictions.

    Raises:
        ValueError: a task without such a file.
        RecordError: a record that occurs twice.
    """
    write = steps_task(task).write
    if write is None:
        raise ValueError(f"there is no published form of prediction files of {task}; the JSON of the report has them")
    return write(path, records, report.replies)


__all__ = ["StepsReport", "evaluate_steps", "task_format", "write_predictions"]
