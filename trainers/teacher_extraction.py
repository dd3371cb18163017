"""The work of one process of an extraction of teacher signals: which shards, and what becomes of every record.

Paper: "LaViT: Aligning Latent Visual Thoughts for Multi-modal Reasoning", arXiv 2601.10129 (card 5.2). A shard goes
through the steps of the card: answer, judge, answer without the image, capture, boxes. Batches are cut inside a shard,
so that its content does not depend on other shards, processes, or where a run was killed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from .data.records import RECORD_FIELDS, Record, RecordReport, open_image, record_origin
from .data.teacher_signals import image_fingerprint
from .judges import Judge, final_answer
from .teacher_acceptance import ANSWERED_BLIND, FEW_STEPS, JUDGE_FAILED, WRONG, box_mass, boxes_of_image
from .teacher_capture import CapturedSignals, split_steps
from .teacher_config import TeacherConfig
from .teacher_layout import PublishedLayout, sample_number, trajectory_step
from .teacher_models import Teacher
from .teacher_store import (
    BAD,
    StorePlan,
    TeacherStore,
    image_bytes,
    image_path,
    iter_rows,
    record_hash,
    report_rows,
)

_ROWS_BEFORE_STOP = 200  # fewer say little about the share of bad rows


@dataclass
class _Sample:
    """A record on its way: `row` is what will be written of it."""

    record: Record
    row: dict[str, Any]
    image: Image.Image | None = None
    pieces: list[str] = field(default_factory=list)
    signals: list[CapturedSignals] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether nothing speaks against it so far."""
        return self.row["reason"] is None

    def reject(self, reason: str) -> None:
        self.row["reason"] = reason

    def fail(self, problem: str) -> None:
        self.row.update(reason=BAD, bad=[*record_origin(self.record), f"record {self.record['id']!r}: {problem}"])


class Extraction:
    """Plan and progress of one process; the arguments are those of [`extract_teacher`]."""

    def __init__(
        self,
        config: TeacherConfig,
        teacher: Teacher,
        judge: Judge | None,
        records: Dataset | Sequence[Record],
        image_root: str | Path | None,
    ) -> None:
        self.config, self.teacher, self.judge, self.records = config, teacher, judge, records
        self.rules, self.image_root = config.rules(), image_root
        self.layout: PublishedLayout | None = None
        if config.write_json:
            root = config.output_lavit15k_root or config.output_dir
            self.layout = PublishedLayout(root, image_root, config.copy_images, config.topk)
        self.defects: dict[int, str] = {}
        self.plan = StorePlan({**config.settings(), **teacher.facts()}, self._read_all(), config.shard_size)
        self.store = TeacherStore(config.output_dir, self.plan, image_root)

    def _read_all(self) -> list[str]:
        """The fingerprint of every record; finds what is wrong with records beside others, and with all of them."""
        hashes, ids, numbers, boxes = [], {}, {}, 0
        for row in range(len(self.records)):
            record = self._record(row)
            hashes.append(record_hash(record, self.image_root))
            boxes += bool(record["boxes"])
            if ids.setdefault(record["id"], row) != row:
                self.defects[row] = f"this id is that of record {ids[record['id']]}, too; ids must be unique"
            if self.layout is not None:
                self._check_published(record, row, numbers)
        if hashes and not boxes and self.rules.min_box_mass is not None and self.rules.no_boxes == "reject":
            raise ValueError(
                f"no record has boxes, so none can pass min_box_mass={self.rules.min_box_mass:g}; choose "
                "acceptance='reference', min_box_mass=0, or data with boxes"
            )
        return hashes

    def _check_published(self, record: Record, row: int, numbers: dict[int, int]) -> None:
        if not self.config.copy_images and any(image_path(image) is None for image in record["images"]):
            raise ValueError(f"copy_images=False, and the image of record {record['id']!r} is no file; leave it on")
        try:
            number = sample_number(record, row)
        except ValueError as error:
            self.defects[row] = str(error)
            return
        if numbers.setdefault(number, row) != row:
            self.defects[row] = (
                f"question_id {number} is that of record {numbers[number]}, too; their files would clash"
            )

    def _record(self, row: int) -> Record:
        record = dict(self.records[row])
        for name in ("meta", "teacher"):
            record[name] = json.loads(record[name]) if isinstance(record[name], str) else record[name]
        return {**record, "meta": record["meta"] or {}}

    def run(self, shards: Sequence[int], show: bool = True) -> None:
        """Make those of some shards that are not there yet.

        Raises:
            RecordShareError: too many bad rows so far.
        """
        report, accepted = RecordReport(self.config.max_bad_share), 0
        total = sum(len(self.plan.rows(shard)) for shard in shards)
        with tqdm(total=total, desc="teacher", unit="sample", disable=not show) as bar:
            for shard in shards:
                rows = self.store.rows(shard)
                if rows is None or (self.config.retry_bad and any(row["reason"] == BAD for row in rows)):
                    rows = self.extract(shard, bar.update)
                else:
                    bar.update(len(rows))
                accepted += sum(row["accepted"] for row in rows)
                report_rows(rows, report)
                bar.set_postfix(accepted=f"{accepted / (report.num_good + report.num_bad):.0%}")
                if report.num_good + report.num_bad >= _ROWS_BEFORE_STOP and report.bad_share > report.max_bad_share:
                    report.check()

    def finish(self) -> dict[str, Any]:
        """Complete the folder, when the shards of all processes are there.

        Returns:
            The index, with the counts.

        Raises:
            RecordShareError: too many bad rows.
        """
        report = RecordReport(self.config.max_bad_share)
        index = self.store.merge(report)
        report.check()
        if self.layout is not None:
            rows = (row for _, row in iter_rows(self.store.folder) if row["accepted"])
            self.layout.write_training_json(
                self.layout.training_row(row["record"], row["image"], row["number"]) for row in rows
            )
        return index

    # One shard

    def extract(self, shard: int, update: Callable[[int], Any] = lambda count: None) -> list[dict[str, Any]]:
        """Make one shard and write it.

        Args:
            shard: its number.
            update: is told how many more samples are answered.

        Returns:
            Its rows.
        """
        samples = [self._opened(row) for row in self.plan.rows(shard)]
        update(sum(not sample.open for sample in samples))
        for part in self._batches(samples):
            for sample, reply in self._each(part, lambda each: self._answers(each)):
                sample.row.update(teacher_answer=reply, final_answer=final_answer(reply, self.config.final_answer))
            update(len(part))
        self._judge(samples)
        self._ask_without_image(samples)
        for sample in samples:
            self._split(sample)
        for part in self._batches(samples):
            for sample, signals in self._each(part, self._capture):
                sample.signals = signals
                self._check_signals(sample)
        tensors: dict[str, torch.Tensor] = {}
        for sample in samples:
            if sample.open:
                self._accept(sample, tensors)
        rows = [sample.row for sample in samples]
        self.store.write(shard, rows, tensors)
        return rows

    def _opened(self, row: int) -> _Sample:
        record = self._record(row)
        sample = _Sample(record, {"id": record["id"], "row": row, "accepted": False, "reason": None})
        if row in self.defects:
            sample.fail(self.defects[row])
            return sample
        try:
            if len(record["images"]) != 1:
                raise ValueError(f"{len(record['images'])} images; a teacher is asked about one")
            sample.image = open_image(record["images"][0], record)
        except ValueError as error:
            sample.fail(getattr(error, "reason", str(error)))
        return sample

    def _batches(self, samples: Sequence[_Sample]) -> Iterator[list[_Sample]]:
        left = [sample for sample in samples if sample.open]
        for first in range(0, len(left), self.config.batch_size):
            yield left[first : first + self.config.batch_size]

    def _each(
        self, samples: list[_Sample], call: Callable[[list[_Sample]], list[Any]]
    ) -> Iterator[tuple[_Sample, Any]]:
        """The samples of a batch with their results. Where the teacher refuses the batch each is tried alone, and the
        refused ones fail."""
        try:
            results = call(samples)
        except ValueError as error:
            if len(samples) == 1:
                samples[0].fail(f"the teacher cannot take it ({error})")
                return
            for sample in samples:
                yield from self._each([sample], call)
            return
        yield from zip(samples, results, strict=True)

    def _questions(self, samples: Sequence[_Sample]) -> list[str]:
        return [self.config.user_text(sample.record["question"], sample.record["choices"]) for sample in samples]

    def _answers(self, samples: list[_Sample], with_image: bool = True) -> list[str]:
        return self.teacher.answer([sample.image for sample in samples], self._questions(samples), with_image)

    def _capture(self, samples: list[_Sample]) -> list[list[CapturedSignals]]:
        pieces = [sample.pieces for sample in samples]
        return self.teacher.capture([sample.image for sample in samples], self._questions(samples), pieces)

    def _judge(self, samples: Sequence[_Sample]) -> None:
        asked = [sample for sample in samples if sample.open]
        if self.judge is None or not asked:
            return
        verdicts = self.judge([sample.record for sample in asked], [sample.row["final_answer"] for sample in asked])
        for sample, verdict in zip(asked, verdicts, strict=True):
            sample.row.update(correct=verdict.correct, judge_reply=verdict.reply)
            if not verdict.correct:
                sample.reject(WRONG if verdict.correct is not None else JUDGE_FAILED)

    def _ask_without_image(self, samples: Sequence[_Sample]) -> None:
        if not self.rules.reject_text_only:
            return
        for part in self._batches(samples):
            for sample, reply in self._each(part, lambda each: self._answers(each, with_image=False)):
                sample.row["text_only_answer"] = reply
        asked = [sample for sample in samples if sample.open]
        replies = [final_answer(sample.row["text_only_answer"], self.config.final_answer) for sample in asked]
        verdicts = self.judge([sample.record for sample in asked], replies) if asked else []
        for sample, verdict in zip(asked, verdicts, strict=True):
            sample.row["text_only_correct"] = verdict.correct
            if verdict.correct is not False:
                sample.reject(ANSWERED_BLIND if verdict.correct else JUDGE_FAILED)

    def _split(self, sample: _Sample) -> None:
        """The pieces of a reply whose attention is captured."""
        if not sample.open:
            return
        reply, count = sample.row["teacher_answer"], self.config.steps
        if self.config.split == "whole":
            sample.pieces = [reply]
            return
        try:
            lines = [line.strip() for line in reply.splitlines() if line.strip()]
            sample.pieces = lines[:count] if self.config.split == "lines" else split_steps(reply, count)
        except ValueError:
            sample.pieces = []
        if len(sample.pieces) < count:
            sample.reject(FEW_STEPS)

    def _check_signals(self, sample: _Sample) -> None:
        """Refuses signals that nothing can be learnt from, and attention outside the boxes."""
        grid = sample.signals[0].grid
        for each in sample.signals:
            for name, values in (("concept", each.concept), ("attention", each.attention)):
                if len(values) != math.prod(grid):
                    sample.fail(f"{len(values)} values of {name} for a grid of {grid[0]} x {grid[1]} image tokens")
                elif not values.isfinite().all():
                    sample.fail(f"the teacher's {name} has NaN or infinite values; try another dtype")
                elif not values.any():
                    sample.fail(f"the teacher's {name} sums to zero: its image tokens are all alike to it")
        if not sample.open:
            return
        attention = torch.stack([each.attention for each in sample.signals]).mean(0)
        boxes = boxes_of_image(sample.record)
        mass = box_mass(attention, grid, boxes) if boxes else None
        sample.row["box_mass"] = mass
        reason = self.rules.of_boxes(mass)
        if reason is not None:
            sample.reject(reason)

    # What is kept

    def _accept(self, sample: _Sample, tensors: dict[str, torch.Tensor]) -> None:
        name, record, first = sample.record["id"], sample.record, sample.signals[0]
        dtype = getattr(torch, self.config.concept_dtype)
        attention = torch.stack([each.attention for each in sample.signals]).float()
        tensors[f"{name}/concept"] = first.concept.float().mean(0).to(dtype)
        tensors[f"{name}/attention"] = attention if len(attention) > 1 else attention[0]
        if self.config.save_full_concept:
            tensors[f"{name}/concept_full"] = first.concept.to(dtype)
        if self.config.save_scores and first.scores is not None:
            scores = torch.stack([each.scores for each in sample.signals]).float()
            tensors[f"{name}/scores"] = scores if len(scores) > 1 else scores[0]
        source = record["images"][0]
        path = image_path(source, self.image_root)
        if path is None:
            tensors[f"{name}/image"] = torch.frombuffer(bytearray(image_bytes(source)), dtype=torch.uint8)
        sample.row.update(
            accepted=True,
            grid=list(first.grid),
            image=path,
            image_size=list(sample.image.size),
            image_sha256=image_fingerprint(sample.image),
            tokens=[each.steps for each in sample.signals] if first.steps else None,
            record={key: record[key] for key in RECORD_FIELDS if key not in ("images", "step_images", "teacher")},
        )
        if self.layout is not None:
            sample.row["number"] = sample_number(record, sample.row["row"])
            steps = [published_step(self.config, each) for each in sample.signals]
            self.layout.write_sample(record, sample.row["number"], first.concept, steps)


def published_step(config: TeacherConfig, signals: CapturedSignals) -> Mapping[str, Any]:
    """The step of a published trajectory file."""
    if config.method == "attention":
        facts = {"tau_used": "attention", "method": "attention_based"}
        return trajectory_step(signals.attention, config.topk, scores=signals.scores, **facts)
    return trajectory_step(
        signals.attention,
        config.topk,
        tau_used=config.tau_grad,
        method=f"grad_{config.aggregation}",
        span_token_count=len(signals.steps),
        downsample=config.downsample,
        skip_markup=config.skip_markup,
        aggregation_method=config.aggregation,
    )


__all__ = ["Extraction", "published_step"]
